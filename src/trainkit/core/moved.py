"""Modules that have moved: their old names stay importable, with a warning."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old names that hooks, scripts and saved configs of version 0.1.0 may use.
MOVED_MODULES = {
    "trainkit.augment": "trainkit.data.augment",
    "trainkit.batches": "trainkit.data.prepare",
    "trainkit.cache": "trainkit.data.cache",
    "trainkit.device": "trainkit.core.device",
    "trainkit.errors": "trainkit.core.errors",
    "trainkit.loaders": "trainkit.data.loaders",
    "trainkit.loop": "trainkit.training.loop",
    "trainkit.run": "trainkit.runs.directory",
    "trainkit.samples": "trainkit.data.reading",
    "trainkit.schedulers": "trainkit.optim.schedulers",
    "trainkit.state": "trainkit.training.state",
    "trainkit.verification": "trainkit.diagnostics.verify_resume",
}


class MovedModuleFinder:
    """A finder and loader that imports the new module for an old name, if no other finder finds the old name.

    It has no base class, because importing `importlib.abc` would delay every start.
    """

    def __init__(self) -> None:
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        """Return a spec for an old name."""
        return ModuleSpec(name, self) if name in MOVED_MODULES else None  # type: ignore[arg-type]  # duck-typed

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the new module."""
        import warnings

        new = MOVED_MODULES[spec.name]
        warnings.warn(f"{spec.name} has moved to {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = self.specs[module.__spec__.name]


def install() -> None:
    """Make the old names importable."""
    sys.meta_path.append(MovedModuleFinder())
