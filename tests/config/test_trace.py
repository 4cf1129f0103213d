"""Where the values of a config come from: `trainkit why`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from trainkit.config.compose import compose
from trainkit.config.explain import explain, explain_differences
from trainkit.config.origin import ABSENT
from trainkit.config.search_path import CONF
from trainkit.config.trace import Trace, trace
from trainkit.core.errors import ConfigError
from trainkit.core.leaves import leaves

FILES = {
    "conf/data/mine.yaml": """
        # digits, with other values
        defaults:
          - digits
          - _self_
        split: 0.3
        augment: {flip: random,
                  cutout: 4}
        """,
    "conf/optim/mine.yaml": """
        # @package _global_
        lr: 0.5
        optim:
          _target_: torch.optim.SGD
          lr: ${half}
          momentum: ${oc.env:MOMENTUM,0.9}
        half: ${lr}
        """,
    "extra/model/other.yaml": """
        _target_: trainkit.models.MLP
        hidden: [3]
        num_classes: ${data.classes}
        """,
    "conf/experiment/base.yaml": """
        # @package _global_
        defaults:
          - override /optim: adam
          - override /loss: mse
        limit_batches: 3
        seed: 1
        """,
    "conf/experiment/mine.yaml": """
        # @package _global_
        defaults:
          - base
          - override /data: mine
          - override /optim: mine
          - _self_
        seed: 2
        data:
          split: 0.4
        monitor: &monitor
          metric: train/loss
        hydra: {sweeper: {params: {clip_norm: "1,2"}}}
        """,
}


@pytest.fixture
def project(here: Path) -> Path:
    """A folder with the user's configs."""
    for name, text in FILES.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [line[8:] for line in text.splitlines()[1:]]
        (here / name).write_text("\n".join(lines))
    return here


def history(found: Trace, key: str) -> list[tuple[Any, str]]:
    """Return the values and the origins of a key."""
    return [(event.value, str(event.origin)) for event in found.histories[key]]


def line_of(name: str, start: str) -> str:
    """Return FILE:LINE of the only line of a shipped or own config that starts with a text."""
    file = CONF / name if (CONF / name).is_file() else Path(name)
    [line] = [n for n, text in enumerate(file.read_text().splitlines(), 1) if text.lstrip().startswith(start)]
    return f"shipped {name}:{line}" if file.is_relative_to(CONF) else f"{name}:{line}"


MINE = ["experiment=mine", "model=other", "lr=0.1", "+data.train.keep=[1,2]", "~data.augment.cutout", "steps=9"]
CHOSEN = "experiment=mine on the command line"


@pytest.mark.usefixtures("project")
def test_fifteen_keys_come_from_where_they_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMENTUM", "0.8")
    found = trace(MINE, "extra")
    base = f"conf/experiment/mine.yaml:{3}"
    own_data = f"data=mine by {line_of('conf/experiment/mine.yaml', '- override /data')}"
    own_optim = f"optim=mine by {line_of('conf/experiment/mine.yaml', '- override /optim')}"
    off, same = "trainkit: off, false and null mean the same", "shipped config.yaml"
    expected = {
        # the default of config.yaml, and what trainkit makes of it
        "batch_size": [(32, line_of("config.yaml", "batch_size"))],
        "clip_norm": [(False, line_of("config.yaml", "clip_norm")), (None, off)],
        # a group's file
        "loss.reduction": [
            ("mean", f"{line_of('loss/mse.yaml', 'reduction')} (loss=mse by conf/experiment/base.yaml:4)")
        ],
        # a file that another file includes, and the file itself
        "data.train._target_": [
            ("trainkit.data.digits", f"{line_of('data/digits.yaml', '_target_')} (included by conf/data/mine.yaml:3)")
        ],
        "data.augment.flip": [
            (False, line_of("config.yaml", "flip")),
            ("random", f"{line_of('conf/data/mine.yaml', 'augment')} ({own_data})"),
        ],
        # three files and an experiment, which includes another
        "data.split": [
            (False, line_of("config.yaml", "split")),
            ("${without_folds:0.2}", f"{line_of('data/digits.yaml', 'split')} (included by conf/data/mine.yaml:3)"),
            (0.3, f"{line_of('conf/data/mine.yaml', 'split')} ({own_data})"),
            (0.4, f"{line_of('conf/experiment/mine.yaml', 'split')} ({CHOSEN})"),
        ],
        "seed": [
            (0, next(text for _, text in history(found, "seed") if text.startswith(same))),
            (1, f"{line_of('conf/experiment/base.yaml', 'seed')} (included by {base})"),
            (2, f"{line_of('conf/experiment/mine.yaml', 'seed')} ({CHOSEN})"),
        ],
        "epochs": [
            (20, line_of("config.yaml", "epochs: 20")),
            (None, "trainkit: steps is given instead"),
        ],
        "monitor.metric": [
            ("val/loss", line_of("config.yaml", "metric: ")),
            ("train/loss", f"{line_of('conf/experiment/mine.yaml', 'metric')} ({CHOSEN})"),
        ],
        # the command line, and the folder that it adds
        "lr": [
            (None, line_of("config.yaml", "lr: ")),
            (0.5, f"conf/optim/mine.yaml:2 ({own_optim})"),
            (0.1, "command line: lr=0.1"),
        ],
        "model.hidden": [([3], "extra/model/other.yaml:2 (model=other on the command line)")],
        "steps": [(False, line_of("config.yaml", "steps: ")), (9, "command line: steps=9")],
        "data.train.keep": [([1, 2], "command line: +data.train.keep=[1,2]")],
        "data.augment.cutout": [
            (False, line_of("config.yaml", "cutout")),
            (4, f"conf/data/mine.yaml:7 ({own_data})"),
            (ABSENT, "command line: ~data.augment.cutout"),
        ],
        # interpolations
        "optim.lr": [("${half}", f"conf/optim/mine.yaml:5 ({own_optim})")],
        "optim.momentum": [("${oc.env:MOMENTUM,0.9}", f"conf/optim/mine.yaml:6 ({own_optim})")],
    }
    assert found.error is not None  # nothing refers to the key `half`, and a part of data.augment is missing
    assert {key: history(found, key) for key in expected if key not in ("clip_norm", "epochs")} == {
        key: events for key, events in expected.items() if key not in ("clip_norm", "epochs")
    }
    valid = trace([text for text in MINE if not text.startswith("~")], "extra")
    assert valid.error is None, valid.error
    assert {key: history(valid, key) for key in ("clip_norm", "epochs")} == {
        key: expected[key] for key in ("clip_norm", "epochs")
    }

    lr = explain(found, "optim.lr")
    assert lr["value"] == 0.1
    assert [source["key"] for source in lr["sources"]] == ["half"]
    assert [source["key"] for source in lr["sources"][0]["sources"]] == ["lr"]
    momentum = explain(found, "optim.momentum")
    assert momentum["sources"] == [{"variable": "MOMENTUM", "value": "0.8", "note": "set"}]
    sweep = explain(found, "clip_norm")["sweep"]
    assert (sweep["value"], sweep["origin"]["line"]) == ("1,2", 12)


@pytest.mark.usefixtures("project")
def test_a_group_names_who_chose_what_and_the_last_counts() -> None:
    found = trace(MINE, "extra")
    chosen = {
        group: [(event.value, str(event.origin)) for event in found.choices[group]]
        for group in ("optim", "loss", "model", "scheduler")
    }
    assert chosen == {
        "optim": [
            ("sgd", line_of("config.yaml", "- optim")),
            ("adam", "conf/experiment/base.yaml:3"),
            ("mine", "conf/experiment/mine.yaml:5"),
        ],
        "loss": [("cross_entropy", line_of("config.yaml", "- loss")), ("mse", "conf/experiment/base.yaml:4")],
        "model": [("toy_cnn", line_of("config.yaml", "- model")), ("other", "command line: model=other")],
        "scheduler": [("none", line_of("config.yaml", "- scheduler"))],
    }
    for group, events in found.choices.items():
        assert str(found.hydra.runtime.choices[group]) == str(events[-1].value), group


CONFIGS: list[list[str]] = [
    [],
    ["optim=adam", "scheduler=cosine", "data.augment.flip=random", "hooks={}", "logger=wandb", "seed=0", "seed=3"],
    ["experiment=cifar10_batch1", "lr=0.3", "param_groups=no_decay", "+param_groups.norms.lr=0.1"],
    ["experiment=lora", "init_from=/runs/a", "checkpoint=off", "early_stop.patience=3"],
    ["experiment=dcgan", "++optim.generator.betas=[0.5,0.9]"],
    ["experiment=vae", "evaluation_step=off", "+metrics.mse._target_=trainkit.metrics.MSE"],
    [
        "optim=torch.optim.AdamW",
        "optim.weight_decay=0.1",
        "metrics=classification",
        "monitor.metric=val/f1",
        "monitor.mode=max",
        "data.train._target_=trainkit.data.line",
    ],
    [
        "optim._target_=torch.optim.AdamW",
        "model={_target_: trainkit.models.MLP, hidden: [4]}",
        "init_from=/runs/a",
        "init_from.checkpoint=last",
        "loss=mse",
        "report=on",
    ],
]


@pytest.mark.parametrize("overrides", CONFIGS, ids=" ".join)
def test_the_last_origin_of_every_key_gives_the_composed_value(overrides: list[str]) -> None:
    found = trace(overrides)
    assert found.error is None
    assert_consistent(found, overrides, None)


@pytest.mark.usefixtures("project")
def test_the_last_origin_of_every_key_of_a_users_config_gives_the_composed_value() -> None:
    overrides = ["experiment=mine", "model=other", "lr=0.1", "+data.train.keep=[1,2]", "steps=9"]
    assert_consistent(trace(overrides, "extra"), overrides, "extra")


def assert_consistent(found: Trace, overrides: Sequence[str], config_dir: str | None) -> None:
    """Check that the last event of each key has the composed value, and that its file or override gives this value."""
    composed = dict(leaves(OmegaConf.to_container(compose(overrides, config_dir), resolve=False)))
    last = {key: events[-1] for key, events in found.histories.items() if not key.startswith("hydra.")}
    assert {key: repr(event.value) for key, event in last.items() if event.value is not ABSENT} == {
        key: repr(value) for key, value in composed.items()
    }
    for key, event in last.items():
        if any(name.startswith(f"{key}.") for name in composed):  # it was a value before it became a mapping
            continue
        origin = event.origin
        if origin.file is not None:
            assert origin.line is not None, key
            content = OmegaConf.to_container(OmegaConf.load(origin.file), resolve=False)
            parts = key.split(".")
            suffixes = [".".join(parts[start:]) for start in range(len(parts))]
            given = dict(leaves(content))
            own = next((name for name in suffixes if name in given), None)
            text = origin.file.read_text().splitlines()[origin.line - 1]
            if content == {}:  # the file is the value
                assert event.value == {}, key
            elif own is None:  # a value for a key that contains this key has removed it
                assert event.value is ABSENT, key
                assert any(f"{part}:" in text for part in parts), key
            else:
                assert repr(given[own]) == repr(event.value), key
                assert any(f"{part}:" in text for part in own.split(".")), (key, text)
        elif origin.by == "command line":
            parsed = OverridesParser.create().parse_override(origin.text)
            values = dict(leaves({parsed.key_or_group: parsed.value()}))
            assert origin.text in overrides
            assert event.value is ABSENT or repr(values[key if key in values else parsed.key_or_group]) == repr(
                event.value
            )
        elif origin.by == "trainkit":
            assert origin.text != "normalized", key
        else:
            assert origin.by == "dotted path", key


def test_a_replaced_target_is_named_for_each_argument_that_it_drops() -> None:
    found = trace(["optim._target_=torch.optim.AdamW"])
    [*_, momentum], [*_, lr] = found.histories["optim.momentum"], found.histories["lr"]
    reason = "belongs to the _target_ that optim._target_=torch.optim.AdamW replaces"
    assert (momentum.value, momentum.origin.text) == (ABSENT, reason)
    assert (lr.value, lr.origin.text) == (None, reason)


def test_a_mapping_shows_its_keys_and_a_group_its_choice_too() -> None:
    answer = explain(trace(["optim=adam"]), "optim")
    assert answer["choice"] == "adam"
    assert {row["key"] for row in answer["keys"]} == {key for key in trace(["optim=adam"]).histories if "optim." in key}


def test_an_item_of_a_list_is_explained_by_the_list() -> None:
    answer = explain(trace(["watch=[a,b]"]), "watch[1]")
    assert answer["value"] == "b"
    assert answer["history"][-1]["origin"]["text"] == "command line: watch=[a,b]"


@pytest.mark.parametrize(("key", "near"), [("optm.lr", "optim.lr"), ("epoch", "epochs"), ("modle", "model")])
def test_a_misspelt_key_suggests_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        explain(trace(), key)


def test_a_wrong_value_is_explained_and_a_wrong_override_is_an_error() -> None:
    found = trace(["lr=-1"])
    assert found.error is not None
    assert explain(found, "lr")["history"][-1]["origin"]["text"] == "command line: lr=-1"
    with pytest.raises(ConfigError, match="did you mean epochs"):
        trace(["epoch=3"])


def test_references_in_a_circle_end() -> None:
    found = trace(["epochs=${steps}", "steps=${epochs}"])
    assert "refers back to itself" in str(explain(found, "epochs"))


def test_secrets_are_redacted_in_values_overrides_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("PLAIN", "alsosecret")
    overrides = [
        "+hooks.a={_target_: x.Y, api_key: sekret-one, url: 'https://me:pass-word@host'}",
        "++hooks.a.api_key=sekret-two",
        "+hooks.a.token=${oc.env:PLAIN}",
        "+hooks.a.name=${oc.env:HF_TOKEN}",
        "+hooks.a.copy=${hooks.a.api_key}",
    ]
    found = trace(overrides)
    answers = [
        explain(found, key) for key in ("hooks", *(f"hooks.a.{k}" for k in ("api_key", "token", "name", "copy")))
    ]
    text = str([*answers, explain_differences(found)])
    assert "x.Y" in text
    for secret in ("sekret-one", "sekret-two", "hf_verysecret", "alsosecret", "pass-word"):
        assert secret not in text


def test_a_file_whose_name_is_that_of_a_secret_keeps_its_line(here: Path) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "secret.yaml").write_text("# @package _global_\nseed: 7\nhooks: {}\n")
    answer = explain(trace(["experiment=secret"]), "seed")
    assert answer["history"][-1]["origin"]["text"].startswith("conf/experiment/secret.yaml:2 ")


def test_a_group_that_the_command_line_removes_says_so() -> None:
    answer = explain(trace(["~scheduler"]), "scheduler")
    assert answer["choice"] is ABSENT
    assert [event["origin"]["text"] for event in answer["chosen"]][-1] == "command line: ~scheduler"


def test_a_list_of_choices_is_a_choice_of_its_group() -> None:
    answer = explain(trace(["logger=[csv,tensorboard]"]), "logger")
    assert answer["choice"] == ["csv", "tensorboard"]
    assert [event["value"] for event in answer["chosen"]] == ["none", ["csv", "tensorboard"]]
    assert answer["chosen"][-1]["origin"]["text"] == "command line: logger=[csv,tensorboard]"
    of_key = explain(trace(["logger=[csv,tensorboard]"]), "logger.csv.directory")
    assert of_key["history"][-1]["origin"]["text"].endswith("(logger=csv on the command line)")


def test_a_key_of_a_mapping_in_a_mapping_of_the_same_name_has_its_own_line(here: Path) -> None:
    (here / "conf" / "model").mkdir(parents=True)
    text = "_target_: a.B\nmodel:\n  model:\n    width: 3\n  <<: {depth: 2}\nwidth: 4\n"
    (here / "conf" / "model" / "deep.yaml").write_text(text)
    found = trace(["model=deep"])
    lines = {
        key: found.histories[f"model.{key}"][-1].origin.line for key in ("model.model.width", "width", "model.depth")
    }
    assert lines == {"model.model.width": 4, "width": 6, "model.depth": 5}


@pytest.mark.usefixtures("project")
def test_the_differences_name_choices_and_values_with_their_origin() -> None:
    answer = explain_differences(trace(["experiment=mine", "model=other", "lr=0.1"], "extra"), "extra")
    rows = {row["key"]: (row["value"], row["origin"]["text"]) for row in answer["differences"]}
    assert rows["optim"] == ("mine", "conf/experiment/mine.yaml:5")
    assert rows["model"] == ("other", "command line: model=other")
    assert rows["lr"] == ("0.1", "command line: lr=0.1")
    assert rows["limit_batches"][0] == "3"
    assert "batch_size" not in rows
    assert explain_differences(trace())["differences"] == []
