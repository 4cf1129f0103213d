"""What the ranks of a training do not have in common: RNG states, and what a model, a hook or a custom step keeps.

A checkpoint holds the state of rank 0. Of each other rank, it holds the RNG states and the entries that differ. So a
run that continues with the same number of ranks has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainkit.core.pytree import copy_to_cpu
from trainkit.runs.snapshot import digest, refuse_mismatch
from trainkit.training.objects import Objects

OTHER_RANKS = "other_ranks"  # the entry of a checkpoint: one mapping of sections for each rank from 1 on
MODULES = ("model", "loss", "ema")  # their buffers may differ; their parameters are equal
SECTIONS = (*MODULES, "steps", "hooks")


def with_other_ranks(captured: Mapping[str, Any], objects: Objects) -> dict[str, Any]:
    """Return the state for a checkpoint: a captured state, and what the other ranks have captured differently.

    All ranks call this together. The tensors of this rank are not copies.
    """
    ranks = objects.ranks
    if not ranks.are_several:
        return dict(captured)
    own = _entries_that_may_differ(captured, objects)
    digests = {section: {name: digest({name: value}) for name, value in own[section].items()} for section in own}
    of_first, kept = ranks.first(digests), {"rng": captured["rng"]}
    for section, entries in own.items():
        names = [name for name in entries if digests[section][name] != of_first[section].get(name)]
        if names:
            kept[section] = copy_to_cpu({name: entries[name] for name in names})
    return {**captured, OTHER_RANKS: ranks.gather(kept)[1:]}


def state_of_rank(saved: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return what a rank has to restore from a checkpoint.

    A rank that the saved training did not have gets the state of rank 0, but keeps its own RNG states (`rng` is None).

    Raises:
        CheckpointError: the checkpoint is not readable.
    """
    shared = {key: value for key, value in saved.items() if key != OTHER_RANKS}
    if rank == 0:
        return shared
    with refuse_mismatch():
        others = saved.get(OTHER_RANKS, [])
        if rank > len(others):
            return {**shared, "rng": None}
        own = others[rank - 1]
        merged = {section: _merged(saved[section], own[section]) for section in SECTIONS if section in own}
        return {**shared, **merged, "rng": own["rng"]}


def _entries_that_may_differ(captured: Mapping[str, Any], objects: Objects) -> dict[str, dict[str, Any]]:
    """Return the buffers of each module, and the states of the custom steps and the hooks, by section and name."""
    modules = {"model": objects.model, "loss": objects.loss_fn, "ema": objects.ema}
    entries: dict[str, dict[str, Any]] = {key: dict(captured[key]) for key in ("steps", "hooks")}
    for key, module in modules.items():
        if module is not None:
            params = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            entries[key] = {name: value for name, value in captured[key].items() if name not in params}
    return entries


def _merged(content: Any, own: Mapping[str, Any]) -> Any:
    """Return the entries of rank 0 with those of another rank; a module's state keeps its metadata."""
    merged = type(content)({**content, **own})
    if hasattr(content, "_metadata"):
        merged._metadata = content._metadata
    return merged
