"""`trainkit why` on the command line; see tests/config/test_trace.py for the origins."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Command
from trainkit.cli.main import dispatch
from trainkit.core.errors import ConfigError


def test_the_installed_command_explains_without_torch(trainkit: Command) -> None:
    done = trainkit("why", "optim.lr", "experiment=line_fit", "lr=0.2", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "optim.lr = 0.2"
    assert lines[-1].split() == ["0.2", "command", "line:", "lr=0.2"]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "omegaconf" in imported
    assert "torch" not in imported


def test_json_has_the_file_and_the_line_of_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["why", "optim", "optim=adam", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["choice"] == "adam"
    for row in answer["keys"]:
        origin = row["history"][-1]["origin"]
        with open(origin["file"], encoding="utf-8") as file:  # noqa: PTH123
            line = file.read().splitlines()[origin["line"] - 1]
        assert line.strip().startswith(row["key"].rpartition(".")[2])


def test_a_removed_key_is_shown_as_absent(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(["why", "optim.momentum", "optim._target_=torch.optim.AdamW"])
    assert capsys.readouterr().out.startswith("optim.momentum = (absent)\n")
    dispatch(["why", "optim.momentum", "optim._target_=torch.optim.AdamW", "--json"])
    assert json.loads(capsys.readouterr().out)["removed"] is True


def test_all_lists_only_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(["why", "--all", "optim=adam", "lr=0.5", "seed=0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == ["optim", "lr"]
    dispatch(["why", "--all"])
    assert capsys.readouterr().out.splitlines()[0] == "nothing differs"


def test_a_wrong_value_is_explained_before_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="lr=-1"):
        dispatch(["why", "lr", "lr=-1"])
    assert "command line: lr=-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        ([], "why needs a key"),
        (["lr=1"], "why needs a key"),
        ([""], "why needs a key"),
        (["lr", "seed"], "why takes one key"),
        (["--all", "lr"], "--all takes no key"),
        (["lr", "-m", "lr=1,2"], "one config"),
        (["lr", "--jsn"], "no such flag"),
    ],
)
def test_wrong_command_lines_say_what_to_write(argv: list[str], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        dispatch(["why", *argv])


def test_a_value_with_control_characters_cannot_change_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(["why", "watch", "watch=['a\x1b[31m']"])
    assert "\x1b" not in capsys.readouterr().out
