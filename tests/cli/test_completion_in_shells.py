"""The completion in the real shells: what a user types, and the words that the shell then passes on."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

pytestmark = pytest.mark.slow

PROMPT = "READY>"
START = {
    "bash": ["--norc", "--noprofile", "-i"],
    "zsh": ["-f", "-i"],
    "fish": ["--no-config", "-i"],
}
SETUP = {
    "bash": ["bind 'set enable-bracketed-paste off' 2> /dev/null", "bind 'set bell-style none'", f"PS1='{PROMPT}'"],
    "zsh": ["bindkey -e; unsetopt beep prompt_sp; zle_bracketed_paste=()", f"PS1='{PROMPT}'"],
    "fish": ["set -g fish_autosuggestion_enabled 0", f"function fish_prompt; echo -n '{PROMPT}'; end"],
}
INSTALL = {
    "bash": 'eval "$(trainkit -sc install=bash)"',
    "zsh": 'eval "$(trainkit -sc install=zsh)"',
    "fish": "trainkit -sc install=fish | source",
}
UNINSTALL = {
    "bash": 'eval "$(trainkit -sc uninstall=bash)"',
    "zsh": 'eval "$(trainkit -sc uninstall=zsh)"',
    "fish": "trainkit -sc uninstall=fish | source",
}
SHELLS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
    for name in START
]
ESCAPES = re.compile(r"\x1b(\[[0-9;?>=]*[a-zA-Z]|\][^\x07]*\x07|[()=>][B0]?)")


class Shell:
    """An interactive shell in a folder, in which trainkit's completion is installed.

    Args:
        name: bash, zsh or fish.
        folder: the working directory.
    """

    def __init__(self, name: str, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, "TERM": "xterm", "HOME": str(folder), "HISTFILE": ""}
        self.name = name
        self.process = pexpect.spawn(
            name, START[name], cwd=folder, env=variables, encoding="utf-8", timeout=30, dimensions=(50, 300)
        )
        for command in SETUP[name]:
            self.process.sendline(command)
        self.run(INSTALL[name])

    def run(self, command: str) -> str:
        """Run a command; return its output."""
        self.process.sendline(f"{command}; echo EN''D")
        return self.output()

    def output(self) -> str:
        """Return the output up to END. A shell that does not answer is closed."""
        try:
            self.process.expect("END")
        except pexpect.TIMEOUT:
            self.process.close(force=True)
            raise
        return ESCAPES.sub("", self.process.before)

    def complete(self, *typed: str) -> list[str]:
        """Type texts, each with a tab behind it; return the words of the command line then."""
        for text in typed:
            self.process.send(f"{text}\t")
        self.process.send("\x01")  # to the start of the line
        self.process.sendline("printf 'WO''RD<%s>\\n' ")
        self.process.sendline("echo EN''D")
        shown = self.output()
        assert "Traceback" not in shown
        return re.findall(r"WORD<(.*)>", shown)

    def list(self, typed: str) -> str:
        """Type a text and two tabs; return what the shell shows."""
        self.process.send(f"{typed}\t\t")
        self.process.send("\x15")  # delete the line
        self.process.sendline("echo EN''D")
        return self.output()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, a config of the user that is broken, and names that need quotes."""
    folder = tmp_path_factory.mktemp("shell")
    for run in ("outputs/2026-01-02/03-04-05", "outputs/2026-02-03/04-05-06", "my runs/a=b (1)"):
        (folder / run).mkdir(parents=True)
        (folder / run / "run.json").write_text("{}")
    for name in ("conf/optim", "it's", "c:d"):
        (folder / name).mkdir(parents=True)
    (folder / "conf" / "optim" / "broken.yaml").write_text("a: [1\nb: 2")
    return folder


@pytest.fixture(scope="module")
def shells() -> Iterator[dict[str, Shell]]:
    """The shells that have been started."""
    started: dict[str, Shell] = {}
    yield started
    for shell in started.values():
        shell.process.close(force=True)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, shells: dict[str, Shell], folder: Path) -> Shell:
    """Each shell, started once."""
    if request.param not in shells or shells[request.param].process.closed:
        shells[request.param] = Shell(request.param, folder)
    return shells[request.param]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["resum"], ["resume"]),
        (["optim=muon_"], ["optim=muon_sgd"]),
        (["precision=b"], ["precision=bf16"]),
        (["data.augment.fli", "ran"], ["data.augment.flip=random"]),
        (["optim=adam optim.bet", "[0.9,0.99]"], ["optim=adam", "optim.betas=[0.9,0.99]"]),
        (["-m optim=sgd,muon_"], ["-m", "optim=sgd,muon_sgd"]),
        (["'optim=muon_"], ["optim=muon_sgd"]),
        (["compare --mark"], ["compare", "--markdown"]),
        (["resume outputs/2026-02"], ["resume", "outputs/2026-02-03/04-05-06"]),
        (["report my"], ["report", "my runs/"]),
        (["report my", "a"], ["report", "my runs/a=b (1)/"]),
        (["init_from=my"], ["init_from=my runs/"]),
        (["init_from=my", "a"], ["init_from=my runs/a=b (1)/"]),
        (["optim=broken lr=0.1 seed=0 precision=b"], ["optim=broken", "lr=0.1", "seed=0", "precision=bf16"]),
        (["init_from=it"], ["init_from=it's/"]),
        (["data.root=~/my"], ["data.root=~/my runs/"]),
        (["init_from=c:"], ["init_from=c:d/"]),
        (["optim=nothing_like_this"], ["optim=nothing_like_this"]),
    ],
    ids=" ".join,
)
def test_a_tab_completes_the_word_and_the_shell_passes_it_on(shell: Shell, typed: list[str], words: list[str]) -> None:
    typed = [item.replace("[0.9,0.99]", "'[0.9,0.99]'") for item in typed]
    assert shell.complete(f"trainkit {typed[0]}", *typed[1:]) == ["trainkit", *words]


def test_a_variable_before_the_command_and_a_path_to_it_do_not_matter(shell: Shell) -> None:
    program = Path(sys.executable).with_name("trainkit")
    assert shell.complete(f"X=1 {program} precision=b") == ["X=1", str(program), "precision=bf16"]


def test_two_tabs_list_the_values_of_an_enumeration(shell: Shell) -> None:
    shown = shell.list("trainkit precision=")
    assert all(value in shown for value in ("fp32", "tf32", "bf16", "fp16"))


def test_two_tabs_list_the_runs_and_the_word_last(shell: Shell) -> None:
    shown = shell.list("trainkit resume ")
    assert all(value in shown for value in ("last", "2026-01-02/03-04-05", "2026-02-03/04-05-06"))


def test_a_line_that_cannot_be_completed_shows_no_error(shell: Shell) -> None:
    shown = shell.list("trainkit optim=broken optim.")
    assert not {"error", "Traceback", "expected"} & set(re.findall(r"\w+", shown))


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_keeps_the_users_word_breaks(folder: Path) -> None:
    shell = Shell("bash", folder)
    assert "=" in shell.run('echo "<$COMP_WORDBREAKS>"').rpartition("<")[2]
    shell.process.close(force=True)


@pytest.mark.parametrize("name", SHELLS)
def test_uninstall_removes_the_completion(name: str, folder: Path) -> None:
    shell = Shell(name, folder)
    shell.run(UNINSTALL[name])
    assert shell.complete("trainkit optim=muon_") == ["trainkit", "optim=muon_"]
    shell.process.close(force=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_uninstall_restores_the_completion_before_it_even_after_two_installs(folder: Path) -> None:
    shell = Shell("bash", folder)
    shell.run(UNINSTALL["bash"])
    shell.run("complete -W 'an_older_word' trainkit")
    shell.run(INSTALL["bash"])
    shell.run(INSTALL["bash"])
    shell.run(UNINSTALL["bash"])
    assert shell.complete("trainkit an_o") == ["trainkit", "an_older_word"]
    shell.process.close(force=True)
