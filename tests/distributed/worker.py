"""What a rank of `helpers.train_cases` runs: all cases, one after the other."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from trainkit.config.compose import compose
from trainkit.core.errors import TrainkitError
from trainkit.core.pytree import copy_to_cpu, map_tensors
from trainkit.core.shards import whole
from trainkit.data.cache import read_into_memory
from trainkit.data.store import Store
from trainkit.engine.train import train
from trainkit.training.metrics import CLOCKS


class SaveState:
    """A hook that saves the state of a finished training."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_end(self, state: Any) -> None:
        """Save the objects and the progress without the clocks."""
        parts = {"objects": state.objects.state_dict(), "progress": without_clocks(state.progress.state_dict())}
        torch.save(copy_to_cpu(map_tensors(parts, whole)), self.file)


def without_clocks(value: Any) -> Any:
    """Return nested mappings without the entries that differ between equal runs."""
    if not isinstance(value, dict):
        return value
    return {key: without_clocks(entry) for key, entry in value.items() if key not in CLOCKS}


def run_cases() -> int:
    """Train the cases in the file `CASES`."""
    file, rank = Path(os.environ["CASES"]), os.environ.get("RANK", "0")
    sys.path.append(str(Path.cwd()))
    with (file.parent / f"ended-{rank}.jsonl").open("w", buffering=1) as ended:
        for name, case in json.loads(file.read_text()).items():
            os.environ["MASTER_PORT"] = str(case["port"])
            code, error = _train(case, file.parent / name, SaveState(file.parent / f"{name}-{rank}.pt"))
            ended.write(json.dumps({"name": name, "code": code, "error": error}) + "\n")
    return 0


def _train(case: dict[str, Any], directory: Path, hook: SaveState) -> tuple[int, str]:
    torch.set_default_dtype(getattr(torch, case["dtype"]))
    print(f"case {directory.name}", file=sys.stderr, flush=True)
    try:
        train(compose(["progress=off", *case["overrides"]]), directory=directory, hooks=[hook])
    except TrainkitError as error:
        return error.exit_code, "\n".join(f"{problem.cause}\n{problem.hint}" for problem in error.problems)
    except Exception:
        return 1, traceback.format_exc()
    return 0, ""


def hold_images() -> int:
    """Read a set of images into memory; print where the images come from."""
    store = read_into_memory(Store(SlowImages()), limit=None, workers=0, skip=False, on_progress=lambda *_: None)
    assert store.tensors is not None
    assert all(int(image.flatten()[0]) == index for index, image in enumerate(store.tensors[0]))
    print(store.note)
    return 0


class SlowImages(Dataset[Any]):
    """Images that take some time to decode. Each process that decodes them adds a line to the file `decoded`."""

    cache_as = "slow", "one"

    def __init__(self) -> None:
        self.processes: set[int] = set()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if index == 10 and os.getpid() not in self.processes:
            self.processes.add(os.getpid())
            time.sleep(0.5)
            with Path("decoded").open("a") as file:
                file.write(f"{os.getpid()}\n")
        return torch.full((3, 4, 4), index, dtype=torch.uint8), index
