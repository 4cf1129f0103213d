"""The groups of the config and their choices, each with its description and its file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainkit.config.search_path import CONF, user_folders

SHIPPED, CONFIG_DIR, USER = "shipped", "--config-dir", "./conf"  # where a choice comes from


@dataclass(frozen=True)
class Choice:
    """A choice of a group.

    Attributes:
        name: as it is written on the command line.
        source: `SHIPPED`, `CONFIG_DIR` or `USER`.
        file: its config file.
        description: the first comment of the file; empty if there is none.
        fault: why the file cannot be read; empty if it can.
    """

    name: str
    source: str
    file: Path
    description: str = ""
    fault: str = ""


def find_groups(config_dir: str | None = None) -> list[str]:
    """Return the names of all groups: the shipped ones, and those that the user's folders add."""
    folders = [CONF, *user_folders(config_dir)]
    groups = [group for folder in folders for group in folder.iterdir() if group.is_dir() and group.name != "hydra"]
    return sorted({group.name for group in groups if any(group.rglob("*.yaml"))})


def find_names(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names of the choices of a group."""
    return sorted(_files(group, config_dir))


def find_choices(group: str, config_dir: str | None = None) -> list[Choice]:
    """Return the choices of a group, sorted by name."""
    return [_choice(name, source, file) for name, (source, file) in sorted(_files(group, config_dir).items())]


def _files(group: str, config_dir: str | None) -> dict[str, tuple[str, Path]]:
    """Return where each choice of a group comes from, and its file. The first folder that has a name wins."""
    found: dict[str, tuple[str, Path]] = {}
    given = Path(config_dir).resolve() if config_dir is not None else None
    for folder in (CONF, *user_folders(config_dir)):
        source = SHIPPED if folder == CONF else CONFIG_DIR if folder == given else USER
        for file in (folder / group).rglob("*.yaml"):
            if not file.is_dir():
                found.setdefault(file.relative_to(folder / group).with_suffix("").as_posix(), (source, file))
    return found


def _choice(name: str, source: str, file: Path) -> Choice:
    try:
        text = file.read_text(encoding="utf-8")
        content = OmegaConf.load(file) if source != SHIPPED else None  # the shipped files are valid
    except OSError as error:
        return Choice(name, source, file, fault=error.strerror or str(error))
    except UnicodeDecodeError:
        return Choice(name, source, file, fault="the file is not UTF-8 text")
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        return Choice(name, source, file, _first_comment(text), fault=f"{line}{error.problem}")
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        return Choice(name, source, file, _first_comment(text), fault=str(error).partition("\n")[0])
    fault = "the file holds a list, not a mapping" if OmegaConf.is_list(content) else ""
    return Choice(name, source, file, _first_comment(text), fault)


def _first_comment(text: str) -> str:
    """Return the first paragraph of the comment at the start of a config, without lines for Hydra and for editors."""
    lines = (line.strip() for line in text.splitlines())
    comment = itertools.takewhile(lambda line: line.startswith("#"), itertools.dropwhile(lambda line: not line, lines))
    texts = (line.strip("# ") for line in comment)
    words = (text for text in texts if not text.startswith(("@package", "yaml-language-server:")))
    return " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, words)))
