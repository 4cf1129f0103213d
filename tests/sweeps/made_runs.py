"""Directories of runs that were not trained: the files that trainkit writes, in milliseconds."""

from __future__ import annotations

import copy
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainkit.runs.history import history_line

OPTIM: dict[str, tuple[float, dict[str, Any]]] = {
    "sgd": (0.01, {"_target_": "torch.optim.SGD", "lr": "${lr}", "momentum": 0, "weight_decay": 0}),
    "adam": (0.001, {"_target_": "torch.optim.Adam", "lr": "${lr}", "betas": [0.9, 0.999], "weight_decay": 0}),
    "adadelta": (1.0, {"_target_": "torch.optim.Adadelta", "lr": "${lr}", "rho": 0.9, "weight_decay": 0}),
}
CONFIG: dict[str, Any] = {
    "lr": 0.01,
    "epochs": 3,
    "seed": 0,
    "clip_norm": None,
    "progress": "off",
    "monitor": {"metric": "val/loss", "mode": "min"},
    "model": {"_target_": "trainkit.models.MLP", "hidden": [256], "out_features": "${data.classes}"},
    "optim": OPTIM["sgd"][1],
    "param_groups": {},
    "data": {"train": {"_target_": "trainkit.data.synthetic", "seed": 0}, "classes": 10},
}
CHOICES = {
    "experiment": "none",
    "optim": "sgd",
    "data": "digits",
    "model": "mlp",
    "logger": "none",
    "hydra/launcher": "basic",
}


def make_run(directory: Path, *overrides: str, hydra: bool = True, **info: Any) -> list[dict[str, Any]]:
    """Write the files of a run; return its history.

    Args:
        directory: of the run.
        overrides: `optim=NAME` and `KEY=VALUE`.
        hydra: write Hydra's settings, which hold the choices.
        info: entries of `run.json`. `history` gives the rows of the history, `best=None` a run without a best epoch.
    """
    config, choices = copy.deepcopy(CONFIG), dict(CHOICES)
    for override in overrides:
        key, _, text = override.lstrip("+").partition("=")
        if key in choices:
            choices[key] = text
            if key == "optim":
                config["lr"], config["optim"] = OPTIM[text][0], dict(OPTIM[text][1])
        else:
            *parents, name = key.split(".")
            node = config
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = yaml.safe_load(text)
    history = info.pop("history", None) or random_history(" ".join(overrides))
    metric, mode = config["monitor"]["metric"], config["monitor"]["mode"]
    finite = [row for row in history if math.isfinite(row[metric])]
    shown = None
    if finite:
        best = (min if mode == "min" else max)(finite, key=lambda row: float(row[metric]))
        shown = {"metric": metric, "mode": mode, "value": best[metric], **best}
    write_yaml(directory / ".hydra" / "config.yaml", config)
    write_yaml(directory / ".hydra" / "overrides.yaml", list(overrides))
    if hydra:
        write_yaml(directory / ".hydra" / "hydra.yaml", {"hydra": {"runtime": {"version": "1", "choices": choices}}})
    (directory / "history.jsonl").write_text("".join(map(history_line, history)))
    content = {"status": "completed", "exit_code": 0, "why": None, "best": shown, **info}
    (directory / "run.json").write_text(json.dumps(content))
    return history


def random_history(name: str, epochs: int = 3) -> list[dict[str, Any]]:
    """Return rows of random metrics, the same for the same name."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    names = ("train/loss", "val/loss", "val/accuracy")
    return [
        {"epoch": epoch, **dict(zip(names, draw.random(3).tolist(), strict=True))} for epoch in range(1, 1 + epochs)
    ]


def write_yaml(path: Path, content: Any) -> None:
    """Write a YAML file as OmegaConf does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
