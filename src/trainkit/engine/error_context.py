"""Who raised an error out of the loop: the config key whose object it came from."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainkit.build.session import Session
from trainkit.core.device import is_out_of_memory
from trainkit.core.errors import DataError, OutOfMemoryError, TrainkitError, UserCodeError
from trainkit.core.pytree import shape_of
from trainkit.data.reading import UnequalSamplesError
from trainkit.optim.chained import ChainedOptimizer
from trainkit.training import loop
from trainkit.training import step as steps


@contextmanager
def explained_errors(session: Session) -> Iterator[None]:
    """Turn whatever is raised inside into an error that `blame` explains."""
    try:
        yield
    except TrainkitError:
        raise
    except Exception as error:
        raise explain_error(error, session) from error


def explain_error(error: BaseException, session: Session) -> TrainkitError:
    """An error out of the loop, with the config key whose object raised it.

    Before the first step it is a matter of config (exit code 2): the parts do not fit together.
    """
    if is_out_of_memory(error):
        hint = "take a smaller micro_batch or model, or another device"
        return OutOfMemoryError(f"{session.state.objects.device} ran out of memory", hint=hint)
    if "DataLoader worker" in str(error) and ("killed by" in str(error) or "exited unexpectedly" in str(error)):
        return DataError(
            f"a process that reads data died: {' '.join(str(error).split())}",
            hint="if memory ran out, lower data.num_workers; data.num_workers=0 shows an error that it died of",
        )
    state = session.state
    owners: list[tuple[str, Any]] = [
        ("model", state.objects.model),
        ("loss", state.objects.loss_fn),
        ("optim", state.objects.optimizer),
    ]
    owners += zip(("model", "loss"), state.objects.evaluated, strict=True)
    if isinstance(state.objects.optimizer, ChainedOptimizer):
        owners += [(f"optim.{name}", optimizer) for name, optimizer in state.objects.optimizer.optimizers.items()]
    owners += [
        ("scheduler", scheduler) for scheduler in (*state.objects.step_schedulers, *state.objects.epoch_schedulers)
    ]
    owners += [("data.train", session.train), ("data.val", session.val)]
    owners += [(f"hooks.{name}", hook) for name, hook in session.hooks.items()]
    key, shapes = "training", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        ours = frame.f_code.co_filename in (loop.__file__, steps.__file__)
        if ours and {"inputs", "targets"} <= frame.f_locals.keys():
            shapes = f"inputs {shape_of(frame.f_locals['inputs'])}, targets {shape_of(frame.f_locals['targets'])}"
        key = next((name for name, owner in owners if frame.f_locals.get("self") is owner and owner is not None), key)
        if key != "training":
            break
    if isinstance(error, UnequalSamplesError):
        what = (
            str(error)
            .strip()
            .splitlines()[-1]
            .removeprefix(f"{UnequalSamplesError.__module__}.{UnequalSamplesError.__name__}: ")
        )
        return DataError(f"{key}: {what}", hint="let the data set make them equal, or write batch_size=1")
    exit_code = 2 if state.progress.step == 0 or key == "scheduler" else 1
    if key.startswith("data.") and isinstance(error, OSError):  # a sample that cannot be read
        exit_code = DataError.exit_code
    hint = ""
    if isinstance(error, IndexError) and "out of bounds" in str(error):
        hint = "the model has fewer outputs than the data has classes: see data.classes and the model's arguments"
    if "view size is not compatible" in str(error):
        hint = "use reshape instead of view, or write memory_format=contiguous"
    if "Attempting to unscale FP16 gradients" in str(error):
        hint = "precision=fp16 keeps the weights in float32: leave out .half(), or write precision=fp32"
    return UserCodeError(key, error, exit_code=exit_code, details=shapes, hint=hint)
