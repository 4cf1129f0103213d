"""A run on disk: its directory, history, checkpoints and lock, and the way back from a checkpoint.

`directory`, `find`, `recovery`, `history`, `provenance`, `lock`, `reload` and `saved_config` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.runs.directory import Run
    from trainkit.runs.find import find_run

__all__ = ["Run", "find_run"]


def __getattr__(name: str) -> Any:
    """Import `Run` and `find_run` when they are used: `directory` imports OmegaConf, which `compare` does not need."""
    if name in __all__:
        module = {"Run": "directory", "find_run": "find"}[name]
        return getattr(import_module(f"trainkit.runs.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
