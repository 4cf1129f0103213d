"""Imports of packages that trainkit does not require."""

from __future__ import annotations

import importlib
from typing import Any

from trainkit.core.errors import ConfigError


def import_extra(package: str, extra: str, key: str) -> Any:
    """Import and return an optional package.

    Args:
        package: the name of the package.
        extra: the extra of trainkit that installs it.
        key: the config key that needs it, for the message.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        hint = f"install it: pip install 'trainkit[{extra}]'"
        raise ConfigError(f"{key}: the package {package} is not installed", hint=hint) from error
