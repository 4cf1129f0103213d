"""The pool of jobs: what happens to its server and to the jobs if processes are killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The jobs are plain functions, so this runs in a process without torch: with torch, the pool has no server.
SCRIPT = """
import os, signal, sys, time
from multiprocessing import forkserver
from pathlib import Path
from trainkit.sweeps import pool
from trainkit.sweeps.resources import Capacity

pool.PRELOAD = "json"  # not torch, which takes seconds to import
pool.MAX_SAVING = 5.0

def server():
    return forkserver._forkserver._forkserver_pid

class Observer:
    is_incomplete = stop_early = False
    def on_start(self, job, threads): pass
    def on_poll(self, running, waiting): pass
    def on_end(self, job, exit_code):
        print("exit code", exit_code)
    def on_question(self, job, question):
        os.kill(server(), signal.SIGKILL)

def job(channel):
    stops = []
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
    try:
        while not stops:
            time.sleep(0.5)  # the signal arrives here, before the next question
            channel.send(1)
            channel.recv()
    except (EOFError, OSError):
        pass
    Path("saved").touch()

class Target:
    def __init__(self, task, threads, gpu, channel):
        self.channel = channel
    def __call__(self):
        job(self.channel)

def answers():
    return [os.getppid()]

if __name__ == "__main__":
    if sys.argv[1] == "signal":
        pool.start_server()
        first = server()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(first, number)
        print(pool.call_in_server(answers) == [first])
    else:
        task = pool.Task(0, "", Path(), {"device": "cpu"})
        pool.Pool(Capacity([None], 1), Target, Observer(), asks=True).run(iter([task]), ahead=False)
"""


def run_script(folder: Path, argument: str) -> str:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", argument]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_server_outlives_the_signals_that_stop_a_command(tmp_path: Path) -> None:
    assert run_script(tmp_path, "signal") == "True"


def test_a_job_that_waits_for_an_answer_can_save_after_its_server_was_killed(tmp_path: Path) -> None:
    assert run_script(tmp_path, "question") == "exit code None"
    assert (tmp_path / "saved").exists()
