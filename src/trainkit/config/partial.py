"""Compose a config as far as possible, for the completion of a command line that is not finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.types import RunMode
from omegaconf import OmegaConf

from trainkit.config.diagnose import COMPOSITION_ERRORS
from trainkit.config.replaced_targets import mark_new_arguments
from trainkit.config.search_path import make_loader


def compose_partly(overrides: Sequence[str], config_dir: str | None = None) -> Any:
    """Return a config as plain containers, with its interpolations as they are written.

    Overrides that are wrong by themselves are left out. If that does not suffice, as for a wrong config file, the
    result is empty.
    """
    loader = make_loader(config_dir)

    def load(texts: Sequence[str]) -> Any:
        # As for a sweep, so that a key may have several values.
        config = loader.load_configuration("config", mark_new_arguments(texts), RunMode.MULTIRUN)
        return OmegaConf.to_container(config, resolve=False)

    def is_valid(text: str) -> bool:
        try:
            load([text])
        except COMPOSITION_ERRORS:
            return False
        return True

    try:
        return load(overrides)
    except COMPOSITION_ERRORS:
        pass
    try:
        return load([text for text in overrides if is_valid(text)])
    except COMPOSITION_ERRORS:
        return {}
