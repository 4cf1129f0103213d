"""Trainings on 2 and 4 ranks have the numbers of one process.

The sizes divide by neither 2 nor 4. Batches of 33 samples do not divide either, and the last batch has 1, 2 or 3, so
some shares of 4 ranks are empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.helpers import Case, Outcome, largest_difference, train_cases
from tests.processes import Forks
from trainkit.training.metrics import CLOCKS

PARTS = "tests.distributed.parts"
FLOAT32, FLOAT64 = 1e-6, 1e-12  # the largest relative difference

METRICS = [
    "metrics=classification",
    "~metrics.confusion_matrix",
    "+metrics.f1.on=[train,val]",
    "+metrics.margin={_target_: tests.distributed.parts.MeanMargin, on: [train, val]}",
]
TORCHMETRICS = "+metrics.auroc={_target_: torchmetrics.AUROC, task: multiclass, num_classes: 5, on: [train, val]}"
WEIGHTS = "loss.weight=[0.2, 3, 1, 0.5, 2]"
SPARSE_ADAM = [
    "optim=muon_sgd",
    "optim.muon._target_=torch.optim.SparseAdam",
    "optim.sgd._target_=torch.optim.Adam",
    "~param_groups.matrices",
    "+param_groups.words={name: 'embedding.*', optimizer: muon}",
]
MIXED = "data.augment={flip: random, crop_padding: 1, cutout: 2, mixup: 0.4, cutmix: 1.0}"


def config(*overrides: str, kind: str = "classes", size: int = 101, model: str = "Net") -> list[str]:
    """Return the overrides of a training for 3 epochs on `parts.rows`."""
    data = [f"data.train._target_={PARTS}.rows", f"data.val._target_={PARTS}.rows"]
    data += [f"data.train.size={size}", "+data.val.size=35", f"+data.train.kind={kind}", f"+data.val.kind={kind}"]
    own = ["data.split=off", "batch_size=33", "epochs=3", "report=off", "checkpoint=off", "model=mlp"]
    return ["data=synthetic", *data, *own, f"model._target_={PARTS}.{model}", *overrides]


def step(name: str, *overrides: str, **data: Any) -> list[str]:
    """Return the overrides of a training with a custom step."""
    return config(f"training_step={PARTS}.{name}", *overrides, **data)


# Trainings that are compared in float32 and float64.
MAIN = {
    "class weights, clipped norm, EMA, schedule per step, metrics": config(
        WEIGHTS, "loss.label_smoothing=0.1", "clip_norm=0.3", "ema=0.9", "scheduler=onecycle", *METRICS
    ),
    "ignored targets, micro batches, clipped values, schedule per epoch": config(
        WEIGHTS, "micro_batch=5", "clip_value=0.01", "scheduler=cosine", "optim=adamw", kind="ignored", size=102
    ),
    "a loss with parameters and a denominator": config(f"loss._target_={PARTS}.Scaled", kind="ignored", size=100),
    "two optimizers": config("optim=muon_sgd"),
}
MORE = {
    **MAIN,
    "a sum": config("loss.reduction=sum", "lr=0.0005", size=100),
    "numbers": config("loss=mse", "metrics=regression", "+model.outputs=2", kind="numbers", size=102),
    "early stop": config("epochs=9", "lr=1", "early_stop.patience=1"),
    "plateau": config("scheduler=plateau", "scheduler.patience=0", "lr=1"),
    "a frozen group": config("optim=adamw", "+param_groups.body={name: 'body.*', freeze: 1}"),
    "a parameter without gradient": config("optim=adam", "+model.unused=true", "+model.normalize=true"),
    "parameters that some ranks use": config("optim=adam", model="Experts"),
    "watched parameters": config("watch=[head.weight]"),
    "sparse embeddings, tokens": config(kind="tokens", model="Words"),
    "sparse Adam": config(*SPARSE_ADAM, kind="tokens", model="Words"),
    "a step with a denominator, metrics": step("weighted_step", *METRICS, kind="ignored", size=102),
    "a step with micro batches": step(
        "weighted_step", "micro_batch=3", f"evaluation_step={PARTS}.weighted_step", kind="ignored", size=102
    ),
    "a step without denominator": step("plain_step", size=102),
    "a step with two optimizers": step(
        "gan_step", "evaluation_step=off", "optim=gan", "data.drop_last=on", model="Gan"
    ),
    "steps": config("epochs=off", "steps=10", "steps_per_epoch=3"),
    "minutes": config("max_minutes=0.5", "epochs=2"),
    "a limited epoch": config("limit_batches=2"),
    "activation checkpointing": config("activation_checkpointing=blocks", model="Blocks"),
    "a skipped batch": config("on_nonfinite=skip", "data.train.kind=broken"),
    "a rollback": [
        override
        for override in config("on_nonfinite=rollback", "data.train.kind=broken")
        if override != "checkpoint=off"
    ],
    "samples from workers": config("data.cache=none", "data.num_workers=1", size=102),
    "small batches of validation": config("val_batch_size=7"),
    "batches smaller than the number of ranks": config("batch_size=3", size=10),
    "batches of one sample": config("batch_size=1", size=10),
}
# Convolutions choose other algorithms for other batch sizes, and LBFGS amplifies rounding errors. Some metrics sort
# outputs, so rounding changes the order.
ONLY_FLOAT64 = {
    "convolutions, mixed images": config(MIXED, kind="images", model="Convolutions"),
    "mixed images from workers": config(
        MIXED, "data.cache=none", "data.num_workers=1", "epochs=1", kind="images", model="Convolutions"
    ),
    "LBFGS": config("optim=lbfgs", "optim.max_iter=3", "lr=0.1", "batch_size=101"),
    "metrics of torchmetrics": config(TORCHMETRICS),
}


def cases(configs: Mapping[str, Sequence[str]], dtype: str) -> dict[str, Case]:
    """Return the trainings of some configs."""
    return {name: Case(overrides, dtype) for name, overrides in configs.items()}


def numbers(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the history without the clocks."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in outcome.history]


def difference(outcome: Outcome, alone: Outcome) -> float:
    """Return the largest difference of a training on several ranks from the training in one process."""
    assert {*outcome.codes, *alone.codes} == {0}, [*outcome.errors, *alone.errors]
    for state in outcome.states[1:]:
        assert largest_difference(state, outcome.states[0]) == 0  # the ranks have the same bits
    rows, other = numbers(outcome), numbers(alone)
    assert [[*row] for row in rows] == [[*row] for row in other]
    return max(largest_difference(outcome.states[0], alone.states[0]), largest_difference(rows, other))


def assert_equal(
    forks: Forks, configs: Mapping[str, Sequence[str]], cwd: Path, *ranks: int, dtype: str = "float64"
) -> dict[str, Outcome]:
    """Check that trainings have the numbers of one process; return the outcomes in one process."""
    trainings, limit = cases(configs, dtype), {"float32": FLOAT32, "float64": FLOAT64}[dtype]
    alone = train_cases(forks, 1, trainings, cwd)
    for size in ranks:
        outcomes = train_cases(forks, size, trainings, cwd)
        found = {name: difference(outcome, alone[name]) for name, outcome in outcomes.items()}
        assert max(found.values()) <= limit, found
    return alone


def test_two_ranks_have_the_numbers_of_one_process(forks: Forks, tmp_path: Path) -> None:
    assert_equal(forks, MAIN, tmp_path, 2)


@pytest.mark.slow
def test_two_and_four_ranks_have_the_numbers_of_one_process_in_float64(forks: Forks, tmp_path: Path) -> None:
    alone = assert_equal(forks, MORE | ONLY_FLOAT64, tmp_path, 2, 4)
    # The trainings do what their names say.
    assert len(alone["early stop"].history) < 9
    assert alone["plateau"].history[-1]["lr/default"] < 1
    assert [row["train/skipped"] for row in alone["a skipped batch"].history] == [1, 1, 1]
    assert [row["train/skipped"] for row in alone["a rollback"].history] == [1, 1, 1]
    assert alone["sparse embeddings, tokens"].states[0]["progress"]["metrics"]["tokens"] == 0  # of the next epoch
    assert {"train/size", "train/largest", "train/margin/margin", "train/f1"} <= alone[
        "a step with a denominator, metrics"
    ].history[0].keys()
    assert {"train/discriminator", "train/generator", "train/real"} <= alone["a step with two optimizers"].history[
        0
    ].keys()


@pytest.mark.slow
def test_two_and_four_ranks_have_the_numbers_of_one_process_in_float32(forks: Forks, tmp_path: Path) -> None:
    names = [*MAIN, "a sum", "numbers", "a frozen group", "a step with a denominator, metrics"]
    assert_equal(forks, {name: MORE[name] for name in names}, tmp_path, 2, 4, dtype="float32")


@pytest.mark.slow
def test_low_precision_differs_by_its_rounding(forks: Forks, tmp_path: Path) -> None:
    configs = {
        "bf16": config("precision=bf16"),
        "fp16": config("precision=fp16"),
        "an overflow": config("precision=fp16", model="Loud"),
    }
    trainings = cases(configs, "float32")
    alone, pair = (train_cases(forks, ranks, trainings, tmp_path) for ranks in (1, 2))
    for name, outcome in pair.items():
        assert difference(outcome, alone[name]) < 0.02, name
    assert alone["an overflow"].history[-1]["train/scale"] < alone["fp16"].history[-1]["train/scale"]
    assert [row["train/scale"] for row in pair["an overflow"].history] == [
        row["train/scale"] for row in alone["an overflow"].history
    ]


# ------------------------------------------------------------------------------------------------ refused

COMPARES = f"{PARTS}.Contrastive .* is not the mean over the samples"
NO_MEAN = r"is not a mean over its denominator \(the number of samples, if it returns none\)"

REFUSED = {  # the config, and the error
    "declared": (
        config(f"loss._target_={PARTS}.WholeBatch"),
        f"^2 ranks share each batch: {PARTS}.WholeBatch .* has whole_batch = True\ntrain in one process",
    ),
    "compares samples": (config(f"loss._target_={PARTS}.Contrastive"), f"^2 ranks share each batch: {COMPARES}"),
    "shares of one sample": (
        config(f"loss._target_={PARTS}.Contrastive", "batch_size=3"),
        f"^2 ranks share each batch: {COMPARES}: the loss of 3 samples",
    ),
    "carried state": (
        config(model="Counting"),
        f"^2 ranks share each batch: {PARTS}.Counting .* carries state from batch to batch\ntrain in one process",
    ),
    "a step that compares samples": (step("contrastive_step"), f"training_step: .*contrastive_step .* {NO_MEAN}"),
    "a step that returns a sum": (step("sum_step"), f"training_step: .*sum_step .* {NO_MEAN}"),
    "a validation that compares samples": (
        config(f"evaluation_step={PARTS}.contrastive_step"),
        f"^2 ranks share each batch: evaluation_step: .* {NO_MEAN}",
    ),
    "several updates without samples": (
        step("gan_step", "evaluation_step=off", "optim=gan", size=100, model="Gan"),
        "gan_step .* needs samples on each of 2 ranks, and a batch has 1\nwrite data.drop_last=on; or train in one",
    ),
    "several updates of small batches": (
        step("gan_step", "evaluation_step=off", "optim=gan", "batch_size=1", model="Gan"),
        "and a batch has 1\nwrite batch_size=2 or more; or train in one process",
    ),
    "mixed images that may be unreadable": (
        config(MIXED, "data.on_unreadable=skip", kind="images", model="Convolutions"),
        "data.augment: 2 ranks share each batch, and mixing needs the sample before a share, which may be unreadable",
    ),
}


def test_a_training_that_would_have_other_numbers_is_refused_on_every_rank(forks: Forks, tmp_path: Path) -> None:
    configs = {name: overrides for name, (overrides, _) in REFUSED.items()}
    for name, outcome in train_cases(forks, 2, cases(configs, "float64"), tmp_path).items():
        own = next(error for error in outcome.errors if not error.startswith("rank "))
        assert outcome.codes == [2, 2], (name, outcome.errors)
        assert re.search(REFUSED[name][1], own), (name, own)


# ------------------------------------------------------------------------------------------ out of memory


def out_of_memory(*overrides: str, rank: int = 1, **arguments: Any) -> list[str]:
    """Return the overrides of a training that runs out of memory on one rank."""
    given = [f"+model.{key}={value}" for key, value in {"rank": rank, **arguments}.items()]
    return config("on_oom=split", *given, *overrides, model="OutOfMemory")


def test_all_ranks_split_if_memory_runs_out_on_one(forks: Forks, tmp_path: Path) -> None:
    configs = {
        "training": out_of_memory(WEIGHTS, samples=5),
        "validation": out_of_memory(samples=3, mode="validation"),
        "first rank": out_of_memory(rank=0, samples=9),
        "one sample": out_of_memory(samples=0),
        "stop": out_of_memory("on_oom=stop", samples=5),
    }
    trainings = cases(configs, "float64")
    alone, pair = (train_cases(forks, ranks, trainings, tmp_path) for ranks in (1, 2))
    for name, outcome in pair.items():
        if name in ("one sample", "stop"):
            assert outcome.codes == [8, 8], (name, outcome.errors)
        else:
            assert difference(outcome, alone[name]) <= FLOAT64, name
    assert math.isfinite(pair["training"].history[-1]["val/loss"])
