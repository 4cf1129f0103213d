"""The plugin by which Hydra finds trainkit's sweeper for searches. Hydra imports it at every start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper


class TrainkitSweeper(Sweeper):
    """Searches for good settings with Optuna; see `trainkit.sweeps.search.worker`.

    Args:
        params: keys with values in Hydra's syntax, such as `{lr: "tag(log,interval(1e-4,1))"}`.
        config_dir: a folder of configs besides ./conf.
    """

    def __init__(self, params: Any = None, config_dir: str | None = None) -> None:
        self.params, self.config_dir = dict(params or {}), config_dir

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what Hydra passes to a sweeper."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: Sequence[str]) -> Any:
        """Run the search."""
        from trainkit.sweeps.search.run import run_search

        return run_search(self, arguments)
