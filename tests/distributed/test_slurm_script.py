"""The sbatch script of docs/scaling.md, with stand-ins for the programs of SLURM: two machines with one rank each."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import until

SCRIPT = re.compile(r"```text\n(#!/bin/bash\n.*?)```", re.DOTALL)
# It starts the command once for each machine, and sends them the signal that SLURM sends before the end of the time.
SRUN = """#!/bin/bash
"$@" & one=$!
"$@" & two=$!
wait $one; code=$?
wait $two || code=$?
exit $code
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo localhost; echo other ;;
    requeue) echo "$2" >> requeued ;;
esac
"""


def free_port() -> int:
    """Return a port that no process uses."""
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


@pytest.fixture
def script(here: Path) -> Path:
    """The script of the page, for a short training."""
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    found = SCRIPT.search(page)
    assert found is not None
    text = found[1].replace("/shared/runs/one", str(here / "run")).replace(":29400", f":{free_port()}")
    text = text.replace("optim=adamw", "model=mlp epochs=300 limit_batches=20")
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (here / name).write_text(content)
        (here / name).chmod(0o755)
    (here / "train.sbatch").write_text(text)
    return here / "train.sbatch"


def submit(script: Path, *words: str) -> subprocess.Popen[str]:
    """Start the script as SLURM does, in a group of its own."""
    folder = script.parent
    if words:
        script.write_text(
            script.read_text().replace('words=(resume "$run")', f'words=(resume "$run" {" ".join(words)})')
        )
    env = {
        **os.environ,
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "localhost,other",
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }
    with (folder / "slurm-77.out").open("a") as output:
        return subprocess.Popen(
            ["bash", str(script)], cwd=folder, env=env, stdout=output, stderr=output, text=True, start_new_session=True
        )


def run_info(folder: Path) -> dict[str, Any]:
    """Return `run.json`."""
    content: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text())
    return content


def processes_of(folder: Path) -> list[int]:
    """Return the processes of torchrun and of the ranks that train in a folder."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines() if str(folder / "run") in line]
    return [int(pid) for pid, program, _ in rows if "python" in program]


@pytest.mark.slow
def test_the_script_saves_at_the_signal_is_queued_again_and_resumes(script: Path) -> None:
    here = script.parent
    job = submit(script)
    history = here / "run" / "history.jsonl"
    try:
        until(lambda: history.exists() and len(history.read_text().splitlines()) > 1, timeout=200)
        for process in processes_of(here):
            os.kill(process, signal.SIGUSR1)
        assert job.wait(timeout=100) != 0
        output = (here / "slurm-77.out").read_text()
        assert run_info(here)["exit_code"] == 75, output
        assert (here / "requeued").read_text() == "77\n"
        epochs = len(history.read_text().splitlines())

        job = submit(script, f"epochs={epochs + 2}")
        assert job.wait(timeout=200) == 0, (here / "slurm-77.out").read_text()
        assert len(history.read_text().splitlines()) == epochs + 2
        assert run_info(here)["exit_code"] == 0
        assert (here / "requeued").read_text() == "77\n"
    finally:
        for process in processes_of(here):
            os.kill(process, signal.SIGKILL)
