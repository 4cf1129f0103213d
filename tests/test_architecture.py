"""The architecture: which folder may import which, and the size of files and functions."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import trainkit

PACKAGE = Path(trainkit.__file__).parent
# A folder may import the folders in the rows above.
LAYERS = [
    {"core"},
    {"config", "data", "optim", "display", "models", "model_libraries", "losses", "metrics"}
    | {"image_models", "adapters", "detection", "steps"},
    {"training", "hooks"},
    {"build", "runs", "debugging"},
    {"engine"},
    {"distillation"},
    {"sweeps", "diagnostics"},
    {"cli"},
    {"__main__", "project_template"},
]
RANK = {folder: rank for rank, layer in enumerate(LAYERS) for folder in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def folder_of(file: Path) -> str:
    """Return the folder of a file, or the name of a file at the top of the package."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path, *, typing_too: bool = True) -> set[str]:
    """Return every module that a file imports, also inside functions."""
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


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    importer = folder_of(file)
    if importer == "__init__":
        return
    for module in imports(file, typing_too=False):
        if not module.startswith("trainkit."):
            continue
        imported = module.split(".")[1]
        if imported in RANK and imported != importer:
            assert RANK[imported] < RANK[importer], f"{file.relative_to(PACKAGE)} imports {module}"


def test_every_folder_belongs_to_a_layer() -> None:
    assert {folder_of(file) for file in FILES} - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("file", sorted((PACKAGE / "training").glob("*.py")), ids=lambda f: f.stem)
def test_training_imports_neither_config_nor_hydra_nor_rich(file: Path) -> None:
    assert not {module.partition(".")[0] for module in imports(file)} & {"hydra", "omegaconf", "rich", "tqdm"}
    assert not any(module.startswith("trainkit.config") for module in imports(file))


def test_only_config_and_runs_read_a_dictconfig() -> None:
    readers = {folder_of(file) for file in FILES if "omegaconf.OmegaConf" in imports(file)}
    assert readers == {"config", "runs"}


def test_only_the_display_imports_rich_and_tqdm() -> None:
    users = {file.name for file in FILES if {"rich", "tqdm"} & {m.partition(".")[0] for m in imports(file)}}
    assert users == {"live.py", "jobs.py"}


def test_only_one_module_calls_hydras_instantiate() -> None:
    users = {file.name for file in FILES if "hydra.utils.instantiate" in imports(file)}
    assert users == {"instantiate.py"}


@pytest.mark.parametrize(
    "name",
    [
        "cli/main",
        "cli/arguments",
        "cli/help",
        "cli/project",
        "cli/commands/init",
        *(f"config/{file.stem}" for file in (PACKAGE / "config").glob("*.py")),
        "core/__init__",
        "core/errors",
        "core/paths",
        "core/redaction",
        "core/imports",
        "core/source",
        "core/spelling",
        "core/terminal",
        "display/charts",
        "display/class_table",
        "display/live",
        "display/page",
        "display/plots",
        "display/report_parts",
        "display/parallel_coordinates",
        "display/search_charts",
        "display/search_report",
        "display/rows",
        "display/run_report",
        "display/sweep_report",
        "display/tables",
        "display/text",
        "engine/evaluation_files",
        "engine/report",
        "engine/summary",
        "runs/directory",
        "runs/evaluation_config",
        "runs/find",
        "runs/history",
        "runs/lock",
        "runs/preprocessing",
        "runs/recovery",
        "runs/saved_config",
        "runs/secrets",
        "runs/untrusted",
        "sweeps/axes",
        "sweeps/collect",
        "sweeps/comparison",
        "sweeps/evaluations",
        "sweeps/ledger",
        "sweeps/plot_data",
        "sweeps/report",
        "sweeps/search/importance",
        "sweeps/search/facts",
        "sweeps/search/results",
        "sweeps/search/text",
        "sweeps/table",
        "sweeps/table_text",
    ],
)
def test_modules_of_start_up_do_not_import_torch(name: str) -> None:
    assert "torch" not in {module.partition(".")[0] for module in imports(PACKAGE / f"{name}.py")}


@pytest.mark.parametrize("module", ["loop", "evaluation"])
def test_no_function_of_the_loop_is_longer_than_forty_lines(module: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / "training" / f"{module}.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or sys.maxsize) - node.lineno + 1 <= 40, node.name


def test_the_training_step_contains_the_five_lines_of_every_tutorial() -> None:
    text = (PACKAGE / "training" / "loop.py").read_text()
    step = text[text.index("def train_step(") :]
    lines = (
        "outputs = model(inputs)",
        "loss = loss_fn(outputs, targets)",
        "optimizer.zero_grad()",
        "loss.backward()",
        "optimizer.step()",
    )
    places = [step.index(line) for line in (*lines, "loss.update(loss, weight=")]
    assert places == sorted(places)
