"""Which of the ranks of a training this process is, by the environment variables of torchrun. Imports no torch."""

from __future__ import annotations

import os

from trainkit.core.errors import ConfigError

# What torchrun sets, besides variables whose names begin with TORCHELASTIC_.
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}
RANK_VARIABLES |= {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"}


def is_rank() -> bool:
    """Return whether torchrun or the key `devices` started this process, as one of the ranks of a training."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def own_rank() -> int:
    """Return the rank of this process; 0 in a process that is no rank."""
    return int(os.environ.get("RANK", "0")) if is_rank() else 0


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or no rank."""
    return own_rank() == 0


def number_of_ranks() -> int:
    """Return the number of ranks that torchrun or the key `devices` started; 1 in a process that is no rank."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_rank() else 1


def leave_ranks() -> None:
    """Let this process, and those that it starts, be no ranks of torchrun."""
    for name in [name for name in os.environ if name in RANK_VARIABLES or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]


def may_start_processes(what: str) -> bool:
    """Return whether this process may start trainings in processes of their own: not as a rank other than rank 0.

    Raises:
        ConfigError: this is rank 0 of several, which such trainings would not use.
    """
    if number_of_ranks() > 1 and is_first_rank():
        cause = f"torchrun has started {number_of_ranks()} processes, and {what} starts the processes of its trainings"
        raise ConfigError(cause, hint="start this command without torchrun")
    return is_first_rank()
