"""Ways to damage a file of a run, for `benchmarks.campaign`."""

from __future__ import annotations

import random
from pathlib import Path

DAMAGES = ("flip", "truncate", "delete", "swap", "empty", "append")


def files_of(run: Path) -> list[Path]:
    """Return the files of a run, in a fixed order; a link is not a file of the run."""
    return sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())


def damage_file(draw: random.Random, run: Path, path: Path, kind: str) -> tuple[str, set[Path]]:
    """Damage a file; return a description of the damage, and the damaged files, relative to the run."""
    name = path.relative_to(run)
    if kind == "swap":
        other = draw.choice([file for file in files_of(run) if file != path])
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"{name}: swapped with {other.relative_to(run)}", {name, other.relative_to(run)}
    return f"{name}: {_damage_alone(draw, path, kind)}", {name}


def _damage_alone(draw: random.Random, path: Path, kind: str) -> str:
    content = path.read_bytes()
    if kind == "flip" and content:
        bit = draw.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        around = slice(max(0, bit // 8 - 30), bit // 8 + 30)
        return f"bit {bit} is flipped: {content[around]!r} -> {bytes(changed[around])!r}"
    if kind == "truncate" and content:
        length = draw.randrange(len(content))
        path.write_bytes(content[:length])
        return f"truncated to {length} of {len(content)} bytes"
    if kind == "delete":
        path.unlink()
        return "deleted"
    if kind == "append":
        garbage = draw.randbytes(draw.randint(1, 300))
        path.write_bytes(content + garbage)
        return f"{garbage!r} is appended"
    path.write_bytes(b"")
    return "emptied"
