"""From settings to objects: data, model, loss, optimizers, schedulers, hooks.

`session` is the place to start reading: it builds everything in order. Only `instantiate` calls a `_target_`.
"""

from trainkit.build.session import Session, build_session

__all__ = ["Session", "build_session"]
