"""The programs `trainkit` and `python` for a shell, as forks of a server that has imported torch already.

`CommandServer` starts the server and makes a folder with both programs, for the `PATH` of a shell. Each program hands
its arguments, folder, environment and standard streams to the server, and ends with the exit code of the fork. So the
shell sees real processes, with pipes and redirections, and none of them imports torch again.

This file, run as a script, is the server.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What a program of the folder does. It must start fast, so it imports little.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = dict(argv=[{name!r}, *sys.argv[1:]], cwd=os.getcwd(), env=dict(os.environ), group=os.getpgrp())
socket.send_fds(server, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
code = server.recv(9)
if not code:  # the fork was killed
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""
DATA_LIMITS = ("limit_batches=2", "limit_val_batches=1")
SHORT = {
    "train": (*DATA_LIMITS, "max_minutes=0.01"),
    "find-lr": ("--steps=20",),
    "bench": ("--steps=2",),
    "verify-resume": (*DATA_LIMITS, "--kills=1"),  # not by minutes: two trainings by the clock differ
}
LARGEST = {"search.trials": 3, "max_minutes": 0.01}
NESTED = "COMMAND_SERVER_NESTED"  # a variable of the processes that a command starts


def shorten(argv: Sequence[str]) -> list[str]:
    """Return a command line that takes about a second.

    It gets what `SHORT` lists for its command, unless it sets that itself. `LARGEST` limits the values that it sets.
    """
    words = [_lowered(word) for word in argv]
    given = {word.partition("=")[0] for word in words}
    command = next((word for word in words[:1] if re.fullmatch(r"[a-z][a-z-]*", word)), "train")
    if {"--help", "-h", "--version", "--schema", "--cfg", "debug"} & given:  # debug sets limits itself
        return words
    if command == "resume":  # the run has its limits already; more epochs need more time
        return [*words, "max_minutes=0.02"] if "epochs" in given else words
    return [*words, *(limit for limit in SHORT.get(command, ()) if limit.partition("=")[0] not in given)]


def _lowered(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={LARGEST[key]}" if key in LARGEST and value.isdigit() else word


class CommandServer:
    """The server, and the folder `programs`.

    Args:
        site: the folder of an installed trainkit.
    """

    def __init__(self, site: Path) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="server")  # its path is short, as an address must be
        self.programs = Path(self.folder.name) / "bin"
        self.programs.mkdir()
        address = str(Path(self.folder.name) / "address")
        for name in ("trainkit", "python"):
            program = self.programs / name
            program.write_text(CLIENT.format(python=sys.executable, address=address, name=name))
            program.chmod(0o755)
        self.env = {
            **os.environ,
            "PATH": f"{self.programs}:{os.environ['PATH']}:{Path(sys.executable).parent}",  # the last has torchrun
            "PYTHONPATH": str(site),
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, address],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == str(site)  # it is ready

    def run(self, line: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a line of a shell in a folder; return its exit code and output."""
        process = subprocess.Popen(
            ["bash", "-c", line],
            cwd=cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += f"\nkilled after {timeout:g} seconds"
        return subprocess.CompletedProcess(line, process.returncode, out, err)

    def close(self) -> None:
        """Stop the server."""
        self.process.communicate(timeout=60)  # closes its stdin
        self.folder.cleanup()


def serve(address: str) -> None:
    """Fork for each connection, until stdin is closed: by `close`, or because the tests have ended."""
    import torch

    import trainkit.diagnostics.verify_resume  # imported once for all forks; none of it starts a thread
    import trainkit.sweeps.job

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports torch's compiler
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print(Path(trainkit.__file__).parents[1], flush=True)
    running: set[int] = set()
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]}
        pid = os.fork()
        if pid == 0:
            listener.close()
            _answer(connection)
        running.add(pid)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Run a request in this process, and end the process."""
    data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    request = json.loads(data)
    os.setpgid(0, request["group"])  # a signal to the shell's group reaches this process
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    nested = NESTED in request["env"]
    os.environ.update({**request["env"], NESTED: "1"})
    sys.executable = shutil.which("python") or ""  # the processes that a command starts are forks too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        code = run_program(*request["argv"], short=not nested)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for output in (sys.stdout, sys.stderr):
            output.flush()
        connection.send(b"%d" % code)
        os._exit(code)


def run_program(name: str, *argv: str, short: bool) -> int:
    """Run `trainkit ARGV`, or `python ARGV` with a script, `-m`, `-c` or `-`.

    Args:
        name: of the program.
        argv: its arguments.
        short: whether to shorten trainings. A command that another command starts is short already.
    """
    from trainkit.cli import main as cli

    if name == "trainkit":
        sys.argv = [name, *argv]
        return cli.main(shorten(argv) if short else argv)
    first, rest = argv[0], argv[1:]
    if first == "-m" and rest[0] == "trainkit":
        return run_program(*rest, short=short)
    if short:
        _shorten_functions()
    sys.path.insert(0, str(Path(first).parent.resolve()) if first[0] != "-" else "")
    sys.argv = [first, *rest]
    if first == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first[0] == "-":
        sys.argv = [first, *rest[first == "-c" :]]
        exec(rest[0] if first == "-c" else sys.stdin.read(), {"__name__": "__main__"})
    else:
        runpy.run_path(first, run_name="__main__")
    return 0


def _shorten_functions() -> None:
    """Make `trainkit.compose` and `trainkit.resume` shorten as the command does."""
    import trainkit

    compose, resume = trainkit.compose, trainkit.resume

    def short_compose(overrides: Sequence[str] = (), *args: Any, **named: Any) -> Any:
        return compose(shorten(["train", *overrides])[1:], *args, **named)

    def short_resume(run: Any, overrides: Sequence[str] = (), *args: Any, **named: Any) -> Any:
        return resume(run, shorten(["resume", *overrides])[1:], *args, **named)

    trainkit.compose, trainkit.resume = short_compose, short_resume


if __name__ == "__main__":
    serve(sys.argv[1])
