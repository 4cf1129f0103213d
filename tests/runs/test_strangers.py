"""Folders and names from strangers: odd file names, odd files, and files that were made to do harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Command
from tests.processes import Forks, Process

BASE = ["model=mlp", "model.hidden=[4]", "epochs=1", "limit_batches=2", "progress=off"]
ESCAPE = "\x1b[31m"
NOT_UTF8 = os.fsdecode(b"r\xe9n")


def one_message(process: Process, code: int, *words: str) -> str:
    """Return the message of a command that failed with this exit code."""
    assert process.wait() == code, process.stderr
    text = process.stderr
    assert "Traceback" not in text, text
    assert "TRAINKIT_TRACEBACK" not in text, text
    for word in words:
        assert word in text, text
    return text


# ---------------------------------------------------------------------------------------------- odd names


@pytest.mark.parametrize(
    "env", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["UTF-8", "C"]
)
@pytest.mark.parametrize("name", ["rün ▁", NOT_UTF8], ids=["not ASCII", "not UTF-8"])
def test_a_run_directory_may_have_any_name(name: str, env: dict[str, str], trainkit: Command, tmp_path: Path) -> None:
    done = trainkit(*BASE[:-1], "progress=plain", f"hydra.run.dir='{name}'", **env)
    assert done.returncode == 0, done.stderr
    done = trainkit("resume", name, "epochs=2", **env)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / name / "trainkit.log").read_bytes().decode("utf-8")
    assert log.count("completed") == 2


def test_an_error_whose_message_has_a_surrogate_is_reported(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "class Hook:\n    def on_step(self, state):\n        raise ValueError('cannot open \\udce9.png')\n"
    )
    failed = forks.start(*BASE, "+hooks.odd._target_=odd.Hook", "hydra.run.dir=run", cwd=tmp_path)
    assert failed.wait() == 1
    assert r"hooks.odd: ValueError: cannot open \udce9.png" in failed.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert r"cannot open \udce9.png" in (tmp_path / "run/trainkit.log").read_text()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of images in two classes."""
    for number in range(24):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 2 * number, 0)).save(path)
    return tmp_path / "images"


IMAGES = ["data=image_folder", "data.root=images", "data.split=off", "model=mlp", "model.hidden=[4]", "epochs=1"]
IMAGES += ["data.on_unreadable=skip", "progress=plain", "hydra.run.dir=run"]


def test_file_names_forge_no_lines_and_send_no_escapes_to_the_terminal(images: Path, forks: Forks) -> None:
    forged = f"{ESCAPE}\n2026-01-01T00:00:00+00:00 completed.png"
    (images / "a" / forged).write_text("no image")
    (images / "b" / f"{NOT_UTF8}.png").write_text("no image")
    done = forks.run(*IMAGES, cwd=images.parent)
    log = (images.parent / "run/trainkit.log").read_text(encoding="utf-8")
    assert r"\x1b[31m\x0a2026-01-01T00:00:00+00:00 completed.png" in log
    assert r"r\udce9n.png" in log
    for text in (log, done.stdout, done.stderr):
        assert "\x1b" not in text
        assert "\n2026-01-01" not in text
    failed = forks.start(*IMAGES, "data.on_unreadable=stop", "hydra.run.dir=second", cwd=images.parent)
    assert failed.wait() == 5
    assert "\x1b" not in failed.stderr
    assert "\n2026-01-01" not in failed.stderr


def test_escapes_in_run_json_do_not_reach_the_terminal(forks: Forks, tmp_path: Path) -> None:
    forks.run(*BASE, "hydra.run.dir=run", cwd=tmp_path)
    file = tmp_path / "run/run.json"
    info = json.loads(file.read_text())
    info["best"]["metric"] = f"{ESCAPE}val/loss"
    info["why"] = f"{ESCAPE}early\nforged"
    file.write_text(json.dumps(info))
    done = forks.run("resume", "run", cwd=tmp_path)
    assert r"\x1b[31mval/loss" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\nforged" not in done.stdout


def test_resume_of_an_empty_name_is_an_error(forks: Forks, tmp_path: Path) -> None:
    forks.run(*BASE, "hydra.run.dir=.", cwd=tmp_path)
    one_message(forks.start("resume", "", cwd=tmp_path), 2, "the name of the run is empty")


def test_a_directory_that_begins_with_a_dash_is_named_with_a_dot(forks: Forks, tmp_path: Path) -> None:
    forks.run(*BASE, "hydra.run.dir='-name'", cwd=tmp_path)
    text = one_message(forks.start("resume", "-name", cwd=tmp_path), 2, "write ./-name if a directory has this name")
    assert "keys have no dashes" not in text
    assert "trainkit resume ./-name" in forks.run("resume", "./-name", cwd=tmp_path).stdout
