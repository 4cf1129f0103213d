"""trainkit trains PyTorch models from YAML.

config = trainkit.compose(["model=toy_cnn", "optim=sgd", "lr=0.01"])
run = trainkit.train(config)
run.history[-1]["val/accuracy"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "compose", "load", "resume", "train"]

if TYPE_CHECKING:
    from trainkit.config.compose import compose
    from trainkit.engine.resume import load, resume
    from trainkit.engine.train import train


def __getattr__(name: str) -> Any:
    # Imported when first used: `import trainkit` costs neither Hydra nor torch.
    if name == "compose":
        from trainkit.config.compose import compose

        return compose
    if name == "train":
        from trainkit.engine.train import train

        return train
    if name in ("load", "resume"):
        from trainkit.engine import resume as resuming

        return getattr(resuming, name)
    raise AttributeError(f"module 'trainkit' has no attribute {name!r}")
