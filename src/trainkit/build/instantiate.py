"""The one place where a `_target_` is called: its arguments out of the config, its errors told by their key."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from trainkit.config.targets import locate, missing_source
from trainkit.core.errors import ConfigError, TrainkitError, UserCodeError


def call_target(node: DictConfig | dict[str, Any], path: str, instead: Any = None, **extra: Any) -> Any:
    """What a node's `_target_` returns for its arguments (as plain containers) and the extra ones.

    With `instead`, that is called in place of what `_target_` names.

    Raises:
        UserCodeError: it raised an error; `path` says which key called it.
    """
    plain: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    for key in extra:
        plain.pop(key, None)
    try:
        made = instantiate(plain | {"_partial_": True}, _convert_="all")
        return (instead or made.func)(*made.args, **made.keywords, **extra)
    except InstantiationException as error:
        raise UserCodeError(path, error.__cause__ or error) from error
    except TrainkitError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(path, error) from error


def import_function(dotted: str, path: str) -> Any:
    """The function that a dotted path names."""
    key = f"{path}={dotted}"
    problem = missing_source(dotted)
    if problem:
        raise ConfigError(f"{key}: {problem.cause}", hint=problem.hint)
    try:
        return locate(dotted)
    except Exception as error:
        raise UserCodeError(key, error) from error
