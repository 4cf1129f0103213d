"""Several hosts train together through torchrun's rendezvous. Here each host is a network namespace of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import read_history
from tests.processes import Forks, has_ended
from trainkit.sweeps.resources import children_of

pytestmark = pytest.mark.slow

TIMEOUT = 240.0
MODULE = """
import time
from torch import nn


class Slow(nn.Linear):
    def forward(self, inputs):
        time.sleep(0.2)
        return super().forward(inputs.flatten(1))
"""
DATA = ["data=synthetic", "data.train.size=171", "data.train.shape=[12]", "data.split=0.2", "batch_size=33"]


class Host:
    """A network namespace with an address, at the end of a cable to the other host."""

    def __init__(self, number: int) -> None:
        self.name, self.cable, self.address = f"tk{os.getpid()}-{number}", f"tk{number}", f"10.77.0.{number}"

    def run(self, *command: str) -> None:
        """Run a command on the host."""
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True, capture_output=True, timeout=60)

    def start(self, *argv: str, first: str, cwd: Path) -> subprocess.Popen[str]:
        """Start torchrun with one rank on this host; the rendezvous is at the address `first`."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=test"]
        launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29400", f"--local-addr={self.address}"]
        launcher.append(f"--rdzv-conf=is_host={'true' if self.address == first else 'false'}")
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *launcher, "-m", "trainkit", *argv],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts that a cable connects."""
    made = [Host(1), Host(2)]
    try:
        for host in made:
            done = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        ends = [word for host in made for word in ("name", host.cable, "netns", host.name)]
        cable = ["ip", "link", "add", *ends[:4], "type", "veth", "peer", *ends[4:]]
        done = subprocess.run(cable, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"network namespaces cannot be connected here: {done.stderr.strip()}")
        for host in made:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.cable)
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", host.cable, "up")
        yield made
    except FileNotFoundError:
        pytest.skip("network namespaces cannot be made here: there is no command ip")
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def start_both(hosts: list[Host], *argv: str, cwd: Path) -> list[subprocess.Popen[str]]:
    return [host.start(*argv, first=hosts[0].address, cwd=cwd) for host in hosts]


def end_all(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """Wait for the processes; return their output. Those that still run after the timeout are killed."""
    deadline, texts = time.monotonic() + timeout, []
    for process in processes:
        try:
            texts.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            texts.append(process.communicate()[0] + "\nkilled after the timeout")
    return texts


def test_two_hosts_have_the_numbers_of_one_process(hosts: list[Host], forks: Forks, tmp_path: Path) -> None:
    config = ["model=mlp", *DATA, "epochs=3", "progress=off"]
    processes = start_both(hosts, *config, "hydra.run.dir=two", cwd=tmp_path)
    assert forks.run(*config, "hydra.run.dir=one", cwd=tmp_path).code == 0
    texts = end_all(processes, TIMEOUT)
    assert [process.returncode for process in processes] == [0, 0], texts
    one, two = (read_history(tmp_path / name) for name in ("one", "two"))
    assert [row["train/loss"] for row in two] == pytest.approx([row["train/loss"] for row in one], rel=1e-6)
    assert [row["val/loss"] for row in two] == pytest.approx([row["val/loss"] for row in one], rel=1e-6)


def test_a_host_that_is_cut_off_ends_all_ranks_within_60_seconds(hosts: list[Host], tmp_path: Path) -> None:
    (tmp_path / "cut_parts.py").write_text(MODULE)
    model = ["model._target_=cut_parts.Slow", "+model.in_features=12", "+model.out_features=10"]
    config = [*model, *DATA, "epochs=999"]
    processes = start_both(hosts, *config, "hydra.run.dir=run", "progress=off", cwd=tmp_path)
    history = tmp_path / "run" / "history.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not (history.exists() and history.read_text()) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), end_all(processes, 1)
        time.sleep(0.1)
    ranks = [pid for process in processes for pid in children_of(process.pid)]
    assert len(ranks) == 2
    hosts[1].run("ip", "link", "set", hosts[1].cable, "down")
    began = time.monotonic()
    while not all(map(has_ended, ranks)) and time.monotonic() - began < 90:
        time.sleep(0.2)
    seconds = time.monotonic() - began
    texts = end_all(processes, 1)  # torchrun waits for the lost host until its own timeout
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert seconds < 60, (seconds, texts)
    assert info["status"] == "failed"
    assert info["why"].startswith("rank 1"), info
