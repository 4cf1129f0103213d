"""Remove secrets from the files of a sweep that Hydra and user code write."""

from __future__ import annotations

from pathlib import Path

import yaml

from trainkit.core.atomic import atomic_write
from trainkit.core.redaction import find_secrets, redact_by_key, redact_command_line, replace_secrets


def redact_log(log: Path, secrets: set[str]) -> None:
    """Remove secrets from the output of a job, where errors of user code may have put them."""
    try:
        text = log.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # the job ended before it printed anything
        return
    clean = replace_secrets(text, secrets, short=True)
    if clean != text:
        atomic_write(log, lambda file: file.write(clean.encode("utf-8", "surrogateescape")))


def redact_yaml(path: Path, secrets: set[str]) -> None:
    """Remove secrets from a YAML file that Hydra wrote. Does nothing if the file does not exist."""
    if not path.exists():
        return
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    clean = redact_command_line(redact_by_key(content), secrets | set(find_secrets(content)))
    if clean != content:
        path.write_text(yaml.safe_dump(clean, sort_keys=False), encoding="utf-8")
