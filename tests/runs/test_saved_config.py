"""The fast reading of saved configs: OmegaConf is the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.sweeps.made_runs import make_run, write_yaml
from trainkit.config.compose import compose_run
from trainkit.core.errors import CheckpointError
from trainkit.runs.directory import Run
from trainkit.runs.saved_config import read_choices, read_saved_config
from trainkit.runs.untrusted import read_overrides


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of plain containers with their values."""
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield from leaves(value, name)
        else:
            yield name, value


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim=muon_sgd", "lr=1e-5", "data=fashion_mnist"],
        ["experiment=two_modules"],
        [
            "+hooks.odd={_target_: builtins.dict, text: 'a: b\\n# no comment\\n\\n- c', number: '1e-3'}",
            "clip_norm=1e10",
        ],
    ],
)
def test_a_saved_config_has_the_leaves_that_omegaconf_reads(overrides: list[str], tmp_path: Path) -> None:
    composed = compose_run(overrides)
    assert composed.hydra is not None
    run = Run(tmp_path)
    run.write_config(composed.settings.source, overrides, composed.hydra)
    expected = dict(leaves(OmegaConf.to_container(run.config, resolve=False)))
    assert read_saved_config(tmp_path) == expected
    choices = read_choices(tmp_path)
    assert choices["optim"] == composed.hydra.runtime.choices.optim
    assert set(choices) >= {"model", "data", "loss", "optim", "experiment"}
    assert not any(group.startswith("hydra/") for group in choices)


def test_a_file_whose_parts_alone_are_no_yaml_is_read_as_a_whole(tmp_path: Path) -> None:
    write_yaml(tmp_path / ".hydra" / "config.yaml", {})
    (tmp_path / ".hydra" / "config.yaml").write_text('a: "first\nsecond"\nb: {c: [1,\n2]}\n')
    assert read_saved_config(tmp_path) == {"a": "first second", "b.c": [1, 2]}


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x\n", "a: [\n", "text", "a: " + "[" * 60, "a: " + "1" * 2000])
def test_what_trainkit_does_not_write_is_refused(text: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / ".hydra" / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_saved_config(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=sgd", "lr=1e-3", "data.root=/a/b", "x=null", "h=[4,8]", "y=1.0", "z=-1", "a.b=true"],
        [
            "+a=1",
            "~b",
            "c=[1,2]",
            "cc=range(3)",
            "d='x y'",
            "e={a: 1}",
            "f=a: b",
            "g=#1",
            "h=",
            "i=\ud55c",
            "j=a\u2028b",
        ],
        [],
    ],
)
def test_overrides_are_read_as_yaml_reads_them(overrides: list[str], tmp_path: Path) -> None:
    path = tmp_path / "overrides.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(overrides)))
    assert read_overrides(path) == overrides
