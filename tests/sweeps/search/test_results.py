"""What `compare` says about a search: trials, the best setting, its command line, and the epochs that pruning saved."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Forks
from tests.sweeps.made_runs import make_run
from tests.sweeps.made_searches import AXES, MAX_EPOCHS, NO_VALUE, Made, make_search, random_trials
from trainkit.cli.main import main
from trainkit.runs.directory import Run
from trainkit.sweeps.collect import collect
from trainkit.sweeps.comparison import compare, comparison_lines
from trainkit.sweeps.ledger import Ledger
from trainkit.sweeps.report import sweep_facts
from trainkit.sweeps.search.results import Search, SearchAxis, find_searches
from trainkit.sweeps.search.text import near_end, repeat_command, search_lines
from trainkit.sweeps.table_text import table_lines


def search_of(directory: Path) -> Search:
    """Return the only search in a directory."""
    (search,) = find_searches(collect([directory]))
    return search


def test_completed_paused_and_pruned_trials_are_ranked_together_by_their_best_value(tmp_path: Path) -> None:
    trials = [Made(value=0.5), Made("paused", 1, value=0.3), Made("pruned", 3, value=0.4), Made(value=0.2)]
    table = compare(collect([make_search(tmp_path / "s", trials)]))
    assert [(row.trial.number, row.trial.status, row.trial.epochs) for row in table.rows if row.trial] == [
        (3, "completed", 9),
        (1, "paused", 1),
        (2, "pruned", 3),
        (0, "completed", 9),
    ]
    lines = table_lines(table)
    assert lines[0].split()[0] == "trial"
    assert {"status", "epochs"} <= set(lines[0].split())
    assert lines[-1].startswith("completed, paused and pruned trials are compared by their best epoch")


def test_trials_without_validation_are_ranked_by_the_training_loss_that_they_monitor(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [])  # with monitor.metric=val/loss, the default
    ledger = Ledger(tmp_path / "s")
    for number, loss in enumerate((0.5, 0.3)):
        queued = {"event": "queued", "job": number, "config": f"c{number}", "overrides": [f"lr={loss}"]}
        ledger.append({**queued, "directory": str(number), "trial": number, "repeat": 0})
        history = [{"epoch": 1, "train/loss": loss}]
        make_run(tmp_path / "s" / str(number), "monitor.metric=train/loss", f"lr={loss}", history=history)
        ledger.append({"event": "ended", "job": number, "status": "completed", "epochs": 1})
    search = search_of(tmp_path / "s")
    assert search.metric == "train/loss"
    assert search.best is not None
    assert search.best.number == 1
    assert "best: trial 1, train/loss 0.3000" in search_lines(search)


def test_the_repeats_of_a_trial_are_one_row_with_mean_and_spread(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(value=0.5), Made("pruned", 2, value=0.3)], seeds=3)
    first, second = compare(collect([tmp_path / "s"])).rows
    assert (first.trial.number, first.count, first.seeds, first.trial.status) == (1, 3, [0, 1, 2], "pruned")
    assert first.trial.epochs == 2 * MAX_EPOCHS + 2
    assert first.metrics["val/loss"].mean == pytest.approx((0.3 + 0.31 + 0.32) / 3)
    assert first.metrics["val/loss"].std == pytest.approx(0.01)
    assert (second.trial.number, second.trial.status) == (0, "completed")


def test_two_trials_with_the_same_setting_keep_their_own_rows(tmp_path: Path) -> None:
    trials = [Made(optim="sgd", value=0.1)] * 9  # the width repeats after 8 trials
    rows = compare(collect([make_search(tmp_path / "s", trials)])).rows
    assert sorted(row.trial.number for row in rows if row.trial) == list(range(9))
    assert [row.count for row in rows] == [1] * 9


@pytest.mark.parametrize("status", ["failed", "queued", "stopped"])
def test_a_trial_that_lacks_the_result_of_a_repeat_is_last_and_not_the_best(status: str, tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(status, 2, value=0.1), Made(value=0.5), Made(value=NO_VALUE)], seeds=2)
    table = compare(collect([tmp_path / "s"]))
    assert [row.trial.number for row in table.rows if row.trial] == [1, 2, 0]
    assert table.rows[-1].count == 1
    search = table.searches[0]
    assert [trial.number for trial in search.ranked] == [1]
    assert search.counts == {status: 1, "completed": 2}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_trial_is_that_of_the_first_row(mode: str, tmp_path: Path) -> None:
    make_search(tmp_path / "s", random_trials(20), mode=mode)
    for run in (tmp_path / "s").glob("*/run.json"):
        info = json.loads(run.read_text())
        run.write_text(json.dumps({**info, "best": {**info["best"], "mode": mode}}))
    table = compare(collect([tmp_path / "s"]))
    best = table.searches[0].best
    assert best is not None
    assert best.number == table.rows[0].trial.number
    values = [row.metrics["val/loss"].mean for row in table.rows]
    assert values == sorted(values, reverse=mode == "max")


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_saved_epochs_are_those_that_stopped_trials_did_not_train(seeds: int, tmp_path: Path) -> None:
    trials = [Made(), Made("pruned", 2), Made("paused", 4), Made("failed", 5), Made("queued", 0)]
    make_search(tmp_path / "s", trials, seeds=seeds)
    search = search_of(tmp_path / "s")
    assert search.saved_epochs == (9 - 2) + (9 - 4)
    assert search.full_epochs == 3 * seeds * 9
    lines = search_lines(search)
    assert lines[0] == "search (tpe, asha): 5 trials: 1 completed, 1 pruned, 1 paused, 1 failed, 1 queued"
    assert lines[1] == f"pruning saved 12 of {27 * seeds} epochs ({100 * 12 / (27 * seeds):.0f} %)"


def test_a_search_that_stops_no_trial_saves_nothing_and_says_nothing_of_it(tmp_path: Path) -> None:
    lines = search_lines(search_of(make_search(tmp_path / "s", [Made()], max_epochs=None, pruner=None)))
    assert not any("saved" in line for line in lines)
    assert lines[0] == "search (tpe): 1 trial: 1 completed"


def test_the_command_repeats_the_setting_with_its_seed(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(lr=0.1 + 0.2, optim="adam", value=0.1), Made()])
    path = tmp_path / "s/0/.hydra/overrides.yaml"
    path.write_text(path.read_text() + "- search.trials=40\n- +note='a b'\n")
    search = search_of(tmp_path / "s")
    assert search.best is not None
    words = shlex.split(repeat_command(search, search.best))
    assert words[:4] == ["trainkit", "progress=off", f"lr={0.1 + 0.2!r}", "optim=adam"]
    assert words[-2:] == ["+note='a b'", "seed=0"]
    assert not any("search" in word for word in words)


def test_the_command_repeats_all_seeds_of_a_trial(tmp_path: Path) -> None:
    search = search_of(make_search(tmp_path / "s", [Made()], seeds=3, config_dir="my conf"))
    assert search.best is not None
    words = shlex.split(repeat_command(search, search.best))
    assert (words[1:4], words[-1]) == (["-cd", "my conf", "-m"], "seed=0,1,2")


def test_a_secret_in_the_command_is_named(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made()])
    path = tmp_path / "s/0/.hydra/overrides.yaml"
    path.write_text(path.read_text() + "- logger.wandb.api_key='***'\n")
    assert "*** in the command is a secret that is not in the files: replace it" in search_lines(
        search_of(tmp_path / "s")
    )


def test_a_paused_best_trial_names_the_command_that_goes_on(tmp_path: Path) -> None:
    lines = search_lines(search_of(make_search(tmp_path / "s", [Made("paused", 3, value=0.1), Made()])))
    assert "best: trial 0, val/loss 0.1000 (paused after 3 of 9 epochs)" in lines
    assert f"to train it to the end: trainkit resume {tmp_path / 's/0'}" in lines


def test_each_paused_seed_of_the_best_trial_is_resumed_by_a_command_of_its_own(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made("paused", 3, value=0.1)], seeds=2)
    ledger = Ledger(tmp_path / "s")
    ledger.append({"event": "ended", "job": 0, "status": "paused", "epochs": 3})
    info = tmp_path / "s/0/run.json"
    info.write_text(info.read_text().replace('"completed"', '"stopped"'))
    paths = [tmp_path / "s/0", tmp_path / "s/1"]
    expected = f"to train it to the end: trainkit resume {paths[0]} && trainkit resume {paths[1]}"
    assert expected in search_lines(search_of(tmp_path / "s"))


@pytest.mark.parametrize(
    ("axis", "value", "end"),
    [
        ((1e-4, 1.0, True), 1.9e-4, "lower"),
        ((1e-4, 1.0, True), 2.1e-4, None),
        ((1e-4, 1.0, True), 0.49, None),
        ((1e-4, 1.0, True), 0.51, "upper"),
        ((1e-4, 1.0, True), 1.0, "upper"),
        ((0.01, 0.03, True), 0.017, None),  # a narrow interval has a middle
        ((0.01, 0.03, True), 0.0101, "lower"),
        ((0.0, 1.0, False), 0.5, None),
        ((0.0, 1.0, False), 0.97, "upper"),
        ((0.1, 0.1, False), 0.1, None),
    ],
)
def test_a_value_is_near_an_end_within_a_factor_of_two(axis: tuple[float, float, bool], value: float, end: Any) -> None:
    low, high, log = axis
    assert near_end(SearchAxis("lr", "float", low, high, log=log), value) == end


def test_a_best_learning_rate_at_an_end_asks_for_a_wider_interval_and_names_find_lr(tmp_path: Path) -> None:
    lines = search_lines(search_of(make_search(tmp_path / "a", [Made(lr=0.8)])))
    assert "hint: the best lr, 0.8, is near the upper end of its interval [0.0001, 1]: search a wider interval" in lines
    (command,) = [line for line in lines if "find-lr" in line]
    assert command.endswith("trainkit find-lr progress=off optim=sgd model.hidden=8")
    inside = search_lines(search_of(make_search(tmp_path / "b", [Made(lr=0.01)])))
    assert not any("wider" in line for line in inside)
    without = search_lines(search_of(make_search(tmp_path / "c", [Made()], axes=AXES[1:])))
    assert not any("hint" in line for line in without)


@pytest.mark.parametrize(
    "settings",
    [
        {"axes": None},
        {"axes": [{}, None, {"key": "lr"}, {"key": "lr", "kind": "float", "low": "x", "high": 1}, *AXES]},
        {"max_epochs": -1, "metric": 5, "mode": "best"},
        {"axes": [{"key": "lr", "kind": "float", "low": 1e999, "high": 0}]},
    ],
)
def test_damaged_settings_of_a_search_leave_its_trials_readable(settings: dict[str, Any], tmp_path: Path) -> None:
    search = search_of(make_search(tmp_path / "s", [Made(value=0.2), Made("paused", 1)], **settings))
    assert [trial.number for trial in search.ranked] == [0, 1]
    assert search_lines(search)


def test_a_search_without_its_settings_is_compared(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(value=0.2), Made("paused", 1)])
    path = tmp_path / "s/sweep.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"search"' not in line))
    search = search_of(tmp_path / "s")
    assert (search.metric, search.mode, search.full_epochs) == ("val/loss", "min", 0)
    assert [trial.number for trial in search.ranked] == [0, 1]


def test_a_promoted_trial_has_the_status_of_its_last_attempt(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made("paused", 3)])
    Ledger(tmp_path / "s").append({"event": "started", "job": 0})
    info = tmp_path / "s/0/run.json"
    info.write_text(info.read_text().replace('"stopped"', '"completed"'))
    assert search_of(tmp_path / "s").counts == {"completed": 1}


def test_two_searches_share_a_table(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(value=0.2)])
    make_search(tmp_path / "t", [Made("paused", 1, value=0.1)])
    table = compare(collect([tmp_path]))
    assert [row.trial.number for row in table.rows if row.trial] == [0, 0]  # of two searches
    assert len(table.searches) == 2


def test_grouped_rows_say_that_they_include_stopped_trials(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(), Made("paused", 1), Made("pruned", 1, optim="adam")])
    table = compare(collect([tmp_path / "s"]), group_by=["optim"])
    assert not table.has_trials
    assert "runs in the rows that a search has pruned or paused: 2" in table.notes


def test_trials_that_diverged_are_last_and_counted_in_one_note(tmp_path: Path) -> None:
    trials = [Made(value=NO_VALUE), Made("paused", 1, value=NO_VALUE), Made(value=0.5)]
    table = compare(collect([make_search(tmp_path / "s", trials)]))
    assert [row.trial.number for row in table.rows if row.trial] == [2, 0, 1]
    assert table.notes == ["trials without a finite val/loss: 0, 1"]
    assert [trial.number for trial in table.searches[0].ranked] == [2]


@pytest.mark.parametrize(("sort", "key"), [("trial", lambda t: t.number), ("epochs", lambda t: t.epochs)])
def test_the_columns_of_a_search_can_be_sorted_by(sort: str, key: Any, tmp_path: Path) -> None:
    make_search(tmp_path / "s", random_trials(12))
    for name, reverse in ((sort, False), (f"-{sort}", True)):
        found = [key(row.trial) for row in compare(collect([tmp_path / "s"]), sort=name).rows]
        assert found == sorted(found, reverse=reverse)


def test_the_end_of_a_large_search_shows_its_best_trials_and_where_the_others_are(tmp_path: Path) -> None:
    make_search(tmp_path / "s", random_trials(30))
    lines = comparison_lines(tmp_path / "s")
    assert "… 10 more rows" in lines
    assert f"to see all rows: trainkit compare {tmp_path / 's'}" in lines
    assert len(compare(collect([tmp_path / "s"])).rows) == 30
    assert any(line.startswith("to repeat it: trainkit ") for line in lines)


def test_a_search_without_a_result_says_so(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made("failed", 1)])
    lines = comparison_lines(tmp_path / "s")
    assert lines == ["search (tpe, asha): 1 trial: 1 failed", "no trial has a finite val/loss"]


def test_json_has_the_trial_status_and_epochs_of_each_row_and_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_search(tmp_path / "s", [Made(value=0.2), Made("paused", 3, value=0.1), Made("failed", 1)])
    assert main(["compare", str(tmp_path / "s"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["trial"], row["status"], row["epochs"]) for row in found["rows"]] == [
        (1, "paused", 3),
        (0, "completed", 9),
    ]
    assert [(run["trial"], run["status"]) for run in found["others"]] == [(2, "failed")]
    (search,) = found["searches"]
    assert search["trials"] == {"completed": 1, "paused": 1, "failed": 1}
    assert search["epochs"] == {"trained": 13, "saved": 6, "full": 18}
    assert (search["best"]["trial"], search["best"]["value"]) == (1, 0.1)


@pytest.mark.parametrize("flag", ["--csv", "--markdown", "--latex"])
def test_every_format_has_the_columns_of_a_search(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_search(tmp_path / "s", [Made(value=0.2), Made("paused", 3, value=0.1)])
    assert main(["compare", str(tmp_path / "s"), flag]) == 0
    captured = capsys.readouterr()
    header = next(line for line in captured.out.splitlines() if "trial" in line)
    assert {"status", "epochs"} <= set(header.replace(",", " ").split())
    assert "to repeat it: trainkit" in (captured.out + captured.err).replace("\\", "")


def test_compare_of_a_search_imports_neither_torch_nor_numpy_nor_optuna(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(), Made("paused", 1)])
    heavy = "{'torch', 'numpy', 'hydra', 'omegaconf', 'matplotlib', 'rich', 'optuna'}"
    code = "import sys; from trainkit.cli.main import main; main(['compare', 's']); "
    code += f"assert not {heavy} & {{*sys.modules}}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to repeat it" in done.stdout


@pytest.mark.slow
def test_the_command_of_a_real_search_repeats_its_best_trial_to_the_same_numbers(tmp_path: Path, forks: Forks) -> None:
    words = ["lr=tag(log,interval(1e-3,3))", "optim=sgd,adam", "optim.momentum=interval(0,0.9)", "epochs=9"]
    small = ["model=mlp", "limit_batches=3", "hydra.launcher.n_jobs=1", "hydra.sweep.dir=S", "progress=off"]
    done = forks.run("-m", *small, *words, "search.trials=8", "search.pruner=asha", cwd=tmp_path)
    found = json.loads(forks.run("compare", "S", "--json", cwd=tmp_path).stdout)
    (search,) = found["searches"]
    histories = {int(run.name): Run(run).history for run in (tmp_path / "S").iterdir() if run.name.isdecimal()}
    for row in found["rows"]:
        history = histories[row["trial"]]
        assert row["epochs"] == len(history)
        assert row["metrics"]["val/loss"]["mean"] == min(epoch["val/loss"] for epoch in history)
    trained = sum(map(len, histories.values()))
    assert search["epochs"] == {"trained": trained, "saved": 8 * 9 - trained, "full": 8 * 9}
    best = min(histories, key=lambda number: min(row["val/loss"] for row in histories[number]))
    assert search["best"]["trial"] == best
    command = search["best"]["command"]
    assert f"to repeat it: {command}" in done.stdout
    forks.run(*shlex.split(command)[1:], "hydra.run.dir=R", cwd=tmp_path)
    losses = [row["val/loss"] for row in Run(tmp_path / "R").history]
    assert len(losses) == 9
    assert losses[: len(histories[best])] == [row["val/loss"] for row in histories[best]]
    facts = sweep_facts(tmp_path / "S").searches[0]
    assert facts.steps[-1] == (trained, search["best"]["value"])
