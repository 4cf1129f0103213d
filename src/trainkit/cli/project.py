"""The files of a new project, made from the folder project_template."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from trainkit.config.json_schema import json_schema
from trainkit.config.search_path import CONF, PACKAGE
from trainkit.core.errors import ConfigError, StorageError
from trainkit.core.paths import display_path
from trainkit.display.text import as_json

TEMPLATE = PACKAGE / "project_template"
PLACEHOLDER = "project_name"  # in the names and the texts of the template's files
# Folders of a project, folders that ruff ignores, and what the tests import.
RESERVED = {"conf", "outputs", "tests", "build", "dist", "venv", "pytest", "ruff"}


def create_project(directory: Path) -> list[str]:
    """Write the files of a project: all of them, or none.

    Args:
        directory: the absolute path of the project, new or empty. Its name, in lower case and with underscores, is
            the name of the project's package.

    Returns:
        The paths of the files in the directory.

    Raises:
        ConfigError: the name cannot be the name of a package, or the directory is not empty.
        StorageError: a file cannot be written.
    """
    files = project_files(package_name(directory))
    check_free(directory, files)
    write_all(directory, files)
    return list(files)


def package_name(directory: Path) -> str:
    """Return the name of a project's package, made from the name of its directory.

    Raises:
        ConfigError: the name is not valid, or taken.
    """
    name = re.sub(r"[-. ]+", "_", directory.name.lower()).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,49}", name):
        cause = "the name must begin with a letter, and have at most 50 characters of a-z, 0-9, - and _"
    elif keyword.iskeyword(name):
        cause = "this is a keyword of Python"
    elif name in RESERVED:
        cause = "a project uses this name for a folder, or for a package of its tests"
    elif _is_importable(name, directory):
        cause = f"a module {name} is installed, and Python would import it instead of the project's package"
    elif name in _requirements():
        cause = f"trainkit imports a package {name} if it is installed"
    else:
        return name
    raise ConfigError(f"{directory.name or directory}: {cause}", hint="choose another name, such as my-project")


def _requirements() -> set[str]:
    """Return the names of the packages that trainkit requires, also those of its extras, which may not be installed."""
    try:
        lines = metadata.requires("trainkit") or []
    except metadata.PackageNotFoundError:  # run from its folder, without an installation
        return set()
    return {re.split(r"\W", line)[0] for line in lines}


def _is_importable(name: str, directory: Path) -> bool:
    """Return whether `import NAME` finds a module that is neither in the working directory nor the project itself."""
    if name in sys.stdlib_module_names:
        return True
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # an imported module without a spec
        return True
    places = [] if found is None else map(Path, found.submodule_search_locations or [found.origin or ""])
    return any(place.parent != Path.cwd() and place != directory for place in places)


def project_files(name: str) -> dict[str, str]:
    """Return the text of each file of a project by its path in the project.

    Args:
        name: the name of the project's package.
    """
    files = {"trainkit.schema.json": as_json(json_schema([CONF, TEMPLATE / "conf"])) + "\n"}
    for file in TEMPLATE.rglob("*"):
        path = file.relative_to(TEMPLATE).as_posix()
        # Tools write caches, such as pip, which compiles the modules of a package that it installs.
        if file.is_file() and "cache" not in path:
            files[path.replace(PLACEHOLDER, name)] = file.read_text(encoding="utf-8").replace(PLACEHOLDER, name)
    return dict(sorted(files.items()))


def check_free(directory: Path, files: Iterable[str]) -> None:
    """Check that a directory is new or empty. It may contain hidden entries, such as .git, but no file of the project.

    Raises:
        ConfigError: lists what the directory contains.
    """
    shown = display_path(directory)
    if os.path.lexists(directory) and not directory.is_dir():
        cause = f"{shown}: a file, or a link to a missing directory, has this name"
        raise ConfigError(cause, hint="choose another directory, or remove it")
    used = {file.partition("/")[0] for file in files}
    entries = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    found = [name for name in entries if name in used or not name.startswith(".")]
    if found:
        listed = ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
        hint = "nothing was written; choose a new directory, or move these files"
        raise ConfigError(f"the directory {shown} is not empty: it contains {listed}", hint=hint)


def write_all(directory: Path, files: Mapping[str, str]) -> None:
    """Write files, and create their folders. After an error or a signal, nothing is left behind.

    Raises:
        StorageError: a file cannot be written, or exists already.
    """
    created: list[Path] = []
    try:
        for name, text in files.items():
            path = directory / name
            for folder in reversed([folder for folder in path.parents if not folder.exists()]):
                created.append(folder)  # first, because a signal may arrive between two lines
                folder.mkdir()
            created.append(path)
            with path.open("x", encoding="utf-8", newline="\n") as file:  # "x" does not follow a link of that name
                file.write(text)
    except BaseException as error:
        if isinstance(error, FileExistsError):
            created.pop()  # somebody else created it
        for path in reversed(created):
            with suppress(OSError):  # somebody else wrote a file into the new folder
                path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, OSError):
            cause = f"{directory} cannot be written: {error.strerror or error}"
            raise StorageError(cause, hint="nothing was written; choose another directory") from error
        raise
