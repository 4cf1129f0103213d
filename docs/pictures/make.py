"""Make the pictures of the README from real runs: `python docs/pictures/make.py` (needs pexpect and pyte).

Each picture is the screen of a terminal in which the command ran, as an SVG file.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import tempfile
import time
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

HERE = Path(__file__).parent
COLUMNS = 100
NAMES = {"brown": "yellow", "default": None}  # pyte's name -> the name of rich


def main() -> None:
    """Run the commands and write the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        show("live.svg", "trainkit model=toy_cnn optim=sgd lr=0.01", folder, rows=24, until=r"epoch +14/")
        sweep = "trainkit -m optim=sgd,adam,adadelta seed=0,1,2 epochs=10 hydra.sweep.dir=sweeps/a progress=off"
        pexpect.run(sweep, cwd=folder, timeout=600)
        show("compare.svg", "trainkit compare sweeps/a --group-by optim", folder, rows=10)


def show(name: str, command: str, folder: str, *, rows: int, until: str | None = None) -> None:
    """Run a command in a terminal and write a picture of its screen.

    Args:
        name: of the picture.
        command: is shown above its output.
        folder: where the command runs.
        rows: of the terminal.
        until: a pattern; the picture shows the screen when it first matches. None: at the end of the command.
    """
    words = shlex.split(command)
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(rows)}
    child = pexpect.spawn(words[0], words[1:], cwd=folder, env=env, dimensions=(rows, COLUMNS), timeout=None)
    screen = pyte.Screen(COLUMNS, rows)
    stream = pyte.ByteStream(screen)
    while child.isalive() or child.buffer:
        try:
            stream.feed(child.read_nonblocking(4096, timeout=0.2))
        except pexpect.TIMEOUT:
            continue
        except pexpect.EOF:
            break
        if until and re.search(until, "\n".join(screen.display)):
            time.sleep(0.5)
            stream.feed(child.read_nonblocking(65536, timeout=1))
            child.terminate(force=True)
            break
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), command))
    lines = [line_of(screen, row) for row in range(rows)]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    picture = console.export_svg(title=command)
    # The fonts of rich come from another site; a picture must not make requests.
    picture = re.sub(r"@font-face {.*?}\n", "", picture, flags=re.DOTALL).replace("Fira Code, ", "")
    (HERE / name).write_text(picture)


def line_of(screen: pyte.Screen, row: int) -> Text:
    """Return a row of a terminal with its colours."""
    text = Text()
    for column in range(screen.columns):
        char = screen.buffer[row][column]
        colour = NAMES.get(char.fg, char.fg)
        if colour and re.fullmatch(r"[0-9a-f]{6}", colour):
            colour = f"#{colour}"
        elif colour and colour.startswith("bright"):
            colour = f"bright_{colour.removeprefix('bright')}"
        text.append(char.data, Style(color=colour, bold=char.bold, reverse=char.reverse))
    text.rstrip()
    return text


if __name__ == "__main__":
    main()
