"""trainkit trains PyTorch models from YAML.

config = trainkit.compose(["model=toy_cnn", "optim=sgd", "lr=0.01"])
run = trainkit.train(config)
run.history[-1]["val/accuracy"]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainkit.core.moved import install as install_moved_modules

if TYPE_CHECKING:
    from trainkit.config.compose import compose
    from trainkit.core.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        ExportError,
        NonFiniteError,
        OutOfMemoryError,
        Problem,
        RunDirectoryInUseError,
        Stopped,
        StorageError,
        TrainkitError,
        UserCodeError,
    )
    from trainkit.engine.evaluate import evaluate
    from trainkit.engine.export import export
    from trainkit.engine.load import load
    from trainkit.engine.predict import predict
    from trainkit.engine.resume import resume
    from trainkit.engine.train import train

install_moved_modules()

__version__ = "0.3.0"  # the only place of the version: pyproject.toml reads it from here
__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Problem",
    "RunDirectoryInUseError",
    "Stopped",
    "StorageError",
    "TrainkitError",
    "UserCodeError",
    "__version__",
    "compose",
    "evaluate",
    "export",
    "load",
    "predict",
    "resume",
    "train",
]

_FUNCTIONS = {
    "compose": "trainkit.config.compose",
    "evaluate": "trainkit.engine.evaluate",
    "export": "trainkit.engine.export",
    "load": "trainkit.engine.load",
    "predict": "trainkit.engine.predict",
    "resume": "trainkit.engine.resume",
    "train": "trainkit.engine.train",
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `import trainkit` loads neither Hydra nor torch.
    if name not in __all__:
        raise AttributeError(f"module 'trainkit' has no attribute {name!r}")
    return getattr(import_module(_FUNCTIONS.get(name, "trainkit.core.errors")), name)


def __dir__() -> list[str]:
    return __all__
