"""The `trainkit` package: its public names, its version and what it imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import trainkit
from trainkit.core import errors

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", trainkit.__all__)
def test_public_names_can_be_used(name: str) -> None:
    assert getattr(trainkit, name) is not None
    assert name in dir(trainkit)


def test_error_classes_are_those_of_core() -> None:
    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert classes <= set(trainkit.__all__)
    assert all(getattr(trainkit, name) is getattr(errors, name) for name in classes)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = trainkit.trian


def test_import_loads_neither_hydra_nor_torch() -> None:
    code = "import sys, trainkit; trainkit.ConfigError; print(*{'hydra', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_package_is_typed() -> None:
    assert (Path(trainkit.__file__).parent / "py.typed").exists()


def test_the_newest_heading_of_the_changelog_is_the_version() -> None:
    headings = re.findall(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0][0] == trainkit.__version__
