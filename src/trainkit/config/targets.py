"""Check the dotted path of a `_target_` without importing it, and its arguments after the import."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainkit.core.errors import Problem, UserCodeError
from trainkit.core.spelling import did_you_mean, nearest

SIMPLE = {"int": int, "float": (int, float), "str": str, "bool": bool}
KNOWN_PACKAGES = ("torch", "torchvision", "timm", "trainkit")


def nodes_with_target(node: Any, path: str = "") -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping with a `_target_` at any depth, with its key path."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from nodes_with_target(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from nodes_with_target(value, f"{path}[{index}]")


def find_missing_target(dotted: Any) -> Problem | None:
    """Return what is wrong with a dotted path, from the source files alone.

    Returns None also if only an import can answer: for classes made at run time, and compiled modules.
    """
    if not isinstance(dotted, str) or not all(dotted.split(".")) or "." not in dotted:
        example = "a dotted path such as torch.optim.SGD or mymodels.Net"
        return Problem(f"{dotted!r} is not a dotted path", f"write {example}")
    top, *rest = dotted.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        local = [module.name for module in pkgutil.iter_modules([str(Path.cwd())])]
        close = nearest(top, [*local, *KNOWN_PACKAGES])
        hint = f"did you mean {'.'.join([close, *rest])}?" if close else f"create {top}.py here, or install {top}"
        return Problem(f"there is no module {top!r}", hint)
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
    inside = {child.name for child in pkgutil.iter_modules(folders)}
    if names is None or rest[0] in names | inside:
        return None
    hint = did_you_mean(rest[0], {n for n in names | inside if not n.startswith("_")}, f"{module}.")
    local_files = [Path.cwd() / f"{top}.py", Path.cwd() / top / "__init__.py"]
    if source not in local_files and any(file.is_file() for file in local_files):
        hint = f"your {top} is shadowed by {source}; rename it"
    return Problem(f"there is no {rest[0]!r} in {module}", hint)


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
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    names: set[str] = set()
    for node in _top_level(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                package = module.split(".") if source.stem == "__init__" else module.split(".")[:-1]
                above = package[: len(package) - node.level + 1] if node.level else []
                star = ".".join([*above, *([node.module] if node.module else [])])
                inner = _source_of(star)
                found = _names_in(inner, star, seen) if inner and inner not in seen else set() if inner else None
                if found is None:
                    return None
                names |= found
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name.partition(".")[0] for alias in aliases}
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Call(func=ast.Name(id="globals")):
                return None
    return None if "__getattr__" in names else names


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the syntax nodes that run on import: all but the bodies of functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _top_level(child)


def locate(dotted: str) -> Any:
    """Import and return the object at a dotted path.

    Raises:
        LookupError: an attribute is missing; the exception's argument is a `Problem`.
        Exception: any error that the module raises on import.
    """
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part) and inspect.ismodule(found):
            name = ".".join(parts[: index + 1])
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
        if not hasattr(found, part):
            owner = ".".join(parts[:index])
            public = [name for name in dir(found) if not name.startswith("_")]
            raise LookupError(Problem(f"there is no {part!r} in {owner}", did_you_mean(part, public, f"{owner}.")))
        found = getattr(found, part)
    return found


def find_wrong_arguments(
    path: str, node: Mapping[str, Any], call: Callable[..., Any], given: Iterable[str] = ()
) -> list[Problem]:
    """Return the arguments that are unknown, missing or of the wrong simple type for a `_target_`.

    Args:
        path: the node's key in the config, for the messages.
        node: the mapping with `_target_` and the arguments.
        call: the object at `_target_`.
        given: names of arguments that trainkit itself passes.
    """
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):  # compiled code may have no signature
        return []
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = len(node.get("_args_") or ())
    keys = [str(key) for key in node if not str(key).startswith("_")]
    problems = []
    for key in keys:
        if key not in named:
            if not takes_any:
                hint = did_you_mean(key, set(named) - {"self", *given}, f"{path}.")
                drop = f"to remove it write ~{path}.{key}"
                cause = f"{path}.{key}: {node['_target_']} has no argument {key!r}"
                problems.append(Problem(cause, f"{hint}; {drop}" if hint else drop))
            continue
        expected = SIMPLE.get(str(named[key].annotation))
        if isinstance(named[key].annotation, type):
            expected = SIMPLE.get(named[key].annotation.__name__)
        if expected and isinstance(node[key], str) and expected is not str:
            wanted = str(getattr(named[key].annotation, "__name__", named[key].annotation))
            problems.append(Problem(f"{path}.{key}={node[key]}: must be of type {wanted}", f"write {path}.{key}=VALUE"))
    missing = [
        name
        for index, (name, p) in enumerate(named.items())
        if p.default is p.empty and name not in keys and name not in given and index >= positional
    ]
    if not node.get("_partial_"):
        problems += [
            Problem(f"{path}: {node['_target_']} needs the argument {name!r}", f"add +{path}.{name}=VALUE")
            for name in missing
        ]
    return problems


def find_wrong_targets(config: Any) -> list[Problem]:
    """Import each `_target_` of a plain config; return what is wrong with the targets and their arguments."""
    problems: list[Problem] = []
    for path, node in nodes_with_target(config):
        given = arguments_given_by_trainkit(path)
        try:
            called = locate(node["_target_"])
        except (Exception, SystemExit) as error:
            key = f"{path}._target_={node['_target_']}"
            if isinstance(error, LookupError) and error.args and isinstance(error.args[0], Problem):
                problems.append(Problem(f"{key}: {error.args[0].cause}", error.args[0].hint))
            else:  # the module raised it on import
                problems += UserCodeError(key, error).problems
            continue
        if not callable(called):
            problems.append(
                Problem(
                    f"{path}._target_={node['_target_']}: the object cannot be called", "name a class or a function"
                )
            )
            continue
        own = {key: value for key, value in node.items() if not (given == ("optimizer",) and key == "interval")}
        problems += find_wrong_arguments(path, own, called, given)
    return problems


def arguments_given_by_trainkit(path: str) -> tuple[str, ...]:
    """Return the names of the arguments that trainkit passes to the `_target_` at a key path."""
    if re.fullmatch(r"optim(\.\w+)?", path):
        return ("params",)
    if re.fullmatch(r"scheduler(\.(?!lr_lambda|scale_fn)\w+)?(\.?schedulers(\.\w+|\[\d+\]))*", path):
        return ("optimizer",)
    return ()
