r"""Read the code blocks of a page as steps: the files that the page shows, and the commands to run.

A code block is one of:

- a file: its first line is `# path/to/file.py` or `# conf/group/name.yaml`.
- commands: its first line begins with a program. Each line is a command; `\` continues it, and `#` begins a comment.
  With `$ ` before the commands, the other lines are their output.
- a Python program: it begins with an import.
- a fragment: of Python or YAML.
- output or a listing: fenced as ```text.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]

FILE = re.compile(r"# [\w./-]+\.(?:py|yaml)\b")
NEXT_BLOCK = re.compile(rf"\n\s*\n(?={FILE.pattern}|(?:\$ )?trainkit )")
LISTINGS = {"text", "json", "toml", "csv"}  # languages of fenced blocks without commands
BUILTIN = {"cd", "eval", "exec", "export", "source", "test"}
# Programs that a machine may lack; a line of a page that begins with another unknown word is not taken for a command.
PROGRAMS = {"apt-get", "docker", "make", "pip", "python", "sbatch", "scontrol", "torchrun", "trainkit", "uv", "uvx"}


@dataclass(frozen=True)
class File:
    """A file that the page shows."""

    path: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command that the page shows.

    Attributes:
        line: of a shell; several lines for a Python program.
        output: the lines that the page shows below the command.
    """

    line: str
    output: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """The lines of the error messages in the output."""
        first = next((number for number, line in enumerate(self.output) if line.startswith("error: ")), None)
        return [] if first is None else self.output[first:]


Step = File | Command


class UnknownBlockError(ValueError):
    """A code block is of no known kind."""


def steps(text: str) -> list[Step]:
    """Return the files and commands of a page, in order.

    Raises:
        UnknownBlockError: a code block is of no known kind.
    """
    return [step for info, block in blocks(text) for step in steps_of(info, block)]


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each code block.

    Markdown joins indented blocks that only a blank line separates. They are separated here if a path or a command
    begins the second.
    """
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence":
            yield token.info.strip(), token.content
        elif token.type == "code_block":
            yield from (("", part) for part in NEXT_BLOCK.split(token.content))


def steps_of(info: str, block: str) -> list[Step]:
    """Return the files and commands of a code block.

    Args:
        info: the language of a fenced block.
        block: its lines.
    """
    lines = block.rstrip().splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    if info in LISTINGS or (not first and not FILE.match(lines[0])):
        return []
    if named := FILE.match(lines[0]):
        return [File(named[0].removeprefix("# "), "\n".join(lines[1:]).strip() + "\n")]
    if is_command(first.removeprefix("$ ")):
        return list(commands(lines, marked=first.startswith("$ ")))
    if is_python(block):
        program = re.match(r"(import|from) ", first)
        return [Command(f"python - <<'END_OF_PROGRAM'\n{block.rstrip()}\nEND_OF_PROGRAM")] if program else []
    if is_yaml(block):
        return []
    raise UnknownBlockError(
        f"{first!r} begins a block that is not a command, Python or YAML; fence output and listings as ```text"
    )


def commands(lines: list[str], *, marked: bool) -> Iterator[Command]:
    """Yield the commands in the lines of a code block.

    Args:
        lines: of the block.
        marked: whether `$ ` begins each command, and the other lines are output.
    """
    rest = list(lines)
    while rest:
        line = rest.pop(0)
        if not line.strip() or line.startswith("#"):
            continue
        while line.endswith("\\") and rest:
            line += "\n" + rest.pop(0)
        output = []
        while marked and rest and not rest[0].startswith("$ "):
            output.append(rest.pop(0))
        yield Command(line.removeprefix("$ "), output)


@cache
def is_command(line: str) -> bool:
    """Return whether a line begins with a program; `NAME=VALUE` may precede the program."""
    words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
    if not words:
        return False
    return words[0] in PROGRAMS | BUILTIN or (words[0].isidentifier() and shutil.which(words[0]) is not None)


def is_python(block: str) -> bool:
    """Return whether a block is Python that does something; `a - b` may be words of another language."""
    try:
        body = ast.parse(block).body
    except SyntaxError:
        return False
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in body)


def is_yaml(block: str) -> bool:
    """Return whether a block can be parsed as YAML with keys or items."""
    try:
        return isinstance(yaml.safe_load(block), dict | list)
    except yaml.YAMLError:
        return False
