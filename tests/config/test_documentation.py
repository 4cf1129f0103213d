"""docs/config.md and --help list the keys of config.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from trainkit.config.check import all_keys
from trainkit.config.comments import key_comments
from trainkit.config.compose import compose
from trainkit.config.search_path import CONF

DOCS = Path(__file__).parents[2] / "docs" / "config.md"
ROOT_KEYS = [key for key in yaml.safe_load((CONF / "config.yaml").read_text()) if key not in ("defaults", "hydra")]


def documented_keys() -> list[str]:
    """Return the keys in the first column of the table of keys."""
    table = DOCS.read_text().partition("## Keys")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)]


def test_every_documented_key_exists() -> None:
    keys = {*all_keys(compose()), "experiment"}
    assert [key for key in documented_keys() if key not in keys] == []


@pytest.mark.parametrize("key", ROOT_KEYS)
def test_every_root_key_is_documented_and_has_a_comment(key: str) -> None:
    assert key in documented_keys()
    assert key in key_comments()
