"""Compare the samplers and the pruners of a search at equal epochs, and the pruners at equal trials.

    OMP_NUM_THREADS=1 python -m benchmarks.search
    OMP_NUM_THREADS=1 python -m benchmarks.search --tasks branin --searches 10 --trainings 40

Each search is the installed command, with its own `search.seed`. The progress of a search is the best value after each
epoch that any of its trials has trained, in the order of training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.interleave import describe_machine, markdown_table

SCRIPT = Path(sys.executable).with_name("trainkit")
ROOT = Path(__file__).parents[1]
EPOCHS = 9  # of a full training
METRIC = "val/loss"
LR = "lr=tag(log,interval(1e-4,1))"
BRANIN_MODEL = """\
_target_: benchmarks.search.Branin
lr: ${lr}
place: 0.5
"""
BRANIN_DATA = ["data=synthetic", "data.train.size=2", "data.train.shape=[1]", "data.classes=2", "data.split=0.5"]
TASKS = {
    "branin": [LR, "model.place=interval(0,1)", "model=branin", "loss=identity", *BRANIN_DATA],
    "diabetes": [
        LR,
        "optim.weight_decay=tag(log,interval(1e-4,1))",
        "model.hidden=[16],[64],[256]",
        "batch_size=8,16,32,64",
        "experiment=table_regression",
    ],
    "digits": [
        LR,
        "optim=sgd,adam",
        "optim.momentum=interval(0,0.99)",
        "model=toy_cnn",
        "limit_batches=4",
        "limit_val_batches=6",
    ],
}
METHODS = {
    "random": ["search.sampler=random"],
    "TPE": ["search.sampler=tpe"],
    "TPE, ASHA": ["search.sampler=tpe", "search.pruner=asha"],
}
PRUNERS = ("off", "median", "hyperband", "asha")
JOURNAL_VALUE = 7  # the code of Optuna's journal for the value of an epoch


class Branin(nn.Module):
    """A model whose validation loss is known: no data, no gradient, the same in every run.

    The loss after e epochs is `1 + final + 2 * exp(-rate * e)`. `final` is the logarithm of Branin's function. `rate`
    grows with the learning rate, so settings with a low one look worse in early epochs than they are in the end.

    Args:
        lr: the learning rate, from 1e-4 to 1.
        place: the other key, from 0 to 1.
    """

    def __init__(self, lr: float, place: float) -> None:
        super().__init__()
        self.final, self.rate = final_and_rate(lr, place)
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.epoch: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the loss. A pass in training mode is an epoch, because an epoch has a single batch."""
        self.epoch += self.training
        loss = 1 + self.final + 2 * math.exp(-self.rate * int(self.epoch))
        return self.weight * 0 + torch.full((len(inputs),), loss)


def final_and_rate(lr: float, place: float) -> tuple[float, float]:
    """Return the part of the loss that remains, 0 at its three optima, and the rate at which the other part decays."""
    fraction = (math.log10(lr) + 4) / 4
    x, y = 15 * fraction - 5, 15 * place
    branin = (y - 5.1 * x**2 / (4 * math.pi**2) + 5 * x / math.pi - 6) ** 2
    branin += 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10 - 0.397887
    return math.log10(1 + max(branin, 0)), 0.2 + fraction


def main() -> None:
    """Run the searches and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--searches", type=int, default=5, help="searches with each method; each has its own seed")
    parser.add_argument("--trainings", type=int, default=16, help=f"the epochs of a search, divided by {EPOCHS}")
    parser.add_argument("--pruned", nargs="*", choices=TASKS, default=["branin"], help="tasks to compare pruners on")
    parser.add_argument("--trials", type=int, default=32, help="trials of a search that compares pruners")
    parser.add_argument("--folder", type=Path, help="a new folder for the sweeps; default: a temporary one")
    args = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        (folder / "conf" / "model").mkdir(parents=True)
        (folder / "conf" / "model" / "branin.yaml").write_text(BRANIN_MODEL)
        for task in args.tasks:
            print(compare_methods(folder, task, args.searches, args.trainings * EPOCHS))
            print(describe_early_epochs(folder, task))
        for task in args.pruned:
            print(compare_pruners(folder, task, args.searches, args.trials))


def compare_methods(folder: Path, task: str, searches: int, epochs: int) -> str:
    """Search with each method at equal epochs; return the table of the values and of the epochs that they took."""
    found: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for seed in range(searches):
        for name, argv in METHODS.items():
            found[name].append(search(folder, task, [*argv, f"search.epochs={epochs}"], seed))
    target = statistics.median(progress[-1] for progress in found["random"])
    rows = []
    for name, each in found.items():
        taken = [epochs_to_reach(progress, target) for progress in each]
        early = [progress[: epochs // 2][-1] for progress in each]
        finals = [progress[-1] for progress in each]
        ratio = f"{statistics.median(taken) / epochs:.2f}".replace("inf", "-")
        rows.append([task, name, spread(early), spread(finals), spread(taken), ratio])
    bests = [f"best {METRIC} after {count} epochs" for count in (epochs // 2, epochs)]
    head = ["task", "method", *bests, "epochs to random's median", f"ratio to {epochs}"]
    return "\n" + markdown_table(head, rows)


def describe_early_epochs(folder: Path, task: str) -> str:
    """Return how many of the best tenth of random's full trainings a pruner that keeps a third would keep."""
    journals = sorted(folder.glob(f"{task}-random-*/study.journal"))
    curves = [values for journal in journals for values in read_curves(journal) if len(values) == EPOCHS]
    best = sorted(curves, key=min)[: math.ceil(len(curves) / 10)]
    kept = []
    for epoch in (1, 3):
        third = sorted(min(values[:epoch]) for values in curves)[math.ceil(len(curves) / 3) - 1]
        kept.append(sum(min(values[:epoch]) <= third for values in best))
    return (
        f"\n{task}: of the best {len(best)} of {len(curves)} full trainings with random settings, "
        f"{kept[0]} are in the best third after epoch 1, and {kept[1]} after epoch 3."
    )


def compare_pruners(folder: Path, task: str, searches: int, trials: int) -> str:
    """Search with each pruner at equal trials; return the table of the values and the epochs."""
    rows = []
    for pruner in PRUNERS:
        argv = ["search.sampler=tpe", f"search.pruner={pruner}", f"search.trials={trials}"]
        each = [search(folder, task, argv, seed) for seed in range(searches)]
        used = [len(progress) for progress in each]
        saved = 1 - statistics.median(used) / (trials * EPOCHS)
        rows.append([task, pruner, spread([progress[-1] for progress in each]), spread(used), f"{saved:.0%}"])
    head = ["task", "pruner", f"best {METRIC} of {trials} trials", "epochs", "saved"]
    return "\n" + markdown_table(head, rows)


def search(folder: Path, task: str, argv: Sequence[str], seed: int) -> list[float]:
    """Run a search; return its progress."""
    directory = f"{task}-{'-'.join(word.split('=')[1] for word in argv)}-{seed}"
    command = [str(SCRIPT), "-m", *TASKS[task], *argv, f"search.seed={seed}", f"epochs={EPOCHS}"]
    command += ["hydra.launcher.n_jobs=2", f"hydra.sweep.dir={directory}", "progress=off", "report=off"]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 10):  # 10: a training has failed, such as one whose learning rate is too high
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    progress = read_progress(folder / directory / "study.journal")
    seconds = time.perf_counter() - began
    print(f"{directory}: {progress[-1]:.4g} in {len(progress)} epochs, {seconds:.0f} s", file=sys.stderr, flush=True)
    return progress


def read_progress(journal: Path) -> list[float]:
    """Return the best value of a search after each of its epochs, in the order of training."""
    progress: list[float] = []
    best = math.inf
    for _, value in read_values(journal):
        best = min(best, value) if math.isfinite(value) else best
        progress.append(best)
    return progress


def read_curves(journal: Path) -> list[list[float]]:
    """Return the values of the epochs of each trial. A value that is not finite is infinity."""
    curves: dict[int, list[float]] = {}
    for trial, value in read_values(journal):
        curves.setdefault(trial, []).append(value if math.isfinite(value) else math.inf)
    return [*curves.values()]


def read_values(journal: Path) -> Iterator[tuple[int, float]]:
    """Yield the trial and the value of each epoch of a search, in the order of training."""
    for line in journal.read_text().splitlines():
        event = json.loads(line)
        if event["op_code"] == JOURNAL_VALUE:
            yield event["trial_id"], event["intermediate_value"]


def epochs_to_reach(progress: Sequence[float], target: float) -> float:
    """Return the number of epochs after which a search is as good as a value; infinity if it never is."""
    return next((epochs for epochs, best in enumerate(progress, start=1) if best <= target), math.inf)


def spread(values: Sequence[float]) -> str:
    """Return the median, the lowest and the highest of some values."""
    median, low, high = (f"{value:.4g}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})".replace("inf", "not reached")


if __name__ == "__main__":
    main()
