"""The house: who may import whom, and how long a function of the loop may be."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import trainkit

PACKAGE = Path(trainkit.__file__).parent
LAYERS = [
    {"errors", "depth", "hooks"},
    {"nested", "rules", "coherence", "targets", "redaction", "lock", "places", "augment", "compiler", "decoded"},
    {"by_name", "optim", "schedulers", "losses", "metrics", "data", "samples", "batches", "models", "device", "schema"},
    {"state", "loaders"},
    {"steps", "cache"},
    {"loop", "run", "counting", "instantiate"},
    {"config"},
    {"build_optim", "build_data", "build_model", "snapshot", "fingerprint", "recompose"},
    {"build", "checkpoint", "display", "report", "usage"},
    {"blame", "flags", "recorder", "tables"},
    {"training", "inspection", "lr_finder", "bench"},
    {"sweep", "resuming", "verification"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The room a file belongs to: its module, or the folder commands."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path, *, typing_too: bool = True) -> set[str]:
    """Every module a file imports, at any depth of its code."""
    tree = ast.parse(file.read_text())
    if not typing_too:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level_imports(file: Path) -> set[str]:
    """The packages a file imports as soon as it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down_only(file: Path) -> None:
    if room(file) == "__init__":
        return
    for module in imports(file, typing_too=False):
        if not module.startswith("trainkit."):
            continue
        imported = module.split(".")[1]
        if imported in RANK and imported != room(file):
            assert RANK[imported] < RANK[room(file)], f"{file.name} imports {imported}"


def test_every_room_has_its_layer() -> None:
    assert {room(file) for file in FILES} - {"__init__"} <= set(RANK)


def test_the_bottom_row_imports_nothing_of_trainkit_but_errors() -> None:
    row = (
        "losses",
        "metrics",
        "data",
        "lock",
        "redaction",
        "places",
        "models",
        "device",
        "schedulers",
        "depth",
    )
    for name in (*row, "hooks", "nested", "targets", "augment", "compiler"):
        inside = {module.split(".")[1] for module in imports(PACKAGE / f"{name}.py") if module.startswith("trainkit.")}
        assert inside <= {"errors"}, name


def test_the_loop_sees_neither_config_nor_hydra_nor_rich() -> None:
    seen = {module.partition(".")[0] for module in imports(PACKAGE / "loop.py")}
    assert not seen & {"hydra", "omegaconf", "rich", "tqdm"}
    assert "trainkit.config" not in imports(PACKAGE / "loop.py")


def test_only_the_display_imports_rich_and_tqdm() -> None:
    users = {file.name for file in FILES if {"rich", "tqdm"} & {m.partition(".")[0] for m in imports(file)}}
    assert users == {"display.py"}


def test_only_one_room_instantiates_what_a_config_names() -> None:
    users = {file.name for file in FILES if "hydra.utils.instantiate" in imports(file)}
    assert users == {"instantiate.py"}


@pytest.mark.parametrize(
    "name", ["cli", "config", "schema", "flags", "errors", "targets", "coherence", "usage", "display", "run", "report"]
)
def test_what_answers_before_training_imports_no_torch(name: str) -> None:
    assert "torch" not in top_level_imports(PACKAGE / f"{name}.py")
    assert "torch" not in {module.partition(".")[0] for module in imports(PACKAGE / f"{name}.py")}


def test_no_function_of_the_loop_is_longer_than_forty_lines() -> None:
    for node in ast.walk(ast.parse((PACKAGE / "loop.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or sys.maxsize) - node.lineno + 1 <= 40, node.name


def test_the_training_step_shows_the_five_lines_of_every_tutorial() -> None:
    text = (PACKAGE / "loop.py").read_text()
    step = text[text.index("def train_step(") :]
    lines = (
        "loss = loss_fn(model(inputs), targets)",
        "optimizer.zero_grad()",
        "loss.backward()",
        "optimizer.step()",
    )
    places = [step.index(line) for line in (*lines, "loss.update(loss, weight=")]
    assert places == sorted(places)
