"""`init_from`: the weights that a run starts from, and each way in which they may not fit the model."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainkit
from tests.helpers import SmallCNN, compose_settings, small_run
from trainkit.core.errors import CheckpointError, ConfigError, Problem, TrainkitError
from trainkit.engine.warm_start import WarmStart, prepare_warm_start
from trainkit.training.weights import match_weights, patterns_for

State = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with an average; its best epoch is not its last."""
    directory = tmp_path_factory.mktemp("runs") / "base"
    own = ["epochs=2", "lr=0.05", "ema=0.5", "monitor.metric=train/loss", "monitor.mode=min"]
    trainkit.train(trainkit.compose(small_run(SmallCNN, *own)), directory=directory)
    return directory


def start_from(path: Path | str, *more: str, model: nn.Module | None = None) -> tuple[nn.Module, WarmStart]:
    """Load the weights into a new model."""
    _, warm_start = prepare_warm_start(compose_settings([f"init_from='{path}'", *more]))
    assert warm_start is not None
    model = model or SmallCNN()
    warm_start(model)
    return model, warm_start


def assert_equal_weights(model: nn.Module, weights: State) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


# ---------------------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_a_run_gives_the_average_of_its_best_or_last_checkpoint(checkpoint: str, base: Path) -> None:
    model, warm_start = start_from(base, f"init_from.checkpoint={checkpoint}")
    assert_equal_weights(model, trainkit.load(base, checkpoint).state_dict())
    assert warm_start.notes[0].endswith(": 6 tensors loaded")
    assert warm_start.notes[1] == "  the weights are the moving average of the run"
    assert (
        warm_start.facts["sha256"]
        in (base / "checkpoints" / warm_start.facts["checkpoint"] / "manifest.json").read_text()
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_weights_is_loaded(suffix: str, tmp_path: Path) -> None:
    weights, path = SmallCNN().state_dict(), tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(weights, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    assert_equal_weights(start_from(path)[0], weights)


def test_last_is_the_newest_run_and_stays_that_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    Path("outputs/latest").symlink_to(base)
    settings, _ = prepare_warm_start(compose_settings(["init_from=last"]))
    assert settings.init_from is not None
    assert settings.init_from.path == settings.source.init_from.path == str(base.resolve())


def test_a_run_trains_from_the_weights_and_draws_the_random_numbers_of_any_other_run(
    base: Path, tmp_path: Path
) -> None:
    class Record:
        def on_start(self, state: Any) -> None:
            records.append(({k: v.clone() for k, v in state.model.state_dict().items()}, torch.get_rng_state()))

    records: list[tuple[State, Tensor]] = []
    for number, more in enumerate(([], [f"init_from={base}"])):
        config = trainkit.compose(small_run(SmallCNN, *more))
        from trainkit.build.session import build_session
        from trainkit.config.settings import read_settings

        settings, warm_start = prepare_warm_start(read_settings(config))
        Record().on_start(build_session(settings, initialize=warm_start).state)
        assert number == len(records) - 1
    assert not torch.equal(records[0][0]["head.weight"], records[1][0]["head.weight"])
    assert torch.equal(records[0][1], records[1][1])
    run = trainkit.train(trainkit.compose(small_run(SmallCNN, f"init_from={base}")), directory=tmp_path / "run")
    assert run.info["init_from"]["loaded"] == 6
    assert "6 tensors loaded" in (tmp_path / "run" / "trainkit.log").read_text()


# ------------------------------------------------------------------------------------ ten kinds of mismatch


def without_head(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def wider_head(state: State) -> State:
    return state | {"head.weight": torch.zeros(12, 512), "head.bias": torch.zeros(12)}


@pytest.mark.parametrize(
    ("change", "rows", "override"),
    [
        (without_head, ["head.bias", "missing", "10"], r"init_from.missing=[head\..*]"),
        (
            lambda s: s | {"aux.weight": torch.ones(3)},
            ["aux.weight", "unexpected", "3"],
            r"init_from.unexpected=[aux\..*]",
        ),
        (wider_head, ["head.weight", "other shape", "12x512", "10x512"], r"init_from.missing=[head\..*]"),
        (
            lambda s: s | {"head.bias": torch.zeros(10).long()},
            ["other dtype", "10 int64"],
            r"init_from.missing=[head\..*]",
        ),
        (
            lambda s: s | {"head.bias": torch.zeros(10).to_sparse()},
            ["other layout", "10 sparse_coo", "10 strided"],
            r"init_from.missing=[head\..*]",
        ),
        (
            lambda s: s | {"head.bias": torch.zeros(10, device="meta")},
            ["other layout", "10 meta"],
            r"init_from.missing=[head\..*]",
        ),
        (
            lambda s: {f"net.{name}" if "conv" in name else name: value for name, value in s.items()},
            ["net.conv.bias", "2 more names match without the prefix 'net.' of the weights"],
            r"init_from.missing=[conv\..*]",
        ),
    ],
    ids=["missing", "unexpected", "other shape", "other dtype", "sparse", "no values", "unknown prefix"],
)
def test_a_mismatch_is_an_error_with_a_table_and_the_override_that_allows_it(
    change: Callable[[State], State], rows: list[str], override: str, tmp_path: Path
) -> None:
    state, path = SmallCNN().state_dict(), tmp_path / "weights.pt"
    torch.save(change(dict(state)), path)
    with pytest.raises(ConfigError) as caught:
        start_from(path)
    text = str(caught.value)
    assert all(word in text for word in ["the weights do not match the model", "in the weights", override, *rows]), text
    written = caught.value.problems[-1].hint.partition("write ")[2].replace("'", "").split()
    model, warm_start = start_from(path, *written)
    assert any(line.startswith("tensor ") and "difference" in line for line in warm_start.notes)
    fitting = match_weights(SmallCNN(), change(dict(state))).found
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in fitting)


@pytest.mark.parametrize("patterns", [[], ["init_from.missing=[.*]", "init_from.unexpected=[.*]"]])
@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: f"net.{name}", "6 more names match without the prefix 'net.' of the weights"),
        (lambda name: f"other_{name}", "0 tensors of the model match"),
    ],
)
def test_weights_of_which_nothing_fits_are_refused_whatever_is_allowed(
    rename: Callable[[str], str], words: str, patterns: list[str], tmp_path: Path
) -> None:
    torch.save({rename(name): value for name, value in SmallCNN().state_dict().items()}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError) as caught:
        start_from(tmp_path / "weights.pt", *patterns)
    (problem,) = caught.value.problems
    assert words in problem.cause
    assert problem.hint == "write the path of other weights, or init_from=off"


def test_a_prefix_that_the_weights_lack_is_named(tmp_path: Path) -> None:
    torch.save(SmallCNN().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"6 more names match with the prefix 'backbone\.' of the model"):
        start_from(tmp_path / "weights.pt", model=nn.ModuleDict({"backbone": SmallCNN(), "last": nn.Linear(2, 2)}))


def test_weights_with_nan_are_named(tmp_path: Path) -> None:
    state = dict(SmallCNN().state_dict())
    torch.save(state | {"head.bias": torch.full((10,), torch.nan)}, tmp_path / "weights.pt")
    assert "  note: NaN is in head.bias" in start_from(tmp_path / "weights.pt")[1].notes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_removed(prefix: str, tmp_path: Path) -> None:
    state = SmallCNN().state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "weights.pt")
    model, warm_start = start_from(tmp_path / "weights.pt")
    assert_equal_weights(model, state)
    assert any("of all names is removed" in note for note in warm_start.notes)


@pytest.mark.parametrize("nest", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}])
def test_the_weights_inside_a_checkpoint_of_another_tool_are_found(
    nest: Callable[[State], Any], tmp_path: Path
) -> None:
    state = SmallCNN().state_dict()
    torch.save(nest(dict(state)), tmp_path / "weights.pt")
    model, warm_start = start_from(tmp_path / "weights.pt")
    assert_equal_weights(model, state)
    assert any("'state_dict' of the file" in note for note in warm_start.notes)


def test_another_precision_is_converted_and_reported(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in SmallCNN().state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    model, warm_start = start_from(tmp_path / "weights.pt")
    assert_equal_weights(model, {name: value.float() for name, value in state.items()})
    assert "  6 of the tensors have another precision, and are converted" in warm_start.notes


class Pickled:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def write_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(path))


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("write", "words", "code"),
    [
        (lambda _: None, "there is no such file", 2),
        (write_nothing, "is empty", 3),
        (lambda path: path.write_bytes(b"PK\3\4" + b"?" * 300), "is damaged", 3),
        (lambda path: path.write_text("weights"), "is damaged, or torch did not save it", 3),
        (lambda path: torch.save(torch.ones(3), path), "holds a Tensor, expected a state dict", 3),
        (lambda path: torch.save({}, path), "it is empty", 3),
        (lambda path: torch.save({"epoch": 3}, path), "'epoch' is of type int", 3),
        (lambda path: torch.save({"weight": Pickled()}, path), "holds a pickle of posix.system", 3),
        (lambda path: torch.save(nn.Linear(2, 2), path), "holds a pickle of torch.nn.modules.linear.Linear", 3),
        (os.mkfifo, "cannot be read: not a regular file", 3),
        (Path.mkdir, "does not hold a run", 2),
        (write_script, "is a TorchScript archive", 3),
        (
            lambda path: path.write_bytes((20).to_bytes(8, "little") + b'{"a":1}' + b"?" * 80),
            "not a file of torch.save",
            3,
        ),
    ],
    ids=[
        *("missing", "empty", "damaged", "text", "tensor", "no entry", "numbers", "pickle", "model", "pipe", "folder"),
        *("script", "safetensors"),
    ],
)
def test_a_file_without_weights_is_refused(write: Callable[[Path], Any], words: str, code: int, here: Path) -> None:
    write(here / "weights.pt")
    with pytest.raises(TrainkitError) as caught:
        start_from(here / "weights.pt")
    assert words in str(caught.value)
    assert caught.value.exit_code == code
    assert caught.value.problems[0].hint
    assert caught.value.problems[0].cause.startswith("init_from=")
    assert not (here / "executed").exists()


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "weights.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match="is damaged"):
        start_from(tmp_path / "weights.safetensors")
    torch.save(SmallCNN().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"name the file \*\.pt"):
        start_from(tmp_path / "weights.safetensors")


def refusal_of(path: Path, *overrides: str) -> Problem:
    """Return the problem of weights that cannot be read."""
    with pytest.raises(CheckpointError) as caught:
        start_from(path, *overrides)
    (problem,) = caught.value.problems
    assert problem.cause.startswith(f"init_from={path}: ")
    return problem


def test_a_damaged_run_is_refused_with_the_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    config = trainkit.compose(small_run(SmallCNN, "epochs=3", "checkpoint.keep=3"))
    checkpoints = trainkit.train(config, directory=tmp_path / "run").directory / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("step-*"))
    (checkpoints / "best").write_text(names[0])
    (checkpoints / names[0] / "state.pt").write_bytes(b"damaged")
    damaged = refusal_of(tmp_path / "run")
    assert "state.pt has 7 bytes" in damaged.cause
    assert damaged.hint == "write init_from.checkpoint=last"
    start_from(tmp_path / "run", "init_from.checkpoint=last")
    (checkpoints / "best").unlink()
    assert "has no best checkpoint" in refusal_of(tmp_path / "run").cause
    (checkpoints / names[-1] / "state.pt").write_bytes(b"damaged")
    hint = refusal_of(tmp_path / "run", "init_from.checkpoint=last").hint
    start_from(Path(hint.removeprefix("write init_from=")))
    for name in names:
        (checkpoints / name / "state.pt").write_bytes(b"damaged")
    assert refusal_of(tmp_path / "run").hint.startswith("start from another run")


def test_last_is_refused_if_it_is_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs/latest").mkdir(parents=True)
    Path("outputs/latest/sweep.jsonl").touch()
    with pytest.raises(ConfigError, match="init_from=last: the newest is a sweep, outputs/latest"):
        prepare_warm_start(compose_settings(["init_from=last"]))


def test_the_override_for_adapters_and_a_new_head_allows_no_other_tensor() -> None:
    names = [f"{layer}.parametrizations.weight.0.{part}" for layer in ("a", "b.c") for part in ("up", "down")]
    assert patterns_for([*names, "fc.bias", "fc.weight"]) == [r"fc\..*", r".*\.parametrizations\..*"]


@pytest.mark.parametrize("part", ["checkpoints", "checkpoints/{best}"])
def test_a_part_of_a_run_names_the_run(part: str, base: Path) -> None:
    directory = base / part.format(best=(base / "checkpoints" / "best").read_text().strip())
    with pytest.raises(ConfigError) as caught:
        start_from(directory)
    assert caught.value.problems[0].hint == f"it is a part of the run {base}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["init_from.missing=[hed.*]"], ["no missing tensor", "matches the pattern hed.*", "remove the pattern"]),
        (["init_from.unexpected=[head.*]"], ["no unexpected tensor", "matches the pattern head.*"]),
        (["init_from.missing=['a(']"], ["'a(' is not a valid regular expression"]),
        (
            ["init_from.path=off", "init_from.missing=[a]"],
            ["there are no weights to start from", "init_from.path=PATH"],
        ),
        (["init_from.path=''"], ["init_from: the path is empty", "init_from=off"]),
        (["init_from.checkpoint=newest"], ["init_from.checkpoint=newest: must be best or last"]),
    ],
)
def test_a_wrong_pattern_or_key_is_an_error(overrides: list[str], words: list[str], base: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        start_from(base, *overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# -------------------------------------------------------------------------------------------- special models


def test_one_name_of_a_tied_tensor_is_enough() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    match = match_weights(Tied(), {"embed.weight": torch.ones(5, 3)})
    assert (list(match.found), match.mismatches) == (["embed.weight"], [])


def test_a_plain_weight_is_the_original_of_a_parametrized_weight() -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    match = match_weights(model, nn.Linear(3, 2).state_dict())
    assert {item.name for item in match.mismatches} == {"parametrizations.weight.0._u", "parametrizations.weight.0._v"}
    assert set(match.found) == {"bias", "parametrizations.weight.original"}


# -------------------------------------------------------------------------------------------- with resume


def test_a_resumed_run_does_not_read_the_weights_again_and_refuses_others(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(SmallCNN().state_dict(), weights)
    run = trainkit.train(trainkit.compose(small_run(SmallCNN, f"init_from={weights}")), directory=tmp_path / "run")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"init_from\.path"):
        trainkit.resume(run, ["epochs=2", f"init_from.path={tmp_path / 'other.pt'}"])
    assert len(trainkit.resume(run, ["epochs=2"]).history) == 2
    facts = json.loads((run.directory / "run.json").read_text())["init_from"]
    assert facts["path"] == str(weights)
