"""Every command in the README, the docs and the examples runs, in an empty folder, with an installed trainkit."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_server import CommandServer, shorten
from tests.docs_inputs import BEFORE, CONTINUED, make_inputs
from tests.docs_pages import PAGES, ROOT, Command, File, Step, UnknownBlockError, steps
from tests.wheel import shared_wheel

# Commands that are not run: a pattern, and why.
NOT_RUN = {
    "^make ": "it installs packages, or runs all tests of a repository",
    "^(pip|uv) ": "it installs packages",
    "hydra/launcher=ray": "it needs a package that cannot be installed next to the others, and a cluster",
    "hydra/launcher=submitit_slurm": "it needs a cluster",
    "^sbatch ": "it needs a cluster; tests/distributed/test_slurm_script.py runs the script with stand-ins for SLURM",
    "^torchrun --nnodes": "it needs several machines",
    "bench --try": "it measures for minutes; tests/diagnostics/test_try_settings.py measures a few choices",
}
# Commands of which only the config is composed: a pattern, and why.
COMPOSED = {"data=cifar10": "the data set is a download"}
# torchrun starts real processes of the wheel, so its command line is shortened here.
LIMITS = "limit_batches=2 limit_val_batches=1"
# What stands for a run or a sweep of the reader is the newest.
PLACEHOLDERS = {
    r"outputs/sweeps/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d": "$(ls -td outputs/sweeps/*/* | head -n 1)",
    r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d": "$(ls -td outputs/2*/* | head -n 1)",
}


def page_name(page: Path) -> str:
    """Return the path of a page in the repository."""
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    """The programs of the wheel."""
    started = CommandServer(shared_wheel(tmp_path_factory))
    yield started
    started.close()


class Session:
    """A shell in the folder of a page. Its working folder and variables last from command to command.

    Args:
        server: runs the programs.
        folder: of the page.
    """

    def __init__(self, server: CommandServer, folder: Path) -> None:
        self.server, self.folder, self.state = server, folder, folder.with_suffix(".state")
        self.state.write_text("")

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line."""
        save = f"code=$?; {{ export -p; printf 'cd %q\\n' \"$PWD\"; }} > {self.state}; exit $code"
        return self.server.run(f". {self.state}\n{line}\n{save}", self.folder)

    def write(self, file: File) -> None:
        """Write a file that the page shows."""
        path = self.folder / file.path
        before = path.read_text() if file.path in CONTINUED and path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before + file.text)


def problem(command: Command, done: subprocess.CompletedProcess[str]) -> str | None:
    """Return how the end of a command differs from what its page shows; None if it does not."""
    if command.errors:
        shown = "\n".join(command.errors)
        as_shown = done.returncode not in (0, 1) and shown in done.stderr
        return None if as_shown else f"exit code {done.returncode}, and not this error:\n{shown}\n{done.stderr[-3000:]}"
    return f"exit code {done.returncode}\n{done.stdout[-800:]}{done.stderr[-3000:]}" if done.returncode else None


def prepare(page: Path, found: Sequence[Step], session: Session) -> None:
    """Make the inputs of a page, and the files that it shows. A command may precede the file that it needs."""
    if page.parent.parent == ROOT / "examples":  # its commands run in its folder
        ignored = shutil.ignore_patterns("outputs", "*.pt", "__pycache__")
        shutil.copytree(page.parent, session.folder, ignore=ignored, dirs_exist_ok=True)
    make_inputs("\n".join(step.line for step in found if isinstance(step, Command)), session.folder)
    first = {step.path: step for step in reversed(found) if isinstance(step, File)}
    for file in first.values():
        session.write(file)


def commands_to_run(name: str, command: Command) -> list[Command]:
    """Return what to run for a command of a page.

    Args:
        name: of the page.
        command: as the page shows it.
    """
    if any(re.search(pattern, command.line) for pattern in NOT_RUN):
        return []
    before = [
        Command(line)
        for (page, start), lines in BEFORE.items()
        for line in lines
        if page == name and command.line.startswith(start)
    ]
    line = command.line
    for placeholder, newest in PLACEHOLDERS.items():
        line = re.sub(placeholder, newest, line)
    if any(re.search(pattern, line) for pattern in COMPOSED):
        line = line.partition(" #")[0] + " --cfg job"
    if line.startswith("torchrun ") and " resume " not in line:
        line = line.partition(" #")[0] + f" {LIMITS}"
    return [*before, replace(command, line=line)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_of_a_page_runs(page: Path, server: CommandServer, tmp_path: Path) -> None:
    found = steps(page.read_text())
    (tmp_path / "folder").mkdir()
    session = Session(server, tmp_path / "folder")
    prepare(page, found, session)
    problems = []
    for step in found:
        if isinstance(step, File):
            if step.path not in CONTINUED:  # a page may show a second version
                session.write(step)
            continue
        for command in commands_to_run(page_name(page), step):
            if text := problem(command, session.run(command.line)):
                problems.append(f"$ {command.line}\n{text}")
    assert not problems, "\n\n".join(problems)


@pytest.mark.slow
def test_a_session_keeps_its_folder_and_its_variables(server: CommandServer, tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    session = Session(server, tmp_path / "folder")
    assert session.run("export WIDTH='a b' && cd inner").returncode == 0
    done = session.run("""python -c 'import os; print(os.getcwd(), os.environ["WIDTH"])'""")
    assert done.stdout.strip() == f"{tmp_path / 'folder' / 'inner'} a b"


@pytest.mark.slow
def test_the_programs_are_those_of_the_wheel_and_end_as_real_processes(server: CommandServer, tmp_path: Path) -> None:
    session = Session(server, tmp_path)
    shown = session.run("python -c 'import trainkit; print(trainkit.__file__)' | tail -n 1").stdout.strip()
    assert shown == f"{server.env['PYTHONPATH']}/trainkit/__init__.py"
    assert session.run("python -c 'import sys; sys.exit(3)'").returncode == 3
    assert session.run("trainkit lr=-1 && echo no").returncode == 2
    killed = session.run("python -c 'import os; os.kill(os.getpid(), 9)'")
    assert killed.returncode == 128 + 9
    assert "Traceback" in session.run("python -c 'import no_such_module'").stderr


def test_the_end_of_a_command_is_compared_with_the_page() -> None:
    def ended(code: int, err: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess("", code, "", err)

    error = "error: lr=-1: must be at least 0\n  for example lr=0.01"
    fails = Command("trainkit lr=-1", error.splitlines())
    works = Command("trainkit", ["epoch 1"])
    assert problem(works, ended(0)) is None
    assert problem(fails, ended(2, f"a note\n{error}\n")) is None
    assert problem(works, ended(2, error)) == f"exit code 2\n{error}"
    assert all(problem(fails, done) for done in (ended(0, error), ended(1, error), ended(2, "error: lr=-1: another")))


def every_command() -> list[tuple[str, Command]]:
    """Return the commands of all pages, with the names of the pages."""
    return [(page_name(page), step) for page in PAGES for step in steps(page.read_text()) if isinstance(step, Command)]


def test_the_exceptions_are_used() -> None:
    lines = [command.line for _, command in every_command()]
    patterns = [*NOT_RUN, *COMPOSED, *PLACEHOLDERS]
    assert [pattern for pattern in patterns if not any(re.search(pattern, line) for line in lines)] == []
    starts = [(page, start) for page, start in BEFORE]
    assert [
        (page, start)
        for page, start in starts
        if sum(name == page and command.line.startswith(start) for name, command in every_command()) != 1
    ] == []


def test_a_page_gives_its_files_commands_and_their_output() -> None:
    page = """
Text, and `trainkit --not-a-command`:

    $ trainkit optim=sgdd   # a comment
    error: optim=sgdd: optim has no choice 'sgdd'
      did you mean optim=sgd?
    $ trainkit -m \\
        seed=0,1

- A list:

      trainkit data=mine

      # conf/data/mine.yaml: a file
      train: null

```python
import trainkit
print(trainkit)
```

```text
trainkit is a word of this output
```

    class Fragment: ...

    key: value
"""
    error = ["error: optim=sgdd: optim has no choice 'sgdd'", "  did you mean optim=sgd?"]
    assert steps(page) == [
        Command("trainkit optim=sgdd   # a comment", error),
        Command("trainkit -m \\\n    seed=0,1"),
        Command("trainkit data=mine"),
        File("conf/data/mine.yaml", "train: null\n"),
        Command("python - <<'END_OF_PROGRAM'\nimport trainkit\nprint(trainkit)\nEND_OF_PROGRAM"),
    ]
    assert steps(page)[0].errors == error


@pytest.mark.parametrize("block", ["unknown-program --option", "some output: of a command: 5", "a table  of words"])
def test_a_block_of_an_unknown_kind_is_an_error(block: str) -> None:
    with pytest.raises(UnknownBlockError):
        steps(f"Text:\n\n    {block}\n")


@pytest.mark.parametrize(
    ("line", "short"),
    [
        ("lr=0.1", "lr=0.1 limit_batches=2 limit_val_batches=1 max_minutes=0.01"),
        ("-m lr=0.1,0.2 max_minutes=30", "-m lr=0.1,0.2 max_minutes=0.01 limit_batches=2 limit_val_batches=1"),
        ("resume last", "resume last"),
        ("resume last epochs=40", "resume last epochs=40 max_minutes=0.02"),
        ("verify-resume --kills 2", "verify-resume --kills 2 limit_batches=2 limit_val_batches=1"),
        ("bench lr=0.1", "bench lr=0.1 --steps=2"),
        ("compare outputs", "compare outputs"),
        ("--cfg job", "--cfg job"),
    ],
)
def test_a_training_is_shortened(line: str, short: str) -> None:
    assert shorten(line.split()) == short.split()
