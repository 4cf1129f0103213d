"""Random small trainings, and the final states of their runs, for `benchmarks.campaign`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.snapshot import digest
from trainkit.training.metrics import CLOCKS

MODULE = '''
import random, time
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(8, width), nn.Linear(width, 3), nn.Dropout(0.3)

    def forward(self, x):
        return self.last(self.dropout(torch.relu(self.first(x))))

class Points:
    """Random samples; the inputs of the sample `bad` are not finite."""

    classes = ["a", "b", "c"]

    def __init__(self, size=64, wait=0.0, bad=None):
        self.size, self.wait, self.bad = size, wait, bad

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        time.sleep(self.wait)
        noise = torch.randn(8) + float(np.random.rand()) + random.random()
        x = torch.randn(8, generator=torch.Generator().manual_seed(index)) + 0.1 * noise
        return (x * float("nan") if index == self.bad else x), index % 3

class Size:
    """A hook that adds the norm of the weights as a metric."""

    def on_epoch(self, state, metrics):
        metrics["size"] = sum(float(p.detach().square().sum()) for p in state.model.parameters())
'''
POINTS = "train: {_target_: campaignmodule.Points, wait: 0.0005}\nval: {_target_: campaignmodule.Points, size: 16}\n"
NET = "_target_: campaignmodule.Net\nwidth: 16\n"
Final = tuple[str, list[dict[str, Any]], Any, Any]  # hash of the state, history, best epoch, best checkpoint


def write_project(folder: Path) -> None:
    """Write the model, the data set and the hook of the trainings into a folder."""
    (folder / "campaignmodule.py").write_text(MODULE)
    for name, text in (("model/net", NET), ("data/points", POINTS)):
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / f"{name}.yaml").write_text(text)


def draw_config(draw: random.Random, *, by_steps: bool = False) -> list[str]:
    """Return the overrides of a random small training; half of them are planned in steps if `by_steps`."""
    argv = ["model=net", "data=points", "batch_size=8", "progress=off", f"seed={draw.randrange(99)}"]
    if by_steps and draw.random() < 0.5:  # a pass has 8 steps
        argv += [f"steps={draw.randint(12, 30)}", f"steps_per_epoch={draw.choice(['off', '5', '8', '11'])}"]
    else:
        argv += [f"epochs={draw.randint(2, 4)}"]
    argv += [f"optim={draw.choice(['sgd', 'adamw', 'rmsprop', 'nadam', 'adagrad'])}"]
    argv += [f"scheduler={draw.choice(['none', 'onecycle', 'cosine', 'plateau', 'step', 'warmup_cosine'])}"]
    argv += [f"ema={draw.choice(['off', '0.9'])}", f"micro_batch={draw.choice(['off', '3'])}"]
    argv += [f"checkpoint.every_steps={draw.choice(['off', '1', '3'])}", f"checkpoint.keep={draw.randint(1, 3)}"]
    argv += [f"data.num_workers={draw.choice([0, 0, 2])}", f"data.cache={draw.choice(['auto', 'none'])}"]
    argv += [f"precision={draw.choice(['fp32', 'bf16'])}", f"clip_norm={draw.choice(['off', '1'])}"]
    nonfinite = draw.choice(["stop", "skip", "rollback"])
    argv += [f"on_nonfinite={nonfinite}"] + ([f"+data.train.bad={draw.randrange(64)}"] if nonfinite != "stop" else [])
    if draw.random() < 0.4:
        argv += ["+hooks.size._target_=campaignmodule.Size", "monitor.metric=size", "monitor.mode=min"]
    return argv


def final_of(run: Path) -> Final:
    """Return the hash of the final state, the history without times, the best epoch and its checkpoint."""
    checkpoints, info = Checkpoints(run / "checkpoints"), Run.load(run)
    history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in info.history]
    return digest(checkpoints.newest()[1]), history, info.best, checkpoints.read_pointer("best")


def differences_of(found: Final, wanted: Final) -> str:
    """Return the names of the parts in which two final states differ."""
    names = ("state", "history", "best epoch", "best checkpoint")
    return ", ".join(name for name, one, other in zip(names, found, wanted, strict=True) if repr(one) != repr(other))
