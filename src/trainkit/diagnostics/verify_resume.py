"""Check by experiment that a killed and resumed run ends with the same bits as an unbroken run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainkit.core.errors import ConfigError
from trainkit.core.redaction import redact_command_line
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.snapshot import digest
from trainkit.training.metrics import CLOCKS
from trainkit.training.state import State

HOOK = "hooks.killed_for_verification"


class Kill:
    """A hook that kills its process after a step. SIGKILL cannot be handled, so nothing is saved at that moment."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: State) -> None:
        """Kill the process if the step is reached."""
        if state.progress.step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def verify_resume(
    overrides: Sequence[str], kills: int, directory: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    """Train a config without a break, train it again with kills at random steps, and compare the final states.

    Args:
        overrides: the overrides of the config.
        kills: the number of kills; a run of n steps allows at most n - 1.
        directory: for both runs.
        report: is called with a line before each training.

    Returns:
        `straight` and `resumed` (hashes of the final states and histories), `equal`, and `steps` (at which
        the run was killed). If a training fails, only `failed`: its exit code.

    Raises:
        ConfigError: the run has fewer than 2 steps.
    """
    straight, resumed = directory / "straight", directory / "resumed"
    # The files of a run hold no secrets, so a resume needs them again.
    secrets = [text.lstrip("+") for text in overrides if redact_command_line(text, ()) != text]
    report(f"training without a break: {straight}")
    code = _trainkit(*overrides, f"hydra.run.dir='{straight}'")
    if code:
        return {"failed": code}
    steps = _final_state(straight)["step"]
    if steps < 2:
        raise ConfigError(f"the run has {steps} steps: a kill needs at least 2", hint="write epochs=2 or more")
    kill_steps = sorted(random.SystemRandom().sample(range(1, steps), min(kills, steps - 1)))
    report(f"training with kills: {resumed}")
    hook = f"+{HOOK}={{_target_: trainkit.diagnostics.verify_resume.Kill, step: {kill_steps[0]}}}"
    code = _trainkit(*overrides, hook, f"hydra.run.dir='{resumed}'")
    for step, next_step in zip(kill_steps, [*kill_steps[1:], steps + 1], strict=True):
        if code not in (-signal.SIGKILL, 128 + signal.SIGKILL):  # 137: the key `devices` has started the ranks
            return {"failed": code}
        report(f"killed at step {step} of {steps}; resuming")
        code = _trainkit("resume", str(resumed), *secrets, f"{HOOK}.step={next_step}")
    if code:
        return {"failed": code}
    hashes = {"straight": _hash(straight), "resumed": _hash(resumed)}
    return {**hashes, "equal": hashes["straight"] == hashes["resumed"], "steps": kill_steps}


def _trainkit(*argv: str) -> int:
    """Run trainkit in a new process; show only its errors; return its exit code."""
    command = [sys.executable, "-m", "trainkit", *argv, "progress=off", "logger=none"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def _final_state(directory: Path) -> dict[str, Any]:
    return Checkpoints(directory / "checkpoints").newest()[1]


def _hash(directory: Path) -> str:
    history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in Run.load(directory).history]
    text = digest(_final_state(directory)) + json.dumps(history, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
