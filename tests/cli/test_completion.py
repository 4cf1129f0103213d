"""The words that complete a command line, in any shell."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Command
from trainkit.cli.completion.candidates import candidates
from trainkit.cli.completion.line import Line, bash_replacement, read_line
from trainkit.cli.completion.scripts import HINTS, script
from trainkit.cli.help import COMMAND_FLAGS, command_names
from trainkit.config.check import all_keys
from trainkit.config.choices import find_groups, find_names
from trainkit.config.compose import compose


def found(text: str) -> set[str]:
    """Return the completions of a command line after `trainkit`."""
    line = read_line(f"trainkit {text}")
    return set(candidates(line.words, line.current))


def write(file: str, text: str = "") -> None:
    """Write a file into a folder that may not exist."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)


def test_an_empty_line_offers_commands_groups_and_root_keys() -> None:
    words = found("")
    assert set(command_names()) <= words
    assert {f"{group}=" for group in find_groups()} <= words
    assert {key.partition(".")[0] for key in all_keys(compose())} <= {word.rstrip("=.") for word in words}


@pytest.mark.parametrize("group", find_groups())
def test_a_group_offers_its_choices(group: str) -> None:
    assert found(f"{group}=") == {f"{group}={name}" for name in find_names(group)}


def test_the_keys_are_those_of_the_composed_config() -> None:
    for overrides in ([], ["optim=adam"], ["experiment=dcgan"], ["optim=muon_sgd"]):
        keys = [key for key in all_keys(compose(overrides)) if key.startswith("optim.")]
        first = {key.split(".")[1] for key in keys}
        assert {word.rstrip("=.") for word in found(f"{shlex.join(overrides)} optim.")} == {f"optim.{k}" for k in first}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("precision=", "precision=fp32 precision=tf32 precision=bf16 precision=fp16"),
        ("train precision=b", "precision=bf16"),
        ("deterministic=", "deterministic=true deterministic=false deterministic=off"),
        ("device=", "device=auto device=cpu device=mps device=cuda"),
        ("search.pruner=m", "search.pruner=median"),
        ("data.shuffle=", "data.shuffle=on data.shuffle=true data.shuffle=off"),
        ("data.sampler=b", "data.sampler=balanced"),
        ("lr=", "lr=0.01"),
        ("optim=adam lr=", "lr=0.001"),
        ("optim.nesterov=", "optim.nesterov=true optim.nesterov=false"),
        ("-m optim=sgd,adamw,muon_", "optim=sgd,adamw,muon_sgd"),
        ("-m precision=fp32,t", "precision=fp32,tf32"),
        ("~data.augment.cutm", "~data.augment.cutmix"),
        ("~optim=muon_", "~optim=muon_sgd"),
        ("++optim.momen", "++optim.momentum="),
        ("optim.momen", "optim.momentum="),
        ("data.augm", "data.augment."),
        ("-m seed=0,1 search.tri", "search.trials="),
        ("optim=adam,sgd -m optim.amsg", ""),
        ("epoch=1 optim=sgd lr=0.1 optim.momen", "optim.momentum="),
        ("optim.nothing.", ""),
        ("watch=[a,b].", ""),
        ("-c ", "job hydra all"),
        ("--cfg j", "job"),
        ("compare --mark", "--markdown"),
        ("bench --st", "--steps"),
        ("bench --steps ", ""),
        ("find-lr --e", "--end"),
        ("export last --format o", "onnx"),
        ("export last --checkpoint ", "best last"),
        ("export last --with", "--with-preprocessing"),
        ("list opt", "optim"),
        ("list optim a", ""),
        ("why optim.mom", "optim.momentum"),
        ("why optim.lr precision=f", "precision=fp32 precision=fp16"),
        ("why param_gr", "param_groups param_groups."),
        ("nonsense optim=muon_", "optim=muon_sgd"),
        ("train --versio", "--version"),
        ("-sc install=f", "install=fish"),
    ],
)
def test_words_are_completed_by_what_may_stand_there(text: str, expected: str) -> None:
    assert found(text) == set(expected.split())


def test_every_flag_of_every_command_is_offered() -> None:
    for row, text in COMMAND_FLAGS.items():
        flags = {part.split()[0] for part in row.split(", ") if part.startswith("-")}
        for command in text.partition(":")[0].split(", "):
            if command in command_names():
                assert flags <= found(f"{command} --"), command


@pytest.fixture
def runs(here: Path) -> Path:
    """A folder with two runs, a sweep, a run elsewhere and other files."""
    for name in ("outputs/2026-01-02/03-04-05", "outputs/2026-02-03/04-05-06", "more/a"):
        write(f"{name}/run.json")
    write("outputs/sweeps/2026-01-01/01-01-01/sweep.jsonl")
    write("outputs/sweeps/2026-01-01/01-01-01/0/run.json")
    write("photos/one.jpg")
    write("a file.csv")
    return here


NEWEST = {"last", "outputs/2026-01-02/03-04-05", "outputs/2026-02-03/04-05-06", "outputs/sweeps/2026-01-01/01-01-01"}


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resume ", NEWEST | {"more/"}),
        ("compare ", NEWEST | {"more/"}),
        ("compare last ", NEWEST | {"more/"}),
        ("report outputs/2026-02", {"outputs/2026-02-03/04-05-06"}),
        ("resume outputs/sweeps/2026-01-01/01-01-01/", {"outputs/sweeps/2026-01-01/01-01-01/0/"}),
        ("resume mo", {"more/"}),
        ("resume more/", {"more/a/"}),
        ("resume last epo", {"epochs="}),
        ("report last ", set()),
        ("init_from=mo", {"init_from=more/"}),
        ("data.file=a", {"data.file=a file.csv"}),
        ("data.root=ph", {"data.root=photos/"}),
        ("data.file=./ph", {"data.file=./photos/"}),
        ("-cd ph", {"photos/"}),
        ("init ph", {"photos/"}),
    ],
)
def test_runs_and_files_are_completed_where_they_may_stand(text: str, expected: set[str]) -> None:
    assert found(text) == expected


def test_choices_of_the_users_folders_are_offered(here: Path) -> None:
    write("conf/optim/mine.yaml", "a: [1\nb")  # a broken file is a choice, too
    write("more/optim/other one.yaml", "_target_: a.B")
    assert found("optim=min") == {"optim=mine"}
    assert found("-cd more optim=oth") == {"optim=other one"}
    assert found("optim=mine lr=0.1 optim.mom") == {"optim.momentum="}  # as if the broken choice was not given
    assert (here / "conf").is_dir()


def test_a_name_with_a_control_character_is_not_offered(here: Path) -> None:
    write("data/a\nb")
    write("data/c\x1b")
    write("data/d")
    assert found("data.root=data/") == {"data.root=data/d"}
    assert here.is_dir()


WORDS = [
    "optim=adam",
    "a b",
    "it's",
    'say "x"',
    "$HOME",
    "a\\b",
    "(1)",
    "[1,2]",
    "é",
    "a&b;c",
    "",
    "#x",
    "*",
    "~/a",
    "!x",
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_line_is_read_as_bash_reads_it() -> None:
    line = " ".join(shlex.quote(word) for word in WORDS) + r' a\ b "c d"e\"f "x\y\$z" g'
    program = 'printf "%s\\0" ' + line
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    expected = done.stdout.split("\0")[:-1]
    read = read_line(f"VARIABLE=1 trainkit {line}")
    assert [*read.words, read.current] == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    "candidate", ["optim=adam", "data.file=a b/c (1)&;|.csv", "x='y'", "a$b`c`", 'q"r"s', "t\\u", "é=ü"]
)
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_what_bash_inserts_is_read_back_as_the_candidate(candidate: str, quote: str) -> None:
    for split in range(2):
        # What was typed: nothing, or the first word without special characters.
        typed = candidate[: candidate.find("=") + 1] if split and candidate[:1].isalpha() else ""
        kept = "" if quote else typed  # bash's word begins after the last `=`, but not in quotes
        line = Line([], typed, quote + typed, quote)
        inserted = bash_replacement(candidate, line, typed if quote else "")
        command = f"printf %s {quote}{kept}{inserted}{quote}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout == candidate


@pytest.mark.parametrize("shell", HINTS)
@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_the_scripts_are_valid_in_their_shell(shell: str, action: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    text = script(action, shell, "trainkit")
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_query_imports_no_torch_and_prints_no_error(trainkit: Command, tmp_path: Path) -> None:
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "broken.yaml").write_text("a: [1\nb")
    done = trainkit("-sc", "query=fish", COMP_LINE="trainkit data=broken data.spl", PYTHONPROFILEIMPORTTIME="1")
    assert (done.returncode, done.stdout.split()) == (0, ["data.split="])
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "omegaconf" in imported
    assert "torch" not in imported
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "text",
    [
        "'",
        '"',
        "\\",
        "optim='",
        "a=b=c=",
        "=",
        "+",
        "~",
        "++",
        ".",
        "..",
        "-",
        "--=",
        "\0",
        "${",
        "x" * 5000,
        "a.b[0].",
        "optim.=",
        "optim..",
        "[",
        "{a: 1}.",
        "list ",
        "why =",
        "--cfg=",
        "é",
        "data.train._target_=",
        "hydra.",
        "hydra/",
        "hydra/launcher=",
    ],
)
def test_no_line_is_an_error(text: str) -> None:
    assert isinstance(candidates(*_split(text)), list)


def _split(text: str) -> tuple[Sequence[str], str]:
    line = read_line(f"trainkit {text}")
    return line.words, line.current


def test_unknown_shells_and_actions_are_errors_with_a_hint(trainkit: Command) -> None:
    for words in (["-sc", "install=tcsh"], ["-sc"], ["-sc", "query=bash"]):
        environment = {key: "" for key in os.environ if key == "COMP_LINE"}
        done = trainkit(*words, **environment)
        assert done.returncode == 2
        assert "install=" in done.stderr
