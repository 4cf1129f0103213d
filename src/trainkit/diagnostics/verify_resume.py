"""Whether a run that is killed and resumed ends with the bits of one that is not: tried, not promised."""

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
from trainkit.runs.snapshot import CLOCKS, digest
from trainkit.training.state import State

HOOK = "hooks.killed_for_verification"


class Kill:
    """The hook that kills its own process once a step is done, as no signal handler could notice."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: State) -> None:
        """Die, if it is time."""
        if state.progress.step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def verify(overrides: Sequence[str], kills: int, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a config straight, train it again with kills at random steps, each time resumed, and compare.

    Args:
        overrides: of the config.
        kills: how many, as far as there are steps.
        directory: for the two runs.
        say: is told what is being done.

    Returns:
        `straight` and `resumed` (hashes of the final states and histories), `equal`, and `steps`, those
        of the kills; or `failed`, the exit code of a training that ended otherwise.

    Raises:
        ConfigError: the run has no step after which it could be killed.
    """
    straight, resumed = directory / "straight", directory / "resumed"
    # The run's files do not hold them.
    secrets = [text.lstrip("+") for text in overrides if redact_command_line(text, ()) != text]
    say(f"training straight: {straight}")
    code = _trainkit(*overrides, f"hydra.run.dir='{straight}'")
    if code:
        return {"failed": code}
    steps = _final(straight)["step"]
    if steps < 2:
        raise ConfigError(f"the run has {steps} steps: there is none to be killed at", hint="write epochs=2 or more")
    at = sorted(random.SystemRandom().sample(range(1, steps), min(kills, steps - 1)))
    say(f"training with kills: {resumed}")
    hook = f"+{HOOK}={{_target_: trainkit.diagnostics.verify_resume.Kill, step: {at[0]}}}"
    code = _trainkit(*overrides, hook, f"hydra.run.dir='{resumed}'")
    for number, step in enumerate(at, start=1):
        if code != -signal.SIGKILL:
            return {"failed": code}
        say(f"killed at step {step} of {steps}; resuming")
        after = at[number] if number < len(at) else steps + 1
        code = _trainkit("resume", str(resumed), *secrets, f"{HOOK}.step={after}")
    if code:
        return {"failed": code}
    hashes = {"straight": _hash(straight), "resumed": _hash(resumed)}
    return {**hashes, "equal": hashes["straight"] == hashes["resumed"], "steps": at}


def _trainkit(*argv: str) -> int:
    """Run the command in a process of its own, silently but for its errors."""
    command = [sys.executable, "-m", "trainkit", *argv, "progress=off"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def _final(directory: Path) -> dict[str, Any]:
    return Checkpoints(directory / "checkpoints").newest()[1]


def _hash(directory: Path) -> str:
    history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in Run.load(directory).history]
    whole = digest(_final(directory)) + json.dumps(history, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
