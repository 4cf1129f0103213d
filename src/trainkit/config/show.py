"""The text that `--cfg` prints: a composed config without its secrets."""

from __future__ import annotations

from omegaconf import OmegaConf

from trainkit.config.compose import Composed
from trainkit.core.errors import ConfigError
from trainkit.core.redaction import find_secrets, redact_by_key, redact_command_line


def config_text(
    composed: Composed, package: str | None = None, *, resolve: bool = False, with_hydra: bool = False
) -> str:
    """Return the YAML of a config, or of the part at the key `package`.

    Args:
        composed: the config.
        package: a dotted key; None for the whole config.
        resolve: whether interpolations are replaced by their values.
        with_hydra: whether the text includes Hydra's node.

    Raises:
        ConfigError: the config does not have that part.
    """
    config = composed.settings.source
    if with_hydra:
        config = OmegaConf.create({"hydra": composed.hydra, **config})
    node = OmegaConf.select(config, package) if package else config
    if not OmegaConf.is_config(node):
        raise ConfigError(f"--package {package}: the config has no such part", hint="for example --package optim")
    shown = OmegaConf.create(redact_by_key(OmegaConf.to_container(node, resolve=resolve)))
    return remove_secrets(OmegaConf.to_yaml(shown), composed)


def remove_secrets(text: str, composed: Composed) -> str:
    """Replace the secrets of a composed config in a text."""
    nodes = [node for node in (composed.settings.source, composed.hydra) if node is not None]
    secrets = {secret for node in nodes for secret in find_secrets(OmegaConf.to_container(node, resolve=False))}
    return "".join(redact_command_line(text.splitlines(keepends=True), secrets))
