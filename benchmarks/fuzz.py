"""Random mutations of the text files of a run, and calls of everything that reads them, for `benchmarks.campaign`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trainkit.core.errors import TrainkitError
from trainkit.engine.summary import finished_lines
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.find import find_run
from trainkit.runs.history import History
from trainkit.runs.recovery import is_finished, recover_run
from trainkit.runs.reload import reload_config
from trainkit.sweeps.comparison import comparison_lines

CALL_SECONDS = 5
MAX_MEMORY = 2**20  # KiB that a process may use
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a" * 10_000,
    "\0",
    "\ud800",
]
ODD += ["${epochs}", "${", "???", "***", "off", "../../x", [], {}, [[]] * 50, {"a": {"b": None}}, {"_target_": "x.y"}]
TOKENS = [
    b"\0",
    b"\xff\xfe",
    b"{",
    b"[" * 2000,
    b'"',
    b"\\u",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!python/name:os ",
    b"\n",
    b"\t",
]
TOKENS += [b"NaN", b"-", b"1e999", b"9" * 5000, b"${", b"\xe2\x80\xa8", b"\r", b"%", b"<<: ", b"\xef\xbb\xbf"]


def text_files(run: Path) -> list[Path]:
    """Return the text files of a run that trainkit reads again."""
    fixed = [run / name for name in ("run.json", "history.jsonl", "checkpoints/last", "checkpoints/best")]
    found = [*fixed, *run.glob(".hydra/*.yaml"), *run.glob("checkpoints/step-*/manifest.json")]
    return sorted(path for path in found if path.is_file())


def mutate(draw: random.Random, run: Path) -> str:
    """Mutate one or two text files of a run; return their names and the changed content."""
    changed = []
    files = text_files(run)
    weights = [3 if path.name in ("run.json", "history.jsonl", "config.yaml") else 1 for path in files]
    for path in dict.fromkeys(draw.choices(files, weights, k=draw.choice([1, 1, 2]))):
        content = path.read_bytes()
        structured = _mutate_structure(draw, path, content) if draw.random() < 0.6 else None
        path.write_bytes(_mutate_bytes(draw, content) if structured is None else structured)
        changed.append(f"{path.relative_to(run)}: {path.read_bytes()[:3000]!r}")
    return "\n".join(changed)


def _mutate_bytes(draw: random.Random, content: bytes) -> bytes:
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(content) + 1)
        length = draw.choice([0, 1, 1, 4, 30])
        inserted = draw.choice([draw.choice(TOKENS), draw.randbytes(draw.randint(1, 4)), content[at : at + 200], b""])
        content = content[:at] + inserted + content[at + length :]
    return content


def _mutate_structure(draw: random.Random, path: Path, content: bytes) -> bytes | None:
    """Replace, remove or add values inside the JSON or YAML of a file; None if the file has neither."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        _change_value(draw, rows)
        if draw.random() < 0.2:
            draw.shuffle(rows)
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix not in (".json", ".yaml"):
        return None
    root = [json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)]
    for _ in range(draw.choice([1, 1, 3])):
        _change_value(draw, root)
    value = root[0] if root else None
    if path.suffix == ".json":
        return json.dumps(value).encode()
    return yaml.safe_dump(value, allow_unicode=draw.random() < 0.5).encode(errors="replace")


def _change_value(draw: random.Random, node: Any) -> None:
    """Change a random value below a list or an object, in place."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.85:
            node = node[key]
            continue
        action = draw.choice(["replace", "replace", "remove", "nest", "copy"])
        if action == "remove":
            del node[key]
        elif action == "nest":
            for _ in range(draw.choice([1, 3, 60])):
                node[key] = draw.choice([[node[key]], {"a": node[key]}])
        else:
            node[key] = draw.choice(ODD) if action == "replace" else node[draw.choice(keys)]
        return


def readers(run: Path) -> list[Callable[[], Any]]:
    """Return the calls that read the files of a run."""
    recovered: list[Run] = []
    return [
        lambda: recovered.append(recover_run(find_run(str(run)))),
        lambda: recovered and is_finished(recovered[0]) and finished_lines(recovered[0]),
        lambda: Run(run).config,
        lambda: Run(run).overrides,
        lambda: History(run / "history.jsonl").rows,
        lambda: History(run / "history.jsonl").text_until(1),
        lambda: Checkpoints(run / "checkpoints").newest(planned=True),
        lambda: [Checkpoints(run / "checkpoints").read_pointer(name) for name in ("last", "best")],
        lambda: comparison_lines(run),
        lambda: reload_config(Run(run), ["epochs=3"]),
    ]


def _timed_out(*_: object) -> None:
    raise TimeoutError(f"a call took more than {CALL_SECONDS} s")


def call_readers(run: Path) -> str:
    """Call each reader; return what is wrong, or ''."""
    for number, call in enumerate(readers(run)):
        signal.setitimer(signal.ITIMER_REAL, CALL_SECONDS)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                call()
        except TrainkitError as error:
            if not str(error).startswith("error: "):
                return f"an empty message: {error!r}"
        except Exception as error:
            return f"{type(error).__name__}: reader {number}\n{traceback.format_exc()}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"memory: {used:,} KiB" if used > MAX_MEMORY else ""


def fuzz_in_process(run: Path, folder: Path, seed: int, calls: int) -> tuple[int, list[str]]:
    """Mutate copies of a run in a fork and read them; return the number of copies, and what is wrong.

    Args:
        run: the undamaged run.
        folder: where to copy it.
        seed: of the mutations.
        calls: the number of copies.
    """
    report = folder.with_suffix(".report")
    report.write_text("")
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            _read_copies(run, folder, report, random.Random(seed), calls)
            os._exit(0)
        os._exit(1)
    deadline = time.monotonic() + calls * CALL_SECONDS + 30
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    problems = [entry for entry in entries if entry]
    if ended != (pid, 0):
        problems.append(f"the process {'hangs' if ended[0] == 0 else f'ended with {ended[1]}'}: seed {seed}")
    return len(entries), problems


def _read_copies(run: Path, folder: Path, report: Path, draw: random.Random, calls: int) -> None:
    signal.signal(signal.SIGALRM, _timed_out)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    with report.open("a") as file:
        for _ in range(calls):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(run, folder, symlinks=True)
            changed = mutate(draw, folder)
            problem = call_readers(folder)
            file.write(json.dumps(f"{problem}\n{changed}" if problem else "") + "\n")
            file.flush()
