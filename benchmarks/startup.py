"""Measure how long a run takes to the end of its first step, and how long images take to be decoded.

    python -m benchmarks.startup [--repeats 9] [--images 5000]

Whole processes are timed in turns, and the medians are compared. The images are small JPEG files in class folders. The
last table compares the decoding of all images with a plain loop over PIL in as many processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.interleave import describe_machine, markdown_table

HOOK = """
import os

class Exit:
    def on_step(self, state):
        os._exit(0)
"""
CLASSES = 10


def make_images(folder: Path, number: int) -> None:
    """Write JPEG files of 32x32 pixels, with one folder per class."""
    draw = np.random.default_rng(0)
    for index in range(number):
        file = folder / f"class{index % CLASSES}" / f"{index:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        blocks = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((32, 32)).save(file, quality=90)


def decode(file: Path) -> Any:
    """Return the pixels of an image."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def decode_by_hand(folder: Path) -> int:
    """Decode all images with PIL, in as many processes as cores; return their number."""
    files = sorted(folder.rglob("*.jpg"))
    with multiprocessing.Pool(os.cpu_count()) as pool:
        return len(np.stack(pool.map(decode, files, chunksize=64)))


def decode_by_trainkit(folder: Path) -> int:
    """Decode all images as a run with `data=image_folder` does, and keep them; return their number."""
    from trainkit.data.cache import read_into_memory
    from trainkit.data.image_folder import image_folder
    from trainkit.data.store import Store

    shutil.rmtree(os.environ["TRAINKIT_CACHE"], ignore_errors=True)
    store = Store.of(image_folder(str(folder)))
    workers = os.cpu_count() or 1
    held = read_into_memory(store, limit=None, workers=workers, skip=False, on_progress=lambda *_: None)
    assert held.tensors is not None
    return len(held.tensors[0])


def medians_in_turn(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median time of each action in seconds. The first turn fills caches, and does not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            began = perf_counter()
            action()
            if repeat:
                times[name].append(perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(medians: dict[str, float], heading: str) -> str:
    """Return the times, and their ratios to the first of them."""
    reference = next(iter(medians.values()))
    rows = [[name, f"{seconds:.2f}", f"{seconds / reference:.2f}"] for name, seconds in medians.items()]
    return markdown_table([heading, "seconds", "ratio"], rows)


def main() -> None:
    """Run the comparisons and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--images", type=int, default=5000)
    args = parser.parse_args()
    first_step = ["-m", "trainkit", "+hooks.exit._target_=exithook.Exit"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "exithook.py").write_text(HOOK)
        make_images(folder / "images", args.images)
        os.environ["TRAINKIT_CACHE"] = str(folder / "cache")

        def run(*argv: str) -> Callable[[], object]:
            return lambda: subprocess.run([sys.executable, *argv], cwd=folder, check=True, capture_output=True)

        images = f"{args.images:,} images"
        commands = {
            "trainkit, to the end of its first step": run(*first_step),
            "trainkit model=mlp optim=adamw, to the end of its first step": run(
                *first_step, "model=mlp", "optim=adamw"
            ),
            f"trainkit data=image_folder, to the same; {images} decoded before": run(
                *first_step, "data=image_folder", "data.root=images"
            ),
            'python -c "import torch"': run("-c", "import torch"),
            "trainkit --cfg job": run("-m", "trainkit", "--cfg", "job"),
        }
        decoding: dict[str, Callable[[], object]] = {
            "a plain loop over PIL": lambda: decode_by_hand(folder / "images"),
            "trainkit, which also reads samples twice and keeps the pixels": lambda: decode_by_trainkit(
                folder / "images"
            ),
        }
        print(f"{describe_machine()}; medians of {args.repeats}\n")
        print(table(medians_in_turn(commands, args.repeats), "command"))
        print()
        print(table(medians_in_turn(decoding, args.repeats), f"decoding {images}"))


if __name__ == "__main__":
    main()
