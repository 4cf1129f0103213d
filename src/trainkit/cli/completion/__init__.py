"""Completion in bash, zsh and fish: the scripts that a shell evaluates, and the answers to a command line.

`scripts` has the scripts. They call `trainkit -sc query=SHELL` for each press of the tab key. `query` prints the words
that `candidates` finds. Nothing here imports torch.
"""

from trainkit.cli.completion.query import run

__all__ = ["run"]
