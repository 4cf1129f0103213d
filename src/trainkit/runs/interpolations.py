"""Bound what the interpolations of a saved config resolve to, before anything else resolves them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, Node
from omegaconf.errors import OmegaConfBaseException

from trainkit.core.errors import CheckpointError
from trainkit.runs.untrusted import MAX_YAML_DEPTH, MAX_YAML_NODES

MAX_RESOLUTIONS = 2_000  # of interpolations, each counted with those that its value contains
MAX_RESOLVED_LENGTH = 2**17  # characters of the texts of all resolved interpolations


def check_interpolations(config: DictConfig) -> None:
    """Raise `CheckpointError` if the interpolations of a saved config resolve to much more than a config contains.

    `a1: ${a0}${a0}`, `a2: ${a1}${a1}` and so on double the size with each line. This resolves every value. A value
    that cannot be resolved is not an error here.
    """
    with _Budget() as budget:
        budget.resolve_all(config, 0)
    if budget.exceeded:
        cause = "the interpolations of the saved config refer to themselves, or resolve to more than a config contains"
        raise CheckpointError(cause, hint="restore .hydra/config.yaml, or start a new run")


class _Budget:
    """Counts what OmegaConf resolves inside a `with` block, and lets each resolution fail once the limit is reached."""

    def __init__(self) -> None:
        self.values = self.resolutions = self.characters = 0
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> _Budget:
        for name in ("_resolve_node_interpolation", "_evaluate_custom_resolver"):
            original = getattr(Container, name)
            self.stack.callback(setattr, Container, name, original)
            setattr(Container, name, self._counted(original))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def exceeded(self) -> bool:
        """Whether the limit is reached."""
        return (
            self.values > 2 * MAX_YAML_NODES
            or self.resolutions > MAX_RESOLUTIONS
            or self.characters > MAX_RESOLVED_LENGTH
        )

    def resolve_all(self, node: Any, depth: int) -> None:
        """Resolve each value below a node until the limit is reached."""
        self.values += 1 if depth <= 2 * MAX_YAML_DEPTH else MAX_YAML_NODES * 3  # a node that contains itself
        if not isinstance(node, DictConfig | ListConfig) or node._is_none() or node._is_missing():
            return
        for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
            if self.exceeded:
                return
            with contextlib.suppress(OmegaConfBaseException, RecursionError):
                self.resolve_all(node[key], depth + 1)

    def _counted(self, resolve: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.resolutions += 1
            if self.exceeded:
                raise ValueError("the interpolations resolve to too much")
            found = resolve(*args, **kwargs)
            value = found._value() if isinstance(found, Node) else found
            self.characters += len(value) if isinstance(value, str) else 0
            return found

        return counted
