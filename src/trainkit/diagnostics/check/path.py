"""Train one batch through the whole path of a run, in a temporary folder, with trainkit's own loop.

A part that raises an error and that a training does not need, such as a metric, is removed, and the path is tried
again. So an error does not hide the errors of other parts.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from trainkit.build.last_batch import check_last_batch
from trainkit.build.session import Session
from trainkit.config.settings import Settings
from trainkit.core.errors import CheckpointError, NonFiniteError, TrainkitError
from trainkit.core.paths import claim_directory
from trainkit.data import form as data_form
from trainkit.data.flow import FlowingLoader
from trainkit.data.loaders import StreamingLoader
from trainkit.diagnostics.check.measure import Measured, Pace
from trainkit.diagnostics.check.parts import build_training, keys_of, remove_parts, remove_validation
from trainkit.engine.resume import continue_run
from trainkit.engine.session_facts import session_facts
from trainkit.engine.train import make_saver, run_training
from trainkit.runs.directory import Run
from trainkit.runs.reload import Reloaded
from trainkit.runs.saver import Saver
from trainkit.training import evaluation, loop, step, trial_validation
from trainkit.training.state import State

PHASES = ("data", "forward", "backward", "step", "validation", "hooks", "checkpoint", "resume")
NEEDED = ("data", "forward", "backward", "step")  # without these there is no training
MAX_TRIES = 12
# The frames of an error in this folder show that the data caused it.
DATA = str(Path(data_form.__file__).parent)


@dataclass
class PathResult:
    """What happened on the path.

    Attributes:
        errors: phase -> its errors.
        reached: phases that ended without an error at least once.
        settings: of the try that reached the end of the path; None: no try did.
        measured: the times and the memory of the measured steps; None: the path failed before.
    """

    errors: dict[str, list[TrainkitError]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    settings: Settings | None = None
    measured: Measured | None = None

    def add(self, phase: str, error: TrainkitError) -> None:
        """Add an error."""
        self.errors.setdefault(phase, []).append(error)


def run_path(settings: Settings, session: Session | None, pace: Pace) -> PathResult:
    """Train a batch, validate, save and resume; then measure.

    Args:
        settings: of a training that can be built.
        session: what the settings built; None: it is built here.
        pace: the hook that measures.
    """
    result = PathResult()
    remaining: Settings | None = settings
    for _ in range(MAX_TRIES):
        if remaining is None:
            break
        with tempfile.TemporaryDirectory(prefix="trainkit-check-", ignore_cleanup_errors=True) as folder:
            path = _Path(remaining, Path(folder) / "run")
            remaining = _try(path, session, pace, result)
        session = None
    return result


def _try(path: _Path, session: Session | None, pace: Pace, result: PathResult) -> Settings | None:
    """Try the path; return the settings to try next, or None if the path has ended."""
    try:
        path.train(session, pace)
    except TrainkitError as error:
        phase = phase_of(error)
        result.add(phase, error)
        if phase in NEEDED:
            result.reached |= set(NEEDED[: NEEDED.index(phase)])
        return _without(path.settings, phase, error)
    finally:
        result.reached |= path.reached
    result.settings, result.measured = path.settings, pace.measured
    if path.settings.checkpoint is not None:
        try:
            path.resume()
            result.reached.add("resume")
        except TrainkitError as error:
            result.add("resume", error)
    return None


def _without(settings: Settings, phase: str, error: TrainkitError) -> Settings | None:
    """Return the settings without the part that raised an error; None if a training needs the part."""
    keys = keys_of(error)
    named = [key for key in keys if key.startswith(("hooks.", "metrics.", "monitor"))]
    if named:
        return remove_parts(settings, named)
    if phase == "validation":
        return None if settings.evaluation_step is None else remove_validation(settings)
    if phase == "checkpoint":
        return None if settings.checkpoint is None else replace(settings, checkpoint=None)
    return None if phase in NEEDED else remove_parts(settings, keys)


class _Path:
    """One try of the path.

    Args:
        settings: of the training.
        folder: of the run; it does not exist.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.reached: set[str] = set()
        self.is_read = False  # whether the samples are read one by one

    def train(self, session: Session | None, pace: Pace) -> None:
        """Train, validate and save a batch, and then the steps that are measured."""
        settings = self.settings
        if session is None:
            settings, session = build_training(settings)
        check_last_batch(session.settings, session.state, session.train)
        train = session.train.loader if isinstance(session.train, FlowingLoader) else session.train
        self.is_read = isinstance(train, StreamingLoader)
        session.settings = replace(session.settings, progress="off", report=None)
        session.loggers = {}  # a check reports nothing to other tools
        run = Run(claim_directory(self.folder, exact=True))
        saver = make_saver(run, session, first=True)
        pace.begin(session, saver)
        run.start(settings, command=sys.argv, facts=session_facts(session))
        run_training(run, session, [], saver, hooks=[_Reached(self.reached), pace])
        self.reached.add("hooks")

    def resume(self) -> None:
        """Continue the run from its checkpoint for one step. The checkpoint is verified and read."""
        run = Run.load(self.folder)
        data = replace(self.settings.data, num_workers=0)
        if self.is_read:  # the resume needs few samples
            data = replace(data, cache="none")
        options: dict[str, Any] = {
            "progress": "off",
            "report": None,
            "limit_val_batches": 1,
            "data": data,
            "logger": {},
        }
        longer = replace(self.settings, epochs=None, steps=None, max_minutes=1e6, early_stop=None, devices=1, **options)
        continue_run(run, Reloaded(longer, [], []), hooks=[_OneStep()])


class _OneStep:
    """A hook that ends a training after one more step."""

    def on_start(self, state: State) -> None:
        state.settings = replace(state.settings, steps=state.progress.step + 1, max_minutes=None, epochs=None)


class _Reached:
    """A hook that notes which phases have ended without an error."""

    def __init__(self, reached: set[str]) -> None:
        self.reached = reached

    def on_step(self, state: State) -> None:  # noqa: ARG002
        self.reached |= set(NEEDED)

    def on_epoch(self, state: State, metrics: Any) -> None:  # noqa: ARG002
        if "val" in state.loaders:
            self.reached.add("validation")

    def on_epoch_end(self, state: State, metrics: Any) -> None:  # noqa: ARG002
        if state.directory is not None and (state.directory / "checkpoints").is_dir():
            self.reached.add("checkpoint")


# --------------------------------------------------------------------------------- the phase of an error

# The functions whose frames name a phase.
VALIDATIONS = (inspect.unwrap(evaluation.evaluate).__code__, trial_validation.try_validation.__code__)
BACKWARD = (torch.Tensor.backward.__code__, torch.autograd.backward.__code__)
STEP = (step.before_update.__code__, step.update.__code__, loop.finish_epoch.__code__)


def phase_of(error: TrainkitError) -> str:
    """Return the phase in which an error was raised, from the frames of its traceback."""
    if isinstance(error, CheckpointError):
        return "checkpoint"
    key = keys_of(error)[0]
    if key.startswith("hooks."):
        return "hooks"
    if key.startswith(("metrics.", "data.val", "evaluation_step", "monitor")) or error.problems[0].cause.startswith(
        "val/"
    ):
        return "validation"
    if isinstance(error, NonFiniteError):
        return "step"
    raised = error.__cause__ if isinstance(error.__cause__, BaseException) else error
    phase = "data" if key.startswith("data.") else "forward"
    for frame, _ in traceback.walk_tb(raised.__traceback__):
        code, owner = frame.f_code, frame.f_locals.get("self")
        if isinstance(owner, Saver):
            return "checkpoint"
        if code in VALIDATIONS:
            return "validation"
        if code.co_filename.startswith(DATA):
            phase = "data"
        elif code in BACKWARD:
            phase = "backward"
        elif code in STEP or (isinstance(owner, Optimizer) and code.co_name == "step") or key == "scheduler":
            phase = "step"
    return phase
