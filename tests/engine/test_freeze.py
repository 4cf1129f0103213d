"""A run that is killed before a frozen group joins, and resumed, ends with the bits of an unbroken run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.engine.test_length import final
from tests.processes import Forks

slow = pytest.mark.slow
BASE = ["limit_batches=6", "epochs=4", "progress=plain", "optim=adamw", "ema=0.9", "checkpoint.every_steps=2"]
BASE += ["scheduler=cosine", "+param_groups.body={module: [conv1, conv2], freeze: 2, lr_mult: 0.1}"]


@pytest.mark.parametrize(
    "step", [11, pytest.param(3, marks=slow), pytest.param(12, marks=slow), pytest.param(15, marks=slow)]
)
def test_a_run_killed_near_the_end_of_a_freeze_resumes_to_the_same_bits(
    step: int, forked: Command, forks: Forks, tmp_path: Path
) -> None:
    assert forked(*BASE, "hydra.run.dir=straight").returncode == 0
    hook = f"+hooks.kill={{_target_: trainkit.diagnostics.verify_resume.Kill, step: {step}}}"
    process = forks.start(*BASE, hook, "hydra.run.dir=resumed", cwd=tmp_path)
    assert process.wait() == -signal.SIGKILL, process.stderr
    done = forked("resume", "resumed", "~hooks.kill")
    assert done.returncode == 0, done.stderr
    assert final(tmp_path / "resumed") == final(tmp_path / "straight")
