"""Find a wrong `_target_` in the source files, without importing anything."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainkit.config.renamed import current_target
from trainkit.core.errors import Problem
from trainkit.core.spelling import did_you_mean, nearest

KNOWN_PACKAGES = ("torch", "torchvision", "timm", "trainkit")


def find_missing_target(dotted: Any) -> Problem | None:
    """Return what is wrong with a dotted path.

    Returns None also if only an import can answer: for classes made at run time, and compiled modules.
    """
    if not isinstance(dotted, str) or not all(dotted.split(".")) or "." not in dotted:
        example = "a dotted path such as torch.optim.SGD or mymodels.Net"
        return Problem(f"{dotted!r} is not a dotted path", f"write {example}")
    top, *rest = current_target(dotted).split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return _missing_module(top, rest)
    source, module = (Path(spec.origin) if spec.origin else None), top
    folders = list(spec.submodule_search_locations or [])
    while rest and folders:
        inner = _submodule(folders, rest[0])
        if inner is None:
            break
        source, folders = inner
        module, rest = f"{module}.{rest[0]}", rest[1:]
    if not rest or source is None or source.suffix != ".py" or not source.is_file():
        return None
    names = _names_in(source, module, set())
    submodules = {child.name for child in pkgutil.iter_modules(folders)}
    if names is None or rest[0] in names | submodules:
        return None
    hint = did_you_mean(rest[0], {n for n in names | submodules if not n.startswith("_")}, f"{module}.")
    local_files = [Path.cwd() / f"{top}.py", Path.cwd() / top / "__init__.py"]
    if spec.origin and Path(spec.origin) not in local_files and any(file.is_file() for file in local_files):
        hint = f"your {top} is shadowed by {source}; rename it"
    return Problem(f"there is no {rest[0]!r} in {module}", hint)


def find_module_classes(file: Path) -> list[str]:
    """Return the names of the classes in a file that inherit from `nn.Module`, also through each other."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            if any(base in names or base.rpartition(".")[2] == "Module" for base in bases):
                names.append(node.name)
    return names


def _missing_module(top: str, rest: list[str]) -> Problem:
    local = [module.name for module in pkgutil.iter_modules([str(Path.cwd())])]
    if top in local:  # a script of another folder has its own folder on sys.path
        hint = f"{top} is in {Path.cwd()}, which is not on sys.path: sys.path.append({str(Path.cwd())!r})"
        return Problem(f"there is no module {top!r}", hint)
    close = nearest(top, [*local, *KNOWN_PACKAGES])
    hint = f"did you mean {'.'.join([close, *rest])}?" if close else f"create {top}.py here, or install {top}"
    return Problem(f"there is no module {top!r}", hint)


def _submodule(folders: list[str], name: str) -> tuple[Path | None, list[str]] | None:
    for folder in map(Path, folders):
        if (folder / name / "__init__.py").is_file():
            return folder / name / "__init__.py", [str(folder / name)]
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py", []
    return None


def _source_of(module: str) -> Path | None:
    """Return the source file of a module without importing it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    source = Path(spec.origin) if spec and spec.origin else None
    folders = list((spec and spec.submodule_search_locations) or [])
    for name in rest:
        inner = _submodule(folders, name)
        if inner is None:
            return None
        source, folders = inner
    return source if source is not None and source.suffix == ".py" and source.is_file() else None


def _names_in(source: Path, module: str, seen: set[Path]) -> set[str] | None:
    """Return the names that a module defines; None if only an import can answer (`__getattr__`, `globals()`)."""
    seen.add(source)
    try:
        facts = source.stat()
        found = _parse(source, facts.st_mtime_ns, facts.st_size)
    except (OSError, SyntaxError, ValueError):
        return None
    if found is None:
        return None
    names = set(found.names)
    for level, star in found.stars:
        package = module.split(".") if source.stem == "__init__" else module.split(".")[:-1]
        above = package[: len(package) - level + 1] if level else []
        imported = ".".join([*above, *([star] if star else [])])
        inner = _source_of(imported)
        more = _names_in(inner, imported, seen) if inner and inner not in seen else set() if inner else None
        if more is None:
            return None
        names |= more
    return None if "__getattr__" in names else names


class _Names(NamedTuple):
    """The names that a module defines itself, and the level and the module of each `from … import *`."""

    names: frozenset[str]
    stars: tuple[tuple[int, str | None], ...]


@functools.cache
def _parse(source: Path, mtime: int, size: int) -> _Names | None:  # noqa: ARG001  # a changed file is parsed again
    """Return the names in a source file; None if only an import can answer.

    Raises:
        OSError, SyntaxError, ValueError: the file is not Python code that can be read.
    """
    names: set[str] = set()
    stars: list[tuple[int, str | None]] = []
    for node in _top_level(ast.parse(source.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                stars.append((node.level, node.module))
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name.partition(".")[0] for alias in aliases}
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Call(func=ast.Name(id="globals")):
                return None
    return _Names(frozenset(names), tuple(stars))


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the syntax nodes that run on import: all but the bodies of functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _top_level(child)
