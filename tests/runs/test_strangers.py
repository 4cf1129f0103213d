"""Folders and names from strangers: odd file names, odd files, and files that were made to do harm."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from tests.conftest import Command
from tests.helpers import thinned
from tests.processes import Forks, Process
from tests.runs.test_checkpoint import write_state
from trainkit.core.errors import CheckpointError
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.interpolations import check_interpolations
from trainkit.runs.untrusted import read_yaml
from trainkit.sweeps.collect import collect
from trainkit.sweeps.comparison import comparison_lines

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
    ("name", "env"),
    [("rün ▁", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}), (NOT_UTF8, {})],
    ids=["not ASCII, in the locale C", "not UTF-8"],
)
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


# ---------------------------------------------------------------------------------------------- odd files


MAX_SECONDS, MAX_MEMORY = 5.0, 2**30  # of CPU time, and bytes


def ended(process: Process, limit: float = 30.0) -> Process:
    """Return a process that has ended; kill it after `limit` seconds, or if it takes more than `MAX_MEMORY`."""
    began, status = time.monotonic(), Path(f"/proc/{process.pid}/status")
    while "State:\tZ" not in (text := status.read_text()):
        found = re.search(r"VmHWM:\s+(\d+) kB", text)
        if time.monotonic() - began > limit or (found and 1024 * int(found[1]) > MAX_MEMORY):
            process.send(signal.SIGKILL)
        time.sleep(0.01)
    process.wait()
    return process


def assert_refused(process: Process, code: int, *words: str) -> None:
    """Assert that a command ends soon, in little memory, with one message."""
    found = ended(process)
    assert found.code == code, (found, found.stderr)
    assert found.stderr.count("error: ") == 1, found.stderr
    assert len(found.stderr.splitlines()) <= 3, found.stderr
    assert "TRAINKIT_TRACEBACK" not in found.stderr, found.stderr
    for word in words:
        assert word in found.stderr, found.stderr
    assert found.seconds < MAX_SECONDS, found
    assert found.peak < MAX_MEMORY, found


@pytest.fixture
def run(forks: Forks, tmp_path: Path) -> Path:
    """Return the directory of a finished run, whose config needs Hydra's settings."""
    argv = [*BASE, "scheduler=cosine", "+hooks.h._target_=anyhook.Hook", "+hooks.h.name=${hydra:runtime.choices.model}"]
    (tmp_path / "anyhook.py").write_text(
        "class Hook:\n    def __init__(self, name): ...\n    def on_end(self, s): ...\n"
    )
    forks.run(*argv, "hydra.run.dir=run", cwd=tmp_path)
    return tmp_path / "run"


def make_pipe(path: Path) -> None:
    """Create a pipe that nobody writes to."""
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    """Create a socket."""
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def make_link(path: Path) -> None:
    """Create a link to a file without an end."""
    path.symlink_to("/dev/zero")


FILES = ["run.json", ".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml", "history.jsonl"]


@pytest.mark.parametrize("make", thinned([make_pipe, Path.mkdir, make_socket, make_link], keep=4))
def test_only_regular_files_of_a_run_are_read(make: Callable[[Path], None], run: Path, forks: Forks) -> None:
    for name in FILES:
        copy = run.with_name("copy")
        shutil.copytree(run, copy)
        (copy / name).unlink()
        make(copy / name)
        process = forks.start("resume", "copy", "epochs=2", "progress=plain", cwd=run.parent)
        if name == "run.json" and make is Path.mkdir:
            assert_refused(process, 6, "copy cannot be written: Is a directory")
        elif name == "run.json":  # it is rebuilt from the checkpoint
            assert process.wait() == 0, process.stderr
            assert "run.json cannot be read: " in process.stderr
            assert "it is rebuilt from the checkpoint" in process.stderr
        else:
            assert_refused(process, 3, f"copy/{name} cannot be read: ", "expected a regular file")
        shutil.rmtree(copy)


@pytest.mark.parametrize("make", [make_pipe, Path.mkdir, make_link])
@pytest.mark.parametrize("name", [".lock", "trainkit.log"])
def test_a_lock_or_log_that_is_not_a_regular_file_is_a_storage_error(
    name: str, make: Callable[[Path], None], run: Path, forks: Forks
) -> None:
    (run / name).unlink()
    make(run / name)
    assert_refused(forks.start("resume", "run", "epochs=2", cwd=run.parent), 6, "run cannot be written: ")


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_link])
def test_an_image_that_is_not_a_regular_file_is_unreadable(
    make: Callable[[Path], None], images: Path, forks: Forks
) -> None:
    make(images / "a" / "24.png")
    stop = forks.start(*IMAGES, "data.on_unreadable=stop", "progress=off", cwd=images.parent)
    assert_refused(stop, 5, "sample 12 (images/a/24.png): OSError: ")
    assert ended(forks.start(*IMAGES, "hydra.run.dir=skip", cwd=images.parent)).code == 0
    linked = images / "a" / "24.png"
    linked.unlink()
    linked.symlink_to("00.png")
    assert ended(forks.start(*IMAGES, "data.on_unreadable=stop", "hydra.run.dir=x", cwd=images.parent)).code == 0


def test_an_array_file_that_is_a_pipe_is_a_data_error(forks: Forks, tmp_path: Path) -> None:
    make_pipe(tmp_path / "points.npz")
    assert_refused(forks.start(*BASE, "data=arrays", "data.file=points.npz", cwd=tmp_path), 5, "not a regular file")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise("abcdefghijk")
)
YAML_BOMBS: dict[str, str | bytes] = {
    "aliases": BOMB,
    "recursive": "a: &a [*a]\n",
    "merge": "a: &a {x: 1}\nb: {<<: *a}\n",
    "deep": "a: " + "[" * 50_000 + "]" * 50_000,
    "wide": "a: [" + "1," * 200_000 + "]",
    "large": "a: '" + "x" * 2**21 + "'",
    "number": "a: 1" + ":00" * 100_000,
    "not UTF-8": b"a: \xff",
    "duplicate": "a: 1\na: 2\n",
}


@pytest.mark.parametrize("name", thinned([".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"], keep=3))
def test_yaml_bombs_are_refused_at_once(name: str, run: Path, forks: Forks) -> None:
    for kind, content in YAML_BOMBS.items():
        copy = run.with_name(kind)
        shutil.copytree(run, copy)
        (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        process = forks.start("resume", kind, "epochs=2", cwd=run.parent)
        if "overrides" in name:  # invalid YAML is ignored there
            found = ended(process)
            assert found.code in (0, 3), found
            assert found.seconds < MAX_SECONDS, found
        else:
            assert_refused(process, 3, f"{kind}/{name} cannot be read: " if kind != "large" else "more than 1,048,576")


def doubled(first: Any, pattern: Any) -> dict[str, Any]:
    """Return 30 values, each of which contains the one before twice: in `pattern`, which is a text or makes a node."""
    make = pattern if callable(pattern) else lambda number: pattern.replace("N", str(number))
    return {"a0": first} | {f"a{number + 1}": make(number) for number in range(30)}


# Values of a key `bomb` in a saved config.
INTERPOLATION_BOMBS: dict[str, dict[str, Any]] = {
    "text": doubled("x" * 10, "${.aN}${.aN}"),
    "absolute": doubled("x" * 10, "${bomb.aN}${bomb.aN}"),
    "mapping": doubled("x", lambda number: {"x": f"${{..a{number}}}", "y": f"${{..a{number}}}"}),
    "list": doubled("x", "${oc.create:[${.aN},${.aN}]}"),
    "values": doubled({"x": 1}, lambda number: [f"${{..a{number}}}"] * 2),
    "nested": doubled("x", "${.${.bN}}${.${.bN}}") | {f"b{number}": f"a{number}" for number in range(30)},
    "decoded": doubled("x" * 10, "${oc.decode:'\"\\${.aN}\\${.aN}\"'}"),
    "hydra": doubled("${hydra:runtime.choices.model}", "${.aN}${.aN}"),
    "wide": {"a": "x" * 300_000, "b": ["${..a}"] * 3000},
    "long": {"a": "x", "b": "${.a}" * 100_000},
    "deep": {"a": "${" * 5000 + "b" + "}" * 5000},
    "parents": {"a": {"b": "${bomb.c}"}, "c": {"d": "${bomb.a}"}},
    "twice": {"a": {"b": "${bomb.c}", "c": "${bomb.c}"}, "c": {"d": "${bomb.a}", "e": "${bomb.a}"}},
    "copies": {"a": {str(number): 1 for number in range(3000)}, "b": ["${bomb.a}"] * 1000},
}


@pytest.mark.parametrize(
    "kind", [kind for kind in INTERPOLATION_BOMBS if kind != "hydra"]
)  # the command sets Hydra's settings
def test_interpolations_that_resolve_to_any_size_are_refused_before_they_are_resolved(
    kind: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"bomb": INTERPOLATION_BOMBS[kind]}, width=10**7))
    with pytest.raises(CheckpointError, match=r"its interpolations|interpolations of the saved"):
        check_interpolations(read_yaml(file))


@pytest.mark.parametrize("kind", thinned(INTERPOLATION_BOMBS, keep=100))
def test_a_config_whose_interpolations_resolve_to_any_size_is_refused_at_once(
    kind: str, run: Path, forks: Forks
) -> None:
    file = run / ".hydra/config.yaml"
    config = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**config, "bomb": INTERPOLATION_BOMBS[kind]}, width=10**7))
    assert_refused(
        forks.start("resume", "run", "epochs=2", "resume.allow=[config]", cwd=run.parent), 3, "interpolations"
    )


@pytest.mark.slow
def test_interpolations_of_hydras_settings_are_bounded_too(run: Path, forks: Forks) -> None:
    file = run / ".hydra/hydra.yaml"
    content = yaml.safe_load(file.read_text())
    bomb = doubled("x" * 10, "${hydra.job.env_set.aN}${hydra.job.env_set.aN}")
    content["hydra"]["job"]["env_set"] = bomb
    content["hydra"]["runtime"]["choices"]["model"] = "${hydra.job.env_set.a30}"
    file.write_text(yaml.safe_dump(content))
    assert_refused(forks.start("resume", "run", "epochs=2", cwd=run.parent), 3, "interpolations")


def test_two_hundred_interpolations_of_a_long_text_are_accepted() -> None:
    check_interpolations(OmegaConf.create({"text": "x" * 200, "many": [{"value": "${text}"}] * 200}))


FORGED: list[dict[str, Any]] = [
    {"resumed": 5},
    {"resumed": [5]},
    {"resumed": [{"allow": 5}]},
    {"best": [1]},
    {"best": {"metric": 5, "value": 1, "epoch": 1}},
    {"best": {"metric": "val/loss", "value": "low", "epoch": 1}},
    {"best": {"metric": "val/loss", "value": 0.5, "epoch": 1, "val/accuracy": []}},
    {"best": {"metric": "size", "value": 0.5, "epoch": 1, "size": [7]}},
    {"best": {"metric": "val/loss", "value": 10**400, "epoch": 1}},
    {"best": {}},
    {"status": 5},
    {"folder": 5},
    {"why": {}},
    {"classes": "many"},
    {"parameters": "many"},
    {"device": []},
]


@pytest.mark.parametrize("first", thinned(range(4), keep=4))
def test_a_run_json_with_forged_entries_is_rebuilt(first: int, run: Path, forks: Forks) -> None:
    file = run / "run.json"
    info = json.loads(file.read_text())
    for forged in FORGED[first::4]:
        file.write_text(json.dumps(info | forged))
        found = ended(forks.start("resume", "run", "progress=plain", cwd=run.parent))
        assert found.code == 0, found
        assert f"run.json is damaged: {next(iter(forged))} " in found.stderr
        assert "it is rebuilt from the checkpoint" in found.stderr
        assert not forged.items() <= json.loads(file.read_text()).items()
    for content in ("{}", '{"status": "completed"}', '{"status": "running"}'):
        file.write_text(content)
        found = ended(forks.start("resume", "run", cwd=run.parent))
        assert found.code in (0, 3), found
        assert "TRAINKIT_TRACEBACK" not in found.stderr, (content, found)


def test_a_history_of_wrong_types_or_of_any_size_is_skipped_or_refused(run: Path, forks: Forks) -> None:
    file = run / "history.jsonl"
    good = file.read_text()
    for line in ('{"epoch": true}', '{"epoch": "2"}', "[" * 50_000, '{"epoch": 1e999}', "9" * 5000):
        file.write_text(f"{line}\n{good}")
        assert ended(forks.start("resume", "run", cwd=run.parent)).code == 0
    file.write_bytes(b"[]," * 2**24)
    assert_refused(forks.start("resume", "run", "epochs=2", cwd=run.parent), 3, "history.jsonl has more than")


# ---------------------------------------------------------------------------------- sweeps, checkpoints


def test_a_damaged_run_hides_no_other_run_of_a_sweep(run: Path, forks: Forks) -> None:
    for number in range(3):
        shutil.copytree(run, run.parent / "sweep" / str(number))
    damaged = run.parent / "sweep" / "1" / "run.json"
    for content in ("{", '{"best": [1]}'):
        damaged.write_text(content)
        process = forks.start("resume", "sweep", cwd=run.parent)
        assert_refused(process, 2, "holds several runs (1 unfinished)", "trainkit resume sweep/1")
        runs = collect([run.parent / "sweep"]).runs
        assert "1/run.json is damaged: " in runs[1].why
        assert [found.status for found in runs] == ["completed", "unreadable", "completed"]
        assert len(comparison_lines(run.parent / "sweep")) == 2  # the header, and one row for two equal runs


def test_a_forged_scheduler_state_is_refused(run: Path, forks: Forks) -> None:
    forge(run, lambda saved: saved["schedulers"].__setitem__(0, {}))
    words = "the checkpoint does not fit this training: ", "lacks T_max, ", "last_epoch"
    process = forks.start("resume", "run", "epochs=1", cwd=run.parent)
    assert_refused(process, 3, *words)


def forge(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of the last checkpoint of a run, and delete the others."""
    checkpoints = Checkpoints(run / "checkpoints")
    for name in checkpoints.names()[1:]:
        shutil.rmtree(checkpoints.directory / name)
    folder = checkpoints.directory / checkpoints.names()[0]
    saved = checkpoints.load(folder.name)
    change(saved)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    write_state(folder, buffer.getvalue())


def lists_of_lists() -> list[Any]:
    """Return 2**40 lists in little memory."""
    lists: list[Any] = []
    for _ in range(40):
        lists = [lists, lists]
    return lists


def nested_lists() -> list[Any]:
    """Return a list in a list, many times."""
    nested: list[Any] = []
    for _ in range(200):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    "content",
    [
        lists_of_lists(),
        torch.zeros(1).expand(2**40),
        [torch.zeros(2**20)] * 1000,
        nested_lists(),
    ],
    ids=["lists", "expanded tensor", "shared tensors", "deep"],
)
def test_a_state_that_is_much_larger_than_its_file_is_refused(content: Any, run: Path, forks: Forks) -> None:
    forge(run, lambda saved: saved["fingerprint"]["config"].__setitem__("seed", content))
    assert_refused(forks.start("resume", "run", "epochs=2", cwd=run.parent), 3, "much larger than the file")


def test_a_zip_bomb_of_three_gibibytes_is_refused_before_it_is_unpacked(run: Path, forks: Forks) -> None:
    forge(run, lambda _: None)
    folder = next((run / "checkpoints").glob("step-*"))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)  # may be repeated
    zeros, buffer = block * 3 * 2**10 + deflate.flush(), io.BytesIO()
    with zipfile.ZipFile(folder / "state.pt") as plain, zipfile.ZipFile(buffer, "w") as packed:
        for entry in plain.infolist():
            if entry.filename.endswith("/data/0"):
                add_deflated(packed, entry.filename, zeros, 3 * 2**30)
            else:
                packed.writestr(entry.filename, plain.read(entry))
    write_state(folder, buffer.getvalue())
    assert len(buffer.getvalue()) < 2**23
    process = forks.start("resume", "run", "epochs=2", cwd=run.parent)
    assert_refused(process, 3, "bytes and would be unpacked to 3,22")


def add_deflated(archive: zipfile.ZipFile, name: str, content: bytes, size: int) -> None:
    """Add an entry with content that is compressed already, and the size that it would be unpacked to."""
    assert archive.fp is not None
    entry = zipfile.ZipInfo(name)
    entry.compress_type, entry.compress_size, entry.file_size = zipfile.ZIP_DEFLATED, len(content), size
    entry.header_offset, entry.CRC = archive.fp.tell(), 0
    archive.fp.write(entry.FileHeader() + content)
    archive.filelist.append(entry)
    archive.start_dir = archive.fp.tell()
