"""`trainkit list`: the choices of the groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.object_type import ObjectType

from tests.conftest import Command
from trainkit.cli.main import dispatch
from trainkit.config.choices import find_choices, find_groups, find_names
from trainkit.config.search_path import CONF, make_loader
from trainkit.core.errors import ConfigError


def write(file: Path, text: str) -> None:
    """Write a file into a folder that may not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    """Return what `trainkit list ARGV --json` prints."""
    assert dispatch(["list", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_groups_and_choices_are_those_that_hydra_finds(here: Path) -> None:
    write(here / "conf/optim/mine.yaml", "# mine\n_target_: torch.optim.SGD")
    write(here / "conf/mygroup/one.yaml", "# one\na: 1")
    loader = make_loader()
    groups = [group for group in loader.list_groups("") if group != "hydra"]
    assert find_groups() == sorted(groups)
    for group in groups:
        assert find_names(group) == sorted(loader.get_group_options(group, ObjectType.CONFIG))


def test_each_group_lists_the_default_of_the_config_as_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    marked = {group: [row["name"] for row in rows if row["default"]] for group, rows in found.items()}
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    expected = {group: [name] for entry in defaults if isinstance(entry, dict) for group, name in entry.items()}
    assert marked == {group: names for group, names in expected.items() if " " not in group}


def test_every_shipped_choice_is_listed_with_its_comment_and_an_existing_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = listed(capsys)
    files = {Path(row["file"]).resolve() for rows in found.values() for row in rows}
    assert files == {file for file in CONF.rglob("*/*.yaml") if "hydra" not in file.parts}
    for row in (row for rows in found.values() for row in rows):
        first_line = next(line for line in Path(row["file"]).read_text().splitlines() if "@package" not in line)
        assert row["description"].startswith(first_line.strip("# "))
        assert row["source"] == "shipped"


def test_users_choices_name_their_folder_and_a_shadowed_file_is_noted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "conf/model/mine.yaml", "# my network\n# of two layers\n#\n# more\n_target_: a.B")
    write(here / "extra/model/other.yaml", "_target_: a.C")
    write(here / "conf/model/toy_cnn.yaml", "# another network\n_target_: a.B")
    assert dispatch(["list", "model", "-cd", "extra"]) == 0
    printed = capsys.readouterr()
    rows = {line.lstrip("* ").split()[0]: line.split(maxsplit=1)[1] for line in printed.out.splitlines()[1:-3]}
    assert rows["mine"].split(maxsplit=1) == ["./conf", "my network of two layers"]
    assert rows["other"] == "--config-dir extra"
    assert "toy_cnn.yaml is ignored" in printed.err
    assert "the tutorial CNN" in printed.out


def test_a_description_leaves_out_the_lines_for_hydra_and_for_editors(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["# @package _global_", "# yaml-language-server: $schema=../../a.json", "# a recipe", "# of mine", "lr: 1"]
    write(here / "conf/experiment/mine.yaml", "\n".join(lines))
    rows = {row["name"]: row for row in listed(capsys, "experiment")["experiment"]}
    assert rows["mine"]["description"] == "a recipe of mine"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"a: [1\nb: 2", "line 2: expected ',' or ']'"),
        (b"a: 1\na: 2", "line 2: found duplicate key a"),
        (b"# \xff\na: 1", "the file is not UTF-8 text"),
        (b"- 1\n- 2", "the file holds a list, not a mapping"),
        (b"a: !!python/object:os.system {}", "could not determine a constructor"),
        (b"a: ${b", "no viable alternative"),
    ],
)
def test_a_broken_file_is_listed_with_its_fault_and_the_rest_is_shown(
    here: Path, capsys: pytest.CaptureFixture[str], content: bytes, fault: str
) -> None:
    write(here / "conf/optim/broken.yaml", "")
    (here / "conf/optim/broken.yaml").write_bytes(content)
    rows = {row["name"]: row for row in listed(capsys, "optim")["optim"]}
    assert fault in rows["broken"]["fault"]
    assert rows["sgd"]["fault"] is None
    assert len(rows) == len(find_choices("optim"))


def test_a_wrong_group_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean trainkit list optim\?"):
        dispatch(["list", "optimm"])


def test_a_name_with_control_characters_cannot_change_the_terminal(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "conf/optim/a\x1b[31m.yaml", "# red \x1b[31m text\na: 1")
    dispatch(["list", "optim"])
    assert "\x1b" not in capsys.readouterr().out


def test_the_installed_command_lists_without_torch(trainkit: Command) -> None:
    done = trainkit("list", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "yaml" in imported
    assert "torch" not in imported
    assert done.stdout.startswith("data:\n")
