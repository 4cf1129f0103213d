"""A run on disk: its directory, history, checkpoints and lock, and the way back from a checkpoint.

`directory`, `history`, `provenance`, `lock` and `reload` do not import torch.
"""

from trainkit.runs.directory import Run, find_run

__all__ = ["Run", "find_run"]
