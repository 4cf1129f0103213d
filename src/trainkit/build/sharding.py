"""Apply the key `distributed`: divide the parameters of a built training among the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from trainkit.build.session import Session
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError, Problem
from trainkit.core.ranks import Ranks
from trainkit.core.source import name_and_place
from trainkit.display.text import count
from trainkit.training.objects import takes_batch_statistics
from trainkit.training.sharding import shard_objects, sharding_units

HINT = "write distributed=auto"
# The steps of the first two fail with shards. Muon computes in bfloat16, where shards are rounded to other numbers.
UNSUPPORTED = (torch.optim.Adafactor, torch.optim.SparseAdam, torch.optim.Muon)


def uses_shards(settings: Settings, ranks: Ranks) -> bool:
    """Return whether the parameters are divided among the ranks. One rank holds them all."""
    return settings.distributed == "fsdp" and ranks.are_several


def check_shardable(session: Session) -> None:
    """Check that the training works with `distributed=fsdp`, if this is the setting.

    Raises:
        ConfigError: it does not.
    """
    if uses_shards(session.settings, session.state.objects.ranks):
        problems = [Problem(f"distributed=fsdp: {cause}", hint) for cause, hint in _find_problems(session)]
        if problems:
            raise ConfigError(*problems)


def shard_session(session: Session) -> None:
    """Divide the parameters of the model among the ranks if `distributed` is fsdp. The weights must be equal so far."""
    settings, state = session.settings, session.state
    if settings.distributed == "fsdp" and not state.objects.ranks.are_several:
        session.notes.append("note: distributed=fsdp has no effect on one process, which holds the whole model")
    if not uses_shards(settings, state.objects.ranks):
        return
    units = sharding_units(state.objects.model)
    renewed = shard_objects(state.objects)
    for param in {id(param): param for group in session.groups for param in group.params}.values():
        param.tensor = renewed.get(param.tensor, param.tensor)
    session.named = {name: renewed.get(param, param) for name, param in session.named.items()}
    state.settings = replace(state.settings, on_oom="stop")
    blocks = Counter(type(unit).__mro__[2].__name__ for unit in units[:-1])  # FSDP2 makes a class of each class
    gathered = ", ".join(f"{number} {name}" for name, number in blocks.items())
    session.notes.append(
        f"the parameters are divided among {state.objects.ranks.size} ranks"
        + (f", and gathered for {gathered} in turn" if gathered else ", and gathered all at once: there are no blocks")
    )
    text = "note: distributed=fsdp: the losses of the ranks are not compared with the loss of their batch"
    session.notes.append(f"{text}; a loss that compares samples of a batch needs whole_batch = True")


def _find_problems(session: Session) -> Iterator[tuple[str, str]]:
    """Yield what does not work with shards, and the fix."""
    settings, objects = session.settings, session.state.objects
    model, step = objects.model, objects.training_step
    if settings.precision == "fp16":
        yield "the scale of the loss in fp16 is not supported", "write precision=bf16, or distributed=auto"
    if settings.on_oom == "split":
        yield "on_oom=split is not supported, because memory may run out on one rank alone", "write on_oom=stop"
    if settings.compile:
        yield "compile is not supported", f"write compile=off, or {HINT.removeprefix('write ')}"
    if settings.checkpoint is not None and settings.checkpoint.weights == "trainable":
        yield "checkpoint.weights=trainable is not supported", "write checkpoint.weights=all"
    for name, optimizer in objects.optimizers.items():
        if objects.needs_closure or isinstance(optimizer, UNSUPPORTED):
            cause = f"{type(optimizer).__name__} ({name}) does not support shards"
            yield cause, f"choose another optim, or {HINT}"
    if step is not None and step.is_generator:
        yield f"{step.place} yields several losses for a batch, which is not supported", HINT
    layer = next((module for module in model.modules() if takes_batch_statistics(module)), None)
    if layer is not None:
        yield f"{type(layer).__name__} normalizes by batch statistics, which is not supported", HINT
    yield from _find_wrong_modules(model)


def _find_wrong_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield parameters and modules that cannot be divided."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{type(model).__name__} contains scripted modules", HINT
            break
        if getattr(module, "sparse", False) is True:
            yield f"the gradient of {name_and_place(module)} is sparse", f"write sparse=False, or {HINT}"
    names = {param: name for name, param in reversed([*model.named_parameters()])}
    for param, name in names.items():
        if param.is_complex():
            yield f"{name} is complex", HINT
    *blocks, _ = sharding_units(model)
    owners: Counter[nn.Parameter] = Counter(param for block in blocks for param in block.parameters())
    in_blocks = {id(module) for block in blocks for module in block.modules()}
    rest = {
        param for module in model.modules() if id(module) not in in_blocks for param in module.parameters(recurse=False)
    }
    tied = [names[param] for param, number in owners.items() if number + (param in rest) > 1]
    if tied:
        more = f" and {count(len(tied) - 1, 'more parameter')}" if len(tied) > 1 else ""
        yield f"{tied[0]}{more} is shared by a block and another part of the model", f"untie it, or {HINT}"
