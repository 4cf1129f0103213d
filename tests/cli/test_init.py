"""`trainkit init DIR` writes a whole project or nothing, and what the README of the project says works."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import trainkit as package
from tests.conftest import SCRIPT
from tests.helpers import files_in, read_history
from trainkit.cli import project
from trainkit.cli.main import main
from trainkit.config.search_path import CONF

ROOT = Path(__file__).parents[2]
FILES = [
    ".gitignore",
    ".vscode/settings.json",
    "Makefile",
    "README.md",
    "conf/data/rings.yaml",
    "conf/experiment/baseline.yaml",
    "conf/model/net.yaml",
    "conf/param_groups/fast_head.yaml",
    "flowers/__init__.py",
    "flowers/data.py",
    "flowers/models.py",
    "pyproject.toml",
    "tests/test_training.py",
    "trainkit.schema.json",
]


def refusal(name: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Return what `trainkit init NAME` says. It must fail, and print nothing to stdout."""
    assert main(["init", name]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_it_prints_the_files_that_it_writes_and_the_next_commands(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "flowers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert files_in(here / "flowers") == FILES
    assert lines[1 : lines.index("")] == [f"  {file}" for file in FILES]
    commands = [line.partition("#")[0].strip() for line in lines[lines.index("next:") + 1 :]]
    assert commands[:4] == ["cd flowers", "trainkit experiment=baseline", "make setup", "make test"]


def test_the_working_directory_can_become_a_project(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "flowers"
    folder.mkdir()
    os.chdir(folder)
    assert main(["init", "."]) == 0
    assert files_in(folder) == FILES
    assert "cd " not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["My-Flowers", "my flowers", "my.flowers", "_my_flowers_", "new/folders/my_flowers"])
def test_the_package_has_the_name_of_the_directory_with_underscores(name: str, here: Path) -> None:
    assert main(["init", name]) == 0
    folder = here / name
    assert (folder / "my_flowers" / "models.py").exists()
    texts = {file: (folder / file).read_text() for file in files_in(folder)}
    assert not [file for file, text in texts.items() if project.PLACEHOLDER in text or project.PLACEHOLDER in file]
    assert yaml.safe_load(texts["conf/model/net.yaml"])["_target_"] == "my_flowers.models.Net"
    assert tomllib.loads(texts["pyproject.toml"])["project"]["name"] == "my_flowers"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("3d", "begin with a letter"),
        ("_", "begin with a letter"),
        ("blümchen", "of a-z"),
        ("a+b", "of a-z"),
        ("x" * 51, "at most 50"),
        ("/", "begin with a letter"),
        ("class", "keyword of Python"),
        ("random", "is installed"),
        ("sys", "is installed"),
        ("winreg", "is installed"),  # only on Windows
        ("Torch", "is installed"),
        ("hydra-plugins", "is installed"),  # a package without __init__.py
        ("trainkit", "is installed"),
        ("conf", "a project uses"),
        ("tests", "a project uses"),
        ("dist", "a project uses"),
        ("wandb", " wandb "),
    ],
)
def test_a_name_that_cannot_be_a_package_is_an_error(
    name: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(name, capsys)
    assert list(here.iterdir()) == []


def test_the_packages_of_the_extras_are_not_names_whether_they_are_installed_or_not(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # nothing is installed
    names = {Requirement(line).name for line in metadata.requires("trainkit") or []}
    assert {"wandb", "datasets", "optuna"} <= names
    for name in names - {"hydra-core"} - {name for name in names if "launcher" in name}:  # modules of other names
        with pytest.raises(package.ConfigError, match="trainkit imports"):
            project.package_name(here / name)


@pytest.mark.parametrize("argv", [[], [""], ["a", "b"], ["--force"], ["flowers", "lr=1"]])
def test_other_than_one_directory_is_an_error(argv: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *argv]) == 2
    assert "trainkit init DIR" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_the_content_of_a_folder_is_listed_and_kept_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / "flowers"
    (folder / "photos").mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    (folder / ".gitignore").write_text("mine")  # hidden, but a file of the project
    (folder / "Makefile").symlink_to("missing")
    assert "flowers is not empty: it contains .gitignore, Makefile, README.md, photos\n" in refusal("flowers", capsys)
    assert files_in(folder) == [".gitignore", "Makefile", "README.md"]
    assert (folder / "README.md").read_text() == "mine"


def test_the_list_of_a_large_folder_is_short(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "flowers").mkdir()
    for number in range(100):
        (here / "flowers" / f"{number}.png").touch()
    assert " and 80 more\n" in refusal("flowers", capsys)


def test_a_second_init_changes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "flowers"]) == 0
    (here / "flowers" / "flowers" / "models.py").write_text("mine")
    capsys.readouterr()
    refusal("flowers", capsys)
    assert (here / "flowers" / "flowers" / "models.py").read_text() == "mine"


def test_a_folder_with_other_hidden_files_becomes_a_project_and_keeps_them(here: Path) -> None:
    (here / "flowers" / ".git").mkdir(parents=True)
    (here / "flowers" / ".git" / "HEAD").write_text("mine")
    assert main(["init", "flowers"]) == 0
    assert files_in(here / "flowers") == [".git/HEAD", *FILES]


def test_a_project_inside_a_project_is_complete_and_leaves_the_outer_one(here: Path) -> None:
    assert main(["init", "flowers"]) == 0
    os.chdir(here / "flowers")
    assert main(["init", "roses"]) == 0
    inner = [f"roses/{file.replace('flowers', 'roses')}" for file in FILES]
    assert files_in(here / "flowers") == sorted([*FILES, *inner])


@pytest.mark.parametrize("kind", ["a file", "a dangling link"])
def test_a_file_or_a_dangling_link_of_that_name_is_an_error(
    kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "a file":
        (here / "flowers").write_text("mine")
    else:
        (here / "flowers").symlink_to(here / "missing")
    assert "flowers: a file, or a link" in refusal("flowers", capsys)
    assert [path.name for path in here.iterdir()] == ["flowers"]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [("n" * 300, "", package.StorageError), ("c", "\ud800", UnicodeEncodeError), ("a/b/c", "", package.StorageError)],
    ids=["a name that the disk refuses", "a text that UTF-8 refuses", "a folder that is a file"],
)
def test_a_write_that_fails_leaves_nothing_behind(name: str, text: str, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for directory in (tmp_path / "old", tmp_path / "new" / "folder"):
        with pytest.raises(error):
            project.write_all(directory, {"a/b": "text", "d": "text", name: text})
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that Python closes itself
@pytest.mark.parametrize("number", range(2, 22))  # before line 2 of the function, nothing is written
def test_an_interruption_at_any_line_leaves_nothing_behind(number: int, tmp_path: Path) -> None:
    begun = 0

    def interrupt(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal begun
        if frame.f_code is not project.write_all.__code__:
            return None
        begun += event == "line"
        if begun == number:
            raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            project.write_all(tmp_path / "new" / "folder", {"a/b": "text", "c": "text"})
    finally:
        sys.settrace(None)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_after_the_check_is_kept(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(package.StorageError, match="exists"):
        project.write_all(tmp_path, {"a": "text", "b": "text"})
    assert files_in(tmp_path) == ["b"]
    assert (tmp_path / "b").read_text() == "mine"


def test_no_config_of_the_template_has_the_name_of_a_shipped_config() -> None:
    configs = [file.relative_to(project.TEMPLATE / "conf") for file in project.TEMPLATE.glob("conf/*/*.yaml")]
    assert len(configs) == 4
    assert [config for config in configs if (CONF / config).exists()] == []


def test_the_template_asks_for_a_version_that_has_these_functions() -> None:
    (dependency,) = tomllib.loads((project.TEMPLATE / "pyproject.toml").read_text())["project"]["dependencies"]
    assert Version(package.__version__) in Requirement(dependency).specifier


def test_the_schema_of_a_project_fits_its_files_and_not_those_around_it(here: Path) -> None:
    (here / "conf" / "data").mkdir(parents=True)
    (here / "conf" / "data" / "outer.yaml").write_text("window: 3\n")
    assert main(["init", "flowers"]) == 0
    schema = json.loads((here / "flowers" / "trainkit.schema.json").read_text())
    experiment = yaml.safe_load((here / "flowers/conf/experiment/baseline.yaml").read_text())
    valid = jsonschema.Draft202012Validator(schema).is_valid
    assert valid(experiment)
    assert valid({**experiment, "data": {"noise": 0.1}})
    assert not valid({**experiment, "data": {"window": 3}})
    assert not valid({**experiment, "epoch": 3})


def test_every_reference_to_the_schema_leads_to_it(here: Path) -> None:
    assert main(["init", "flowers"]) == 0
    folder = here / "flowers"
    settings = json.loads((folder / ".vscode/settings.json").read_text())
    assert all(
        (folder / name).is_file() and list(folder.glob(files)) for name, files in settings["yaml.schemas"].items()
    )
    lines = {file: re.findall(r"\$schema=(\S+)", file.read_text()) for file in folder.glob("conf/*/*.yaml")}
    links = [(file, *link.partition("#")) for file, found in lines.items() for link in found]
    assert {file.parent.name for file, *_ in links} == {"data", "experiment"}
    for file, name, _, pointer in links:
        found = json.loads((file.parent / name).read_text())
        for key in pointer.split("/")[1:]:
            found = found[key]
        assert found["properties"]


def test_the_readme_lists_every_file(here: Path) -> None:
    assert main(["init", "flowers"]) == 0
    text = (here / "flowers" / "README.md").read_text()
    plain = {".gitignore", "Makefile", "README.md", "pyproject.toml", "flowers/__init__.py"}
    assert [file for file in FILES if file not in plain and f"`{file}`" not in text and f"{file}`" not in text] == []


def test_the_command_imports_neither_torch_nor_hydra(here: Path) -> None:
    code = "import sys, trainkit.cli.main as cli; cli.main(['init', 'a']); print({'torch', 'hydra'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project."""
    folder = tmp_path_factory.mktemp("projects") / "flowers"
    project.create_project(folder)
    return folder


def run_in(folder: Path, *command: str) -> str:
    """Run a command in a project, with the trainkit of this environment; return its stdout."""
    path = f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_command_of_the_readme_of_a_project_works(flowers: Path) -> None:
    lines = re.findall(r"^    (trainkit .*?) *#", (flowers / "README.md").read_text(), re.M)
    assert len(lines) == 10
    printed = [run_in(flowers, *shlex.split(line)) for line in lines]
    assert "best of 20 epochs" in printed[0]
    assert "no errors found" in printed[4]
    assert "best of 40 epochs" in printed[5]
    assert "equal to the numbers of epoch" in printed[6]
    assert (flowers / "outputs" / "latest" / "summary.json").exists()  # of the sweep

    accuracies = [row["val/accuracy"] for row in read_history(next(flowers.glob("outputs/2*/*")))]
    assert max(accuracies) > 0.88  # as its experiment says; random guesses reach 0.33


@pytest.mark.slow
def test_the_targets_of_the_makefile_of_a_project_work(flowers: Path) -> None:
    python = f"PYTHON={sys.executable}"
    assert "4 passed" in run_in(flowers, "make", "test", python)
    schema = (flowers / "trainkit.schema.json").read_text()
    run_in(flowers, "make", "schema", python)
    assert (flowers / "trainkit.schema.json").read_text() == schema
    assert "best of 20 epochs" in run_in(flowers, "make", "train", python)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("flowers/models.py", "self.head(self.body(points))", "self.body(points)"),
        ("conf/experiment/baseline.yaml", "lr: 0.005", "lr: 0"),
        ("conf/experiment/baseline.yaml", "epochs: 20", "epoch: 20"),
        ("flowers/data.py", ".manual_seed(seed)", ""),
    ],
)
def test_the_tests_of_a_project_fail_after_a_mistake(file: str, old: str, new: str, tmp_path: Path) -> None:
    folder = tmp_path / "flowers"
    project.create_project(folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "failed" in done.stdout
