"""Explain an error from the loop: find the config key whose object raised it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from trainkit.build.evaluation import EvaluationSession
from trainkit.build.session import Session
from trainkit.core.device import is_out_of_memory
from trainkit.core.errors import ConfigError, DataError, OutOfMemoryError, TrainkitError, UserCodeError, user_frames
from trainkit.core.pytree import describe
from trainkit.core.source import name_and_place
from trainkit.core.spelling import did_you_mean
from trainkit.data.flow import FlowingLoader
from trainkit.data.form import PAIRS
from trainkit.data.loaders import StreamingLoader
from trainkit.data.sample_errors import explain_sample_error, key_of_sample_error
from trainkit.data.stream_loader import StreamLoader
from trainkit.data.streams import reading_method
from trainkit.optim.chained import ChainedOptimizer
from trainkit.training import custom_training, evaluation, loop, step, trial_validation
from trainkit.training.call import describe_call
from trainkit.training.hooks import HookError, add_hook_metrics
from trainkit.training.losses import denominator
from trainkit.training.metric_set import MetricError
from trainkit.training.wrong_result import WrongResultError

SECOND_BACKWARD = "backward through the graph a second time"  # part of torch's error

# The type of an error, part of its text, and how to fix it.
HINTS: list[tuple[type[Exception], str, str]] = [
    (
        TypeError,
        "denominator() missing",
        "trainkit calls denominator(targets), a method of the loss",
    ),
    (
        NotImplementedError,
        'missing the required "forward"',
        "trainkit calls model(inputs) and loss(outputs, targets): define a method forward",
    ),
    (
        RuntimeError,
        "a leaf Variable that requires grad",
        "write @torch.no_grad() above the method that changes parameters, such as step",
    ),
    (
        TypeError,
        "object is not callable",
        "if it is the loss's denominator: define a method denominator(self, targets)",
    ),
    (
        RuntimeError,
        "does not require grad",
        "validation runs without gradients: write `with torch.enable_grad():` in the model and the loss",
    ),
    (
        TypeError,
        "required positional argument",
        "docs/tasks.md says how a model is called; data.inputs chooses its inputs. A loss gets (outputs, targets)",
    ),
    (
        TypeError,
        "must be Tensor, not",
        "name the inputs as forward does (data.inputs), or take them apart in forward: see docs/tasks.md",
    ),
    (
        TypeError,
        "unexpected keyword argument",
        "docs/tasks.md says how a model is called; data.inputs chooses its inputs",
    ),
    (
        RuntimeError,
        "must have the same dtype",
        "return float32 tensors from the data set, such as x.float(), or call self.double() in the model",
    ),
    (
        RuntimeError,
        "Found dtype Double but expected Float",
        "return float32 tensors from the data set, such as x.float()",
    ),
    (
        IndexError,
        "out of bounds",
        "the model has fewer outputs, or the loss fewer weights, than the data has classes: see data.classes",
    ),
    (
        IndexError,
        "index out of range in self",
        "an input is a number that an embedding does not have: give it as many entries as the data has tokens",
    ),
    (
        RuntimeError,
        "view size is not compatible",
        "use reshape instead of view, or write memory_format=contiguous",
    ),
    (
        RuntimeError,
        SECOND_BACKWARD,
        "detach the tensors that your code keeps from batch to batch, such as self.state = state.detach()",
    ),
    (
        ValueError,
        "Attempting to unscale FP16 gradients",
        "precision=fp16 keeps the weights in float32: remove .half(), or write precision=fp32",
    ),
]


@contextmanager
def explained_errors(session: Session | EvaluationSession) -> Iterator[None]:
    """Turn every error in the block into a `TrainkitError` with an explanation."""
    try:
        yield
    except TrainkitError:
        raise
    except Exception as error:
        raise explain_error(error, session) from error


def explain_error(error: BaseException, session: Session | EvaluationSession) -> TrainkitError:
    """Return an error from the loop with the config key whose object raised it.

    Before the first step it counts as a config error (exit code 2): the parts do not fit together.
    """
    state = session.state
    if is_out_of_memory(error):
        hint = "write a smaller micro_batch, or choose a smaller model or another device"
        return OutOfMemoryError(f"{state.device} ran out of memory", hint=hint)
    if "DataLoader worker" in str(error) and ("killed by" in str(error) or "exited unexpectedly" in str(error)):
        return DataError(
            f"a worker process that reads data ended: {' '.join(str(error).split())}",
            hint="if memory ran out, lower data.num_workers; data.num_workers=0 shows the worker's own error",
        )
    if isinstance(error, HookError):
        name = next((name for name, hook in session.hooks.items() if hook is error.hook), "")
        return ConfigError(f"hooks.{name}: {name_and_place(error.hook, 'on_epoch')}: {error.cause}", hint=error.hint)
    if isinstance(error, MetricError):
        return ConfigError(f"metrics.{error.name}: {error.cause}", hint=error.hint)
    if isinstance(error, WrongResultError):
        key = "data.collate" if error.key == "data.train" and _collate_of(session) is not None else error.key
        return ConfigError(f"{key}: {_part_name(session, key)}: {error.cause}", hint=error.hint)
    custom = state.objects.training_step
    if custom is not None and state.progress.step == 0 and SECOND_BACKWARD in str(error):
        hint = "return the loss alone: trainkit calls backward, and updates the weights"
        return ConfigError(f"{custom.key}: {custom.place}: it calls backward itself", hint=hint)
    key, shapes = _find_owner(error, session)
    key = key_of_sample_error(key, error)
    explained = explain_sample_error(key, error)
    if explained is not None:
        return explained
    exit_code = 2 if state.progress.step == 0 or key == "scheduler" else 1
    if key.startswith("data.") and isinstance(error, OSError):  # an unreadable sample
        exit_code = DataError.exit_code
    hints = [] if key.startswith("data.") else HINTS
    hint = next((hint for kind, text, hint in hints if isinstance(error, kind) and text in str(error)), "")
    if key.startswith("hooks.") and isinstance(error, KeyError):
        hint = _suggest_metric(error)
    if _lacks_evaluation_step(error, session):
        step = session.state.objects.training_step
        hint = "the validation is supervised: write evaluation_step='${training_step}', a step of its own, or off"
        if step is not None and step.is_generator:  # a validation updates nothing
            hint = "the validation is supervised: write evaluation_step=PATH, a step that returns a loss, or off"
    if key in ("model", "loss") and not user_frames(error):  # such as a call with a wrong number of arguments
        shapes += f"\n  {_part_name(session, key)}"
    return UserCodeError(key, error, exit_code=exit_code, details=shapes, hint=hint)


def _lacks_evaluation_step(error: BaseException, session: Session | EvaluationSession) -> bool:
    """Return whether the supervised validation raised an error in a training with a custom step."""
    objects = session.state.objects
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_validation = any(frame.f_code is evaluation.evaluate_batch.__code__ for frame in frames)
    return is_validation and objects.training_step is not None and objects.evaluation_step is None


def _suggest_metric(error: KeyError) -> str:
    """Return a hint with the nearest metric if a hook's `on_epoch` reads a metric that does not exist, else ''."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    metrics: Mapping[str, Any] = next(
        (f.f_locals["metrics"] for f in frames if f.f_code is add_hook_metrics.__code__), {}
    )
    return did_you_mean(str(error.args[0]), metrics) if metrics and error.args else ""


def _part_name(session: Session | EvaluationSession, part: str) -> str:
    """Return the class of the model, the loss, the data set or its `collate`, and where it is defined."""
    if part == "data.collate":
        return name_and_place(_collate_of(session), "__call__")
    if part == "data.train":
        dataset = _data_of(session).dataset
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        return name_and_place(dataset, reading_method(dataset))
    objects = session.state.objects
    step = {"training_step": objects.training_step, "evaluation_step": objects.evaluation_step}.get(part)
    if step is not None:
        return step.place
    return name_and_place(objects.model if part == "model" else objects.loss_fn)


def _data_of(session: Session | EvaluationSession) -> Any:
    """Return the loader of the training data; of an evaluation that has not built it, that of the validation data."""
    return session.val if session.train is None else session.train


def _collate_of(session: Session | EvaluationSession) -> Any:
    """Return the custom function that makes the training batches, or None."""
    loader = _data_of(session)
    loader = loader.loader if isinstance(loader, FlowingLoader) else loader
    form = loader.form if isinstance(loader, StreamingLoader | StreamLoader) else PAIRS
    return form.own_collate


def _find_owner(error: BaseException, session: Session | EvaluationSession) -> tuple[str, str]:
    """Return the config key whose object raised an error, and the shapes of the batch in the step.

    The outermost frame of a method of an object decides. In a closure, these are the frames that the closure calls.
    """
    owners = _owners(session)
    key, shapes = "training", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        in_step = frame.f_code.co_filename in (
            loop.__file__,
            step.__file__,
            custom_training.__file__,
            evaluation.__file__,
            trial_validation.__file__,
        )
        if key.startswith("optim") and frame.f_code.co_filename == step.__file__:
            key = "training"  # the optimizer has called the closure, so the model, the loss or a hook decides
        if in_step and {"inputs", "targets"} <= frame.f_locals.keys():
            inputs = frame.f_locals["inputs"]
            shapes = f"inputs {describe(inputs)}, targets {describe(frame.f_locals['targets'])}"
            if isinstance(error, TypeError) and not isinstance(inputs, Tensor):
                shapes += f"\n  called as {describe_call(session.state.objects.model, inputs)}"
        owner = frame.f_locals.get("self")
        if frame.f_code is denominator.__code__:
            owner = frame.f_locals["loss_fn"]
        if key == "training":
            key = next((name for name, built in owners if owner is built and built is not None), key)
        if key != "training" and not key.startswith("optim"):
            break
    return key, shapes


def _owners(session: Session | EvaluationSession) -> list[tuple[str, Any]]:
    """Return the objects that the config built, each with its key."""
    objects = session.state.objects
    owners: list[tuple[str, Any]] = [("model", objects.model), ("loss", objects.loss_fn), ("optim", objects.optimizer)]
    owners += [("training_step", objects.training_step), ("evaluation_step", objects.evaluation_step)]
    owners += zip(("model", "loss"), objects.evaluated, strict=True)
    if isinstance(objects.optimizer, ChainedOptimizer):
        owners += [(f"optim.{name}", optimizer) for name, optimizer in objects.optimizer.optimizers.items()]
    owners += [("scheduler", scheduler) for scheduler in objects.schedulers]
    owners += [("data.train", session.train), ("data.train" if session.held_out else "data.val", session.val)]
    owners += [(f"hooks.{name}", hook) for name, hook in session.hooks.items()]
    sets = (objects.train_metrics, objects.val_metrics)
    owners += [(f"metrics.{name}", metric) for part in sets for name, metric in part.metrics.items()]
    return owners
