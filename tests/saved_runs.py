"""Runs and sweeps on disk that no training wrote: the real writers get numbers that are made up."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainkit.config.compose import compose_run
from trainkit.runs.directory import Run
from trainkit.sweeps.ledger import Ledger

OVERRIDES = ["model=mlp", "optim=adam", "param_groups=head_lr", "clip_norm=1"]
FACTS = {"device": "cpu", "parameters": 30, "trainable_parameters": 20, "train_samples": 90, "val_samples": 10}


def save_run(directory: Path, overrides: Sequence[str] = OVERRIDES, epochs: int = 3, final: float = 0.5) -> Run:
    """Write a completed run whose validation loss falls to `final`."""
    directory.mkdir(parents=True)
    composed, run = compose_run(overrides), Run(directory)
    run.start(
        composed.settings, command=["trainkit", *overrides], overrides=overrides, hydra=composed.hydra, facts=FACTS
    )
    run.write_json("params.json", [param_row("body.weight", "default", 0.001), param_row("head.bias", "head", 0.01)])
    run.log("note: the first note")
    for epoch in range(1, epochs + 1):
        loss = final + epochs - epoch
        metrics = {"epoch": epoch, "step": 9 * epoch, "train/loss": loss + 0.1, "val/loss": loss, "val/accuracy": 0.9}
        metrics |= {"lr/default": 0.001, "lr/head": 0.01, "mine/score": 7.0 * epoch, "seconds": 1.5}
        best = {"metric": "val/loss", "mode": "min", "value": loss, "epoch": epoch}
        shown = {"train/loss": loss + 0.1, "val/loss": loss, "val/accuracy": 0.9}
        run.append_epoch({**metrics, "samples_per_second": 60.0}, best | shown)
    run.finish("completed", 0)
    return run


def param_row(name: str, group: str, lr: float) -> dict[str, Any]:
    """Return a row of `params.json`."""
    decided = {"lr": "default" if group == "default" else group, "weight_decay": "default"}
    row = {"name": name, "aliases": [], "shape": [5, 3], "count": 15, "layer": 0, "group": group, "trainable": True}
    return row | {"optimizer": "Adam", "options": {"lr": lr, "weight_decay": 0}, "decided_by": decided}


def save_sweep(directory: Path, losses: Sequence[float] = (0.9, 0.2, math.nan, 0.4)) -> Path:
    """Write a sweep over `lr` and `seed`. A job whose final loss is NaN has failed."""
    directory.mkdir(parents=True)
    ledger = Ledger(directory)
    ledger.append({"event": "sweep", "version": 1, "command": ["trainkit", "-m"], "overrides": []})
    template = save_run(directory / "template", ["model=mlp"]).directory
    for number, loss in enumerate(losses):
        overrides = ["model=mlp", f"lr={0.1 / 10 ** (number // 2):g}", f"seed={number % 2}"]
        job = directory / str(number)
        queued = {"event": "queued", "job": number, "config": f"hash{number}", "overrides": overrides}
        ledger.append(
            {**queued, "directory": job.name}, {"event": "started", "job": number, "attempt": 1, "threads": 1}
        )
        failed = not math.isfinite(loss)
        save_job(job, template, overrides, loss)
        ended = {"event": "ended", "job": number, "status": "failed" if failed else "completed"}
        cause = {"exit_code": -9 if failed else 0, "why": "killed by SIGKILL" if failed else None}
        result = {"metric": "val/loss", "mode": "min", "value": None if failed else loss, "seconds": 2.0 + number}
        ledger.append({**ended, **cause, **result})
    shutil.rmtree(template)
    return directory


def save_job(job: Path, template: Path, overrides: Sequence[str], loss: float) -> None:
    """Write a job with the values of `overrides`. Composing each one would take seconds."""
    if not math.isfinite(loss):
        shutil.copytree(template, job, ignore=shutil.ignore_patterns("run.json", "history.jsonl"))
        (job / "output.log").write_text("\x1b[31mepoch 1\x1b[0m\nstep 1\rstep 2\n<b>Killed</b>\n", newline="")
    else:
        shutil.copytree(template, job)
        for name in ("run.json", "history.jsonl"):  # the template ends at 0.5
            text = (job / name).read_text()
            (job / name).write_text(
                text.replace('val/loss": 0.5', f'val/loss": {loss}').replace('e": 0.5', f'e": {loss}')
            )
    config = (job / ".hydra/config.yaml").read_text()
    lr, seed = overrides[1].partition("=")[2], overrides[2].partition("=")[2]
    changed = re.sub(r"(?m)^seed: .*$", f"seed: {seed}", re.sub(r"(?m)^lr: .*$", f"lr: {lr}", config))
    (job / ".hydra/config.yaml").write_text(changed)
    (job / ".hydra/overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
