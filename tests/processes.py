"""Real processes that run the command without importing torch again: forks of a server that imported it once.

A fork runs `trainkit.cli.main.main` as the installed command does. A test can kill a fork, and its exit code is
real. This file, run as a script, is the server.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 300.0  # seconds; the machine may be busy


@dataclass
class Process:
    """A command that was started."""

    forks: Forks
    pid: int
    out: Path
    code: int | None = None
    seconds: float = 0.0  # of CPU time, once the process has ended
    peak: int = 0  # bytes of memory, once the process has ended

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    @staticmethod
    def kill(pid: int, number: int) -> None:
        """Send a signal to a process that the command has started."""
        os.kill(pid, number)

    def wait(self) -> int:
        """Wait for the end of the process; return its exit code, negative for a signal.

        A process that does not end within `TIMEOUT` prints the stack of each thread and ends with SIGABRT.
        """
        if self.code is None:
            ended = self.forks.ask({"wait": self.pid, "timeout": TIMEOUT})
            self.code, self.seconds, self.peak = ended["code"], ended["seconds"], ended["peak"]
        assert self.code is not None
        return self.code

    @property
    def stderr(self) -> str:
        """The text written to stderr so far."""
        return self.out.with_suffix(".err").read_text()

    @property
    def stdout(self) -> str:
        """The text written to stdout so far."""
        return self.out.with_suffix(".out").read_text()


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, also if nobody has waited for it."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Forks:
    """Starts commands as forks of the server."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.number = directory, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the server; return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(self, *argv: str, cwd: Path, call: str | None = None, **env: str) -> Process:
        """Start `trainkit ARGV` in a folder; `IGNORED=SIGHUP` ignores that signal, as `nohup` does.

        `call` names a function that runs instead, as `module:name`.
        """
        self.number += 1
        out = self.directory / f"command{self.number}"
        for suffix in (".out", ".err"):  # the process may be killed before it opens them
            out.with_suffix(suffix).touch()
        answer = self.ask({"argv": list(argv), "cwd": str(cwd), "out": str(out), "env": env, "call": call})
        return Process(self, answer["pid"], out)

    def run(self, *argv: str, cwd: Path, **env: str) -> Process:
        """Run `trainkit ARGV` to its end; its exit code must be 0."""
        done = self.start(*argv, cwd=cwd, **env)
        code = done.wait()
        assert code == 0, f"{code}: {done.stderr}"
        return done

    def close(self) -> None:
        """Stop the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()


def until(happened: Any, timeout: float = 60.0, interval: float = 0.002) -> Any:
    """Call a function until it returns something true; return that."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        answer = happened()
        if answer:
            return answer
        time.sleep(interval)
    raise TimeoutError


def _call(name: str) -> int:
    """Return the result of a function `module:name` of the tests."""
    sys.path.append(str(Path(__file__).parents[1]))
    module, _, function = name.partition(":")
    return int(getattr(importlib.import_module(module), function)())


def _end(pid: int, timeout: float) -> tuple[int, Any]:
    """Return the status and the usage of a process once it has ended; abort it after the timeout."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage
        time.sleep(0.005)
    os.kill(pid, signal.SIGABRT)  # see faulthandler
    os.kill(pid, signal.SIGCONT)  # a stopped process takes the signal then
    return os.wait4(pid, 0)[1:]


def serve() -> None:
    """Read requests from stdin and fork for each command."""
    import torch

    import trainkit.diagnostics.verify_resume  # imported once for all forks; none of it starts a thread
    import trainkit.engine.resume  # noqa: F401
    from trainkit.cli import main as cli

    faulthandler.enable()  # SIGABRT prints the stack of each thread to stderr
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports torch's compiler
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status, usage = _end(request["wait"], request["timeout"])
            seconds, code = usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)
            answer = {"code": code, "seconds": seconds, "peak": 1024 * usage.ru_maxrss}
        else:
            pid = os.fork()
            if pid == 0:
                os.chdir(request["cwd"])
                os.environ.update(request["env"])
                nowhere = os.open(os.devnull, os.O_RDONLY)
                os.dup2(nowhere, 0)
                for number, suffix in ((1, "out"), (2, "err")):
                    file = os.open(f"{request['out']}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(file, number)
                sys.argv = ["trainkit", *request["argv"]]
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if "IGNORED" in request["env"]:
                    signal.signal(signal.Signals[request["env"]["IGNORED"]], signal.SIG_IGN)
                code = 1
                try:
                    code = _call(request["call"]) if request["call"] else cli.main(request["argv"])
                except SystemExit as error:
                    code = error.code if isinstance(error.code, int) else int(error.code is not None)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
