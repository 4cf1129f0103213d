"""Complete the paths of files, folders and runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainkit.core.paths import display_path

OUTPUTS = Path("outputs")
MARKERS = ("run.json", "sweep.jsonl")  # a folder with one of these files is a run or a sweep
MAX_RUNS = 50  # that are offered, the newest


def file_candidates(current: str, *, only_folders: bool = False) -> list[str]:
    """Return the files and folders whose path starts with a text. Folders end with a slash."""
    head, slash, tail = current.rpartition("/")
    folder = Path(f"{head}/" if slash else ".").expanduser()
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    shown = [entry for entry in entries if entry.name.startswith(tail) and (tail or not entry.name.startswith("."))]
    folders = {entry for entry in shown if entry.is_dir()}
    return [
        f"{head}{slash}{entry.name}" + "/" * (entry in folders)
        for entry in shown
        if entry in folders or not only_folders
    ]


def run_candidates(current: str) -> list[str]:
    """Return `last` and the newest runs and sweeps of outputs/; if none starts with a text, folders."""
    found = [display_path(run) for run in sorted(_runs(), reverse=True)]
    matching = [name for name in ["last", *found] if name.startswith(current)][:MAX_RUNS]
    folders = file_candidates(current, only_folders=True)
    if not matching:
        return folders
    return matching + [name for name in folders if not current and name != "outputs/" and _holds_runs(Path(name))]


def _runs() -> Iterator[Path]:
    for pattern in ("*/*/run.json", "sweeps/*/*/sweep.jsonl"):
        yield from (file.parent for file in OUTPUTS.glob(pattern))


def _holds_runs(folder: Path) -> bool:
    return any(next(folder.glob(f"{depth}{name}"), None) for depth in ("", "*/") for name in MARKERS)
