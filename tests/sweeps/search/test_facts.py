"""The report of a search: the numbers of its charts, and the importance of its keys."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.sweeps.made_searches import AXES, MAX_EPOCHS, NO_VALUE, Made, make_search, random_trials
from trainkit.display.search_report import SearchFacts
from trainkit.display.sweep_report import sweep_page
from trainkit.runs.directory import Run
from trainkit.sweeps.collect import collect
from trainkit.sweeps.ledger import Ledger
from trainkit.sweeps.report import sweep_facts, write_sweep_report
from trainkit.sweeps.search.facts import search_facts
from trainkit.sweeps.search.importance import importance
from trainkit.sweeps.search.results import Search, find_searches


def search_of(directory: Path) -> Search:
    """Return the only search in a directory."""
    (search,) = find_searches(collect([directory]))
    return search


def facts_of(directory: Path) -> SearchFacts:
    """Return what the report shows of the only search in a directory."""
    return search_facts(search_of(directory))


def best_at(facts: SearchFacts, epochs: int) -> float | None:
    """Return the best value after so many epochs of all trials."""
    found = [value for total, value in facts.steps if total <= epochs]
    return found[-1] if found else None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_value_by_epochs_equals_the_running_best_of_all_epochs_in_order(mode: str, tmp_path: Path) -> None:
    make_search(tmp_path / "s", random_trials(12), mode=mode)
    facts = facts_of(tmp_path / "s")
    values = [row["val/loss"] for number in range(12) for row in Run(tmp_path / "s" / str(number)).history]
    for epochs in range(1, len(values) + 1):
        assert best_at(facts, epochs) == (min if mode == "min" else max)(values[:epochs])
    assert facts.steps[-1][0] == len(values)


def test_a_promoted_trial_counts_its_epochs_when_they_were_trained(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(value=0.1), Made("paused", 3, value=0.5)])
    path = tmp_path / "s/sweep.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (end,) = [line for line in lines if line["event"] == "ended" and line["job"] == 0]
    pause = {**end, "status": "paused", "epochs": 2}
    others = [line for line in lines if line is not end]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in [*others[:4], pause, *others[4:], end]))
    facts = facts_of(tmp_path / "s")
    first = [row["val/loss"] for row in Run(tmp_path / "s/0").history]
    second = [row["val/loss"] for row in Run(tmp_path / "s/1").history]
    values = first[:2] + second + first[2:]
    assert [best_at(facts, total) for total in range(1, 13)] == [min(values[:total]) for total in range(1, 13)]


def test_a_trial_of_several_seeds_has_a_value_as_soon_as_each_seed_has_one(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(value=0.5)], seeds=2)
    facts = facts_of(tmp_path / "s")
    assert facts.steps[0][0] == MAX_EPOCHS + 1
    assert facts.steps[-1][0] == 2 * MAX_EPOCHS
    assert facts.steps[-1][1] == pytest.approx((0.5 + 0.51) / 2)
    assert len(facts.trials[0].curves) == 2


def test_a_ledger_without_epochs_counts_the_epochs_of_the_histories(tmp_path: Path) -> None:
    make_search(tmp_path / "s", random_trials(5))
    before = facts_of(tmp_path / "s").steps
    path = tmp_path / "s/sweep.jsonl"
    path.write_text(path.read_text().replace('"epochs"', '"other"'))
    assert facts_of(tmp_path / "s").steps == before


def test_the_trials_are_best_first_with_their_sampled_values(tmp_path: Path) -> None:
    made = [Made(lr=0.5, value=0.5), Made("pruned", 2, 0.25, "adam", 0.3), Made("failed", 1), Made(value=NO_VALUE)]
    facts = facts_of(make_search(tmp_path / "s", made))
    assert [(trial.number, trial.value) for trial in facts.trials] == [(1, 0.3), (0, 0.5), (2, None), (3, None)]
    assert facts.trials[0].values == {"lr": 0.25, "optim": "adam", "model.hidden": 16.0}
    assert [(key.name, key.log) for key in facts.keys] == [("lr", True), ("optim", False), ("model.hidden", False)]
    assert facts.saved == ("26 %", "7 of 27")


def test_the_key_that_decides_is_the_most_important(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    shares, note = importance(search_of(make_search(tmp_path / "s", random_trials(60))))
    assert set(shares) == {"lr", "optim", "model.hidden"}
    assert max(shares, key=lambda key: shares[key]) == "lr"
    assert sum(shares.values()) == pytest.approx(1)
    assert "PED-ANOVA" in note


def test_the_importance_of_a_maximum_is_that_of_the_negated_minimum(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trials = random_trials(40)
    lowest = importance(search_of(make_search(tmp_path / "a", trials)))
    negated = [made._replace(value=-made.value) for made in trials]
    make_search(tmp_path / "b", negated, mode="max")
    for run in (tmp_path / "b").glob("*/run.json"):
        info = json.loads(run.read_text())
        value = -trials[int(run.parent.name)].value
        run.write_text(json.dumps({**info, "best": {**info["best"], "value": value, "val/loss": value, "mode": "max"}}))
    assert importance(search_of(tmp_path / "b")) == lowest


def test_a_key_that_some_trials_lack_is_left_out_and_named(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    axes = [*AXES, {"key": "optim.momentum", "kind": "float", "low": 0.0, "high": 0.9, "log": False}]
    shares, note = importance(search_of(make_search(tmp_path / "s", random_trials(20), axes=axes)))
    assert "optim.momentum" not in shares
    assert "lr" in shares
    assert "because some trials lack them: optim.momentum" in note


def test_without_optuna_the_report_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    shares, note = importance(search_of(make_search(tmp_path / "s", random_trials(20))))
    assert shares == {}
    assert "pip install 'trainkit[search]'" in note


def test_an_error_of_optuna_leaves_the_report_without_importance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("odd trials")

    monkeypatch.setattr("trainkit.sweeps.search.importance._evaluate", fail)
    facts = facts_of(make_search(tmp_path / "s", random_trials(20)))
    assert facts.importance == {}
    assert facts.importance_note.endswith("cannot be computed: AssertionError: odd trials")
    assert len(facts.trials) == 20


def test_keys_with_a_single_value_have_no_importance(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    axes = [AXES[0], {"key": "seed", "kind": "int", "low": 0, "high": 0, "log": False}]
    axes += [{"key": "progress", "kind": "choice", "choices": ["off"]}]
    shares, note = importance(search_of(make_search(tmp_path / "s", random_trials(20), axes=axes)))
    assert max(shares, key=lambda key: shares[key]) == "lr", note
    assert shares["lr"] == pytest.approx(1)


@pytest.mark.parametrize("number", [1, 3])
def test_a_few_trials_have_no_importance(number: int, tmp_path: Path) -> None:
    shares, note = importance(search_of(make_search(tmp_path / "s", random_trials(number))))
    assert shares == {}
    assert f"there are {number}" in note


def test_equal_values_of_all_trials_are_no_error(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = search_of(make_search(tmp_path / "s", [Made(lr=0.001 * 1.3**n, value=0.5) for n in range(20)]))
    shares, note = importance(search)
    assert note
    assert all(0 <= share <= 1 for share in shares.values())


def test_the_report_of_a_search_has_its_sections_and_no_failure(tmp_path: Path) -> None:
    text = write_sweep_report(make_search(tmp_path / "s", random_trials(12))).read_text()
    for heading in ("Search", "Trials", "Sampled keys", "Comparison", "Learning curves"):
        assert f"<h2>{heading}</h2>" in text
    assert "<h2>Failures</h2>" not in text
    assert text.count('<svg class="chart"') == 3 + 3 + 1 + 1 + 2  # time, keys, importance, parallel, learning curves
    assert "trainkit progress=off lr=" in text
    assert 'class="paused"' in text


@pytest.mark.usefixtures("no_drawing")
def test_the_headline_has_the_mean_of_the_best_trial_and_not_its_best_seed(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [Made(value=0.5), Made("pruned", 2, value=0.3)], seeds=2)
    text = sweep_page(sweep_facts(tmp_path / "s"))
    assert "<dt>best val/loss</dt><dd>0.3050</dd><dd>trial 1 lr=0.01" in text
    assert "<dt>trials completed</dt><dd>1 of 2</dd><dd>1 pruned</dd>" in text
    assert "<dt>epochs saved by pruning</dt><dd>19 %</dd><dd>7 of 36</dd>" in text


@pytest.mark.usefixtures("no_drawing")
def test_a_search_with_damaged_runs_has_a_report(tmp_path: Path) -> None:
    make_search(tmp_path / "s", [*random_trials(9), Made("queued"), Made("failed", 1)])
    (tmp_path / "s/0/run.json").write_text("{")
    (tmp_path / "s/1/history.jsonl").write_text('{"epoch": 1e999}\n{"epoch": 1, "val/loss": "x"}\n')
    (tmp_path / "s/2/.hydra/config.yaml").unlink()
    Ledger(tmp_path / "s").append({"event": "ended", "job": 3, "status": "paused", "epochs": 2**60})
    facts = sweep_facts(tmp_path / "s")
    assert "</html>" in sweep_page(facts)
    assert [trial.status for trial in facts.searches[0].trials].count("unreadable") == 2


@pytest.mark.slow
def test_the_report_of_two_hundred_trials_stays_small(tmp_path: Path) -> None:
    report = write_sweep_report(make_search(tmp_path / "s", random_trials(200)))
    assert report.stat().st_size < 1_500_000
    text = report.read_text()
    assert text.count("<li>") < 60  # the legends do not list each trial
