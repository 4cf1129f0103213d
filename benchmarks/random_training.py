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

class Carrying(Net):
    """Carries its hidden layer from batch to batch."""

    def __init__(self, width=16):
        super().__init__(width)
        self.register_buffer("state", None)

    def reset_state(self):
        self.state = None

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        if self.state is not None and self.state.shape == hidden.shape:
            hidden = hidden + 0.5 * self.state
        self.state = hidden.detach()
        return self.last(self.dropout(hidden))

class Points:
    """Random samples; the inputs of the sample `bad` are not finite."""

    classes = ["a", "b", "c"]

    def __init__(self, size=64, wait=0.0, bad=None, broken=None):
        self.size, self.wait, self.bad, self.broken = size, wait, bad, broken
        self.lengths = [index % 7 for index in range(size)]

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        time.sleep(self.wait)
        if index == self.broken:
            raise OSError("the file is damaged")
        noise = torch.randn(8) + float(np.random.rand()) + random.random()
        x = torch.randn(8, generator=torch.Generator().manual_seed(index)) + 0.1 * noise
        return (x * float("nan") if index == self.bad else x), index % 3

class Size:
    """A hook that adds the norm of the weights as a metric."""

    def on_epoch(self, state, metrics):
        metrics["size"] = sum(float(p.detach().square().sum()) for p in state.model.parameters())

class Trained:
    """A hook with an optimizer, which also counts the validated samples."""

    def on_start(self, state):
        self.point, self.count = nn.Parameter(torch.zeros(3)), 0
        self.optimizer = torch.optim.Adam([self.point], lr=0.1)

    def on_step(self, state):
        self.optimizer.zero_grad()
        (self.point - state.step).square().sum().backward()
        self.optimizer.step()

    def on_val_batch(self, state, inputs, targets, outputs):
        self.count += len(targets)

    def on_epoch(self, state, metrics):
        metrics["point"], metrics["count"] = float(self.point.sum()), self.count

    def state_dict(self):
        return {"point": self.point.detach().clone(), "count": self.count, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved):
        self.point.data.copy_(saved["point"])
        self.count = saved["count"]
        self.optimizer.load_state_dict(saved["optimizer"])

class Confidence:
    """A metric whose state is its attributes: the values of each batch, in order."""

    higher_is_better = True

    def reset(self):
        self.values = []

    def update(self, outputs, targets):
        self.values.append(outputs.double().softmax(1).amax(1).sum())

    def compute(self):
        return {"sum": sum(self.values), "each": torch.stack(self.values)}

class Order(torch.utils.data.Sampler):
    """Half of the samples, in a random order."""

    def __init__(self, data_source):
        self.samples = len(data_source)

    def __iter__(self):
        return iter(torch.randperm(self.samples)[: self.samples // 2].tolist())

def correlation(outputs, targets):
    return float(np.corrcoef(outputs.double().argmax(1).numpy(), targets.numpy())[0, 1])

def collate(samples):
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])
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
    carrying = draw.random() < 0.2  # never split into micro batches
    argv += ["model._target_=campaignmodule.Carrying"] if carrying else [f"micro_batch={draw.choice(['off', '3'])}"]
    argv += [f"ema={draw.choice(['off', '0.9'])}"]
    argv += [f"checkpoint.every_steps={draw.choice(['off', '1', '3'])}", f"checkpoint.keep={draw.randint(1, 3)}"]
    argv += [f"data.num_workers={draw.choice([0, 0, 2])}", f"data.cache={draw.choice(['auto', 'none'])}"]
    argv += [f"precision={draw.choice(['fp32', 'bf16'])}", f"clip_norm={draw.choice(['off', '1'])}"]
    nonfinite = draw.choice(["stop", "skip", "rollback"])
    argv += [f"on_nonfinite={nonfinite}"] + ([f"+data.train.bad={draw.randrange(64)}"] if nonfinite != "stop" else [])
    argv += draw_data(draw) + draw_metrics(draw)
    if draw.random() < 0.4:
        argv += ["+hooks.size._target_=campaignmodule.Size", "monitor.metric=size", "monitor.mode=min"]
    return argv


def draw_data(draw: random.Random) -> list[str]:
    """Return random overrides about the samples and their order."""
    orders = ["data.sampler=balanced", "data.sampler=length_bucketed", "data.sampler=contiguous"]
    orders += ["data.sampler=campaignmodule.Order", "data.shuffle=off"]
    argv = [draw.choice(orders)] if draw.random() < 0.5 else []
    argv += ["data.folds=3", f"data.fold={draw.randrange(3)}", "data.val=null"] if draw.random() < 0.3 else []
    argv += ["data.collate=campaignmodule.collate", "data.cache=auto"] if draw.random() < 0.3 else []
    argv += ["data.on_unreadable=skip", f"+data.train.broken={draw.randrange(64)}"] if draw.random() < 0.3 else []
    argv += [f"val_batch_size={draw.choice([1, 5, 16])}"] if draw.random() < 0.5 else []
    argv += [f"limit_val_batches={draw.randint(1, 2)}"] if draw.random() < 0.3 else []
    return argv + (["data.drop_last=on"] if draw.random() < 0.3 else [])


def draw_metrics(draw: random.Random) -> list[str]:
    """Return random overrides that add metrics and a hook with a state."""
    on, argv = "on: [train, val]", []
    if draw.random() < 0.5:
        argv += ["metrics=classification", "+metrics.f1.on=[train,val]", "monitor.metric=val/f1"]
    if draw.random() < 0.4:
        argv += [f"+metrics.confidence={{_target_: campaignmodule.Confidence, {on}}}"]
    if draw.random() < 0.4:
        target = "_target_: trainkit.metrics.Collected, function: campaignmodule.correlation"
        argv += [f"+metrics.correlation={{{target}, {on}}}"]
    return argv + (["+hooks.trained._target_=campaignmodule.Trained"] if draw.random() < 0.4 else [])


def final_of(run: Path) -> Final:
    """Return the hash of the final state, the history without times, the best epoch and its checkpoint."""
    checkpoints, info = Checkpoints(run / "checkpoints"), Run.load(run)
    history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in info.history]
    return digest(checkpoints.newest()[1]), history, info.best, checkpoints.read_pointer("best")


def differences_of(found: Final, wanted: Final) -> str:
    """Return the names of the parts in which two final states differ."""
    names = ("state", "history", "best epoch", "best checkpoint")
    return ", ".join(name for name, one, other in zip(names, found, wanted, strict=True) if repr(one) != repr(other))
