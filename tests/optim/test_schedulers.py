"""Schedulers and optimizers compared with plain torch, and the ratios between param groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.helpers import compose_settings
from trainkit.build import session as build
from trainkit.build.model import build_model, initialize_lazy_layers
from trainkit.config.schema import UNNAMED
from trainkit.config.search_path import CONF
from trainkit.core.errors import TrainkitError
from trainkit.data.loaders import epoch_order
from trainkit.training.loop import fit
from trainkit.training.state import State

OPTIMIZERS = sorted(file.stem for file in (CONF / "optim").glob("*.yaml") if file.stem not in ("muon_sgd", "gan"))
BY_STEP = ["epochs=1", "limit_batches=20", "scheduler.interval=step"]
BY_EPOCH = ["epochs=20", "limit_batches=1", "scheduler.interval=epoch"]
HEAD = "+param_groups.head={module: head, lr_mult: 10}"


def torch_scheduler(name: str, optimizer: torch.optim.Optimizer) -> Any:
    """Build the scheduler with torch alone."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if name == "step":
        return lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.1)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    if name == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=20, cycle_momentum=False)
    if name == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.5)
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=1)
    second = lr_scheduler.CosineAnnealingLR(optimizer, T_max=19)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[1])


SCHEDULERS = {
    "step": BY_STEP,
    "cosine": BY_STEP,
    "onecycle": BY_STEP,
    "warmup_cosine": BY_STEP,
    "plateau": [*BY_EPOCH, "scheduler.patience=1", "scheduler.threshold=0.5", "monitor.metric=train/loss"],
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_equal_those_of_plain_torch(optimizer: str, scheduler: str) -> None:
    overrides = [f"optim={optimizer}", f"scheduler={scheduler}", *SCHEDULERS[scheduler], "data.split=off"]
    overrides += ["model=mlp", "model.hidden=[8]"]
    overrides += ["model.bias=false"] if optimizer == "muon" else []
    overrides += ["optim.max_iter=4"] if optimizer == "lbfgs" else []  # 20 evaluations of a step take seconds
    overrides += [] if optimizer == "lbfgs" else [HEAD]  # LBFGS supports one group only
    settings = compose_settings(overrides)
    session = build.build_session(settings)
    fit(session.state, session.train)

    images, labels = session.train.tensors  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = build_model(settings.model, torch.device("cpu"))
    initialize_lazy_layers(model, session.train)
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    head = [p for name, p in model.named_parameters() if name.startswith("head")]
    lr = settings.lr
    groups = (
        [{"params": [*rest, *head]}] if optimizer == "lbfgs" else [{"params": head, "lr": lr * 10}, {"params": rest}]
    )
    cls: Any = type(session.state.objects.optimizer)
    how = {"fused": True} if session.state.objects.optimizer.param_groups[0].get("fused") else {}
    theirs: Any = cls(groups, **{k: v for k, v in settings.optim[UNNAMED].items() if k != "_target_"}, **how)
    schedule = torch_scheduler(scheduler, theirs)
    loss_fn = nn.CrossEntropyLoss()
    by_epoch = scheduler == "plateau"
    for step in range(20):
        indices = epoch_order(len(images), 0, step if by_epoch else 0).split(32)[0 if by_epoch else step]
        inputs, targets = images[indices].float() / 255, labels[indices]
        losses: list[Any] = []

        def closure(inputs: Any = inputs, targets: Any = targets, losses: list[Any] = losses) -> Any:
            theirs.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            losses.append(loss.item())
            return loss

        theirs.step(closure)
        schedule.step(losses[0]) if by_epoch else schedule.step()
    for ours, other in zip(session.state.objects.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, other)
    assert session.state.progress.step == 20
    assert [g["lr"] for g in session.state.objects.optimizer.param_groups] == [g["lr"] for g in theirs.param_groups]


class Rates:
    """A hook that records the learning rate of each group after each step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_start(self, state: State) -> None:
        self.seen.append([group["lr"] for group in state.objects.optimizer.param_groups])

    def on_step(self, state: State) -> None:
        self.seen.append([group["lr"] for group in state.objects.optimizer.param_groups])


RATIOS = {
    "constant": [],
    "linear": [],
    "polynomial": [],
    "exponential": [],
    "multistep": [],
    "chained": [],
    "cosine": ["scheduler.eta_min=0.001"],
    "warm_restarts": ["scheduler.eta_min=0.001", "scheduler.T_0=5"],
    "warmup_cosine": ["scheduler.schedulers.cosine.eta_min=0.001"],
    "onecycle": [],
    "cyclic": [],
    "plateau": [
        "scheduler.patience=0",
        "scheduler.threshold=0.9",
        "scheduler.min_lr=0.004",
        "scheduler.interval=epoch",
    ],
}


@pytest.mark.parametrize("scheduler", RATIOS)
def test_every_scheduler_keeps_the_ratios_between_groups(scheduler: str) -> None:
    interval = "epoch" if scheduler == "plateau" else "step"
    overrides = [f"scheduler={scheduler}", f"scheduler.interval={interval}", *RATIOS[scheduler], "model=mlp", HEAD]
    session = build.build_session(compose_settings([*overrides, "epochs=4", "limit_batches=5"]))
    rates = Rates()
    fit(session.state, session.train, session.val, [rates])
    assert len({rest for _, rest in rates.seen}) > 1  # the learning rate changes
    for head, rest in rates.seen:
        assert head == pytest.approx(10 * rest, rel=1e-9)


def test_eta_min_is_scaled_by_the_ratio_of_each_group() -> None:
    overrides = [
        "scheduler=cosine",
        "scheduler.eta_min=0.002",
        "model=mlp",
        HEAD,
        "epochs=3",
        "limit_batches=2",
        "data.split=off",
    ]
    session = build.build_session(compose_settings(overrides))
    fit(session.state, session.train)
    assert [g["lr"] for g in session.state.objects.optimizer.param_groups] == pytest.approx([0.02, 0.002])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["scheduler=warmup_cosine", "scheduler.schedulers.cosine.eta_min=0.002", HEAD], [0.02, 0.002]),
        (["scheduler=cosine", "scheduler.eta_min=0.002", HEAD, "+param_groups.z={module: fc1, freeze: true}"], [0.02]),
        (["scheduler=cosine", "scheduler.eta_min=[0.03,0.002]", HEAD], [0.03, 0.002]),
    ],
)
def test_eta_min_applies_after_a_warm_up_to_a_single_group_and_as_a_list(
    overrides: list[str], expected: list[float]
) -> None:
    session = build.build_session(compose_settings([*overrides, "model=mlp", "epochs=4", "limit_batches=10"]))
    fit(session.state, session.train, session.val)
    assert [g["lr"] for g in session.state.objects.optimizer.param_groups] == pytest.approx(expected)


def test_max_lr_keeps_the_ratio_between_optimizers(here: Any) -> None:
    (here / "conf/optim").mkdir(parents=True)
    (here / "conf/optim/two.yaml").write_text(
        "# @package _global_\nlr: 0.02\noptim:\n  muon: {_target_: torch.optim.Muon, lr: '${lr}'}\n"
        "  adamw: {_target_: torch.optim.AdamW, lr: 0.001}\n"
        "param_groups:\n  matrices: {ndim: 2, optimizer: muon}\n"
    )
    rates = Rates()
    session = build.build_session(compose_settings(["optim=two", "scheduler=onecycle", "epochs=1", "limit_batches=10"]))
    fit(session.state, session.train, session.val, [rates])
    assert [max(column) for column in zip(*rates.seen, strict=True)] == pytest.approx([0.02, 0.001])


def test_lists_of_learning_rates_stay_unchanged() -> None:
    overrides = ["scheduler=onecycle", "scheduler.max_lr=[0.5,0.25]", "model=mlp", HEAD]
    session = build.build_session(compose_settings(overrides))
    assert [g["max_lr"] for g in session.state.objects.optimizer.param_groups] == [0.5, 0.25]


# ------------------------------------------------------------------------------ numbers of steps


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["scheduler.T_max=${total_steps:}"], 35),
        (["scheduler.T_max=${total_steps:0.2}"], 7),
        (["scheduler.T_max=${total_steps:0.2,1}"], 28),
        (["scheduler.T_max=${total_steps:0.001}"], 1),  # at least one step
        (["scheduler.T_max=${steps_per_epoch:}"], 5),
        (["scheduler.T_max=${steps_per_epoch:3}"], 15),
        (["scheduler.T_max=${total_steps:}", "scheduler.interval=epoch"], 7),
        (["scheduler.T_max=${steps_per_epoch:3}", "scheduler.interval=epoch"], 3),
    ],
    ids=str,
)
def test_steps_are_counted_in_the_interval_of_the_scheduler(overrides: list[str], expected: int) -> None:
    overrides = ["scheduler=cosine", "scheduler.interval=step", *overrides, "epochs=7", "limit_batches=5"]
    state = build.build_session(compose_settings(overrides)).state
    scheduler: Any
    (scheduler,) = state.objects.step_schedulers + state.objects.epoch_schedulers
    assert scheduler.T_max == expected


def test_the_phases_of_a_schedule_add_up_to_all_steps() -> None:
    state = build.build_session(compose_settings(["scheduler=warmup_cosine", "epochs=3", "limit_batches=7"])).state
    sequence: Any
    (sequence,) = state.objects.step_schedulers
    first, second = sequence._schedulers
    assert first.total_iters + second.T_max == 21
    assert sequence._milestones == [first.total_iters]


def test_a_scheduler_can_use_a_custom_function(here: Any) -> None:
    (here / "myrates.py").write_text("def half(step): return 0.5 ** step\n")
    overrides = [
        "scheduler=lambda",
        "scheduler.lr_lambda=myrates.half",
        "epochs=3",
        "limit_batches=1",
        "data.split=off",
    ]
    session = build.build_session(compose_settings(overrides))
    fit(session.state, session.train)
    assert session.state.objects.optimizer.param_groups[0]["lr"] == 0.01 / 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scheduler=lambda"], ["scheduler.lr_lambda", "must be given"]),
        (["scheduler=warmup_cosine", "+scheduler.schedulers.cosine.interval=epoch"], ["only the outer scheduler"]),
        (["scheduler=lambda", "scheduler.lr_lambda=math.cosinus"], ["scheduler.lr_lambda=math.cosinus"]),
        (["+scheduler.sgd._target_=torch.optim.lr_scheduler.StepLR"], ["scheduler.sgd", "no optimizer of that name"]),
        (["scheduler=warmup_cosine", "~scheduler.schedulers.cosine._target_"], ["schedulers.cosine", "no _target_"]),
        (["scheduler=warmup_cosine", "scheduler.schedulers.cosine.T_mx=3"], ["T_m"]),
        (["scheduler=warmup_cosine", "scheduler.milestones=[]"], ["scheduler", "milestone"]),
        (["scheduler=cosine", "scheduler.T_max=0"], ["scheduler: ZeroDivisionError"]),
        (["scheduler=step", "scheduler.step_size=0"], ["scheduler: ZeroDivisionError"]),
        (["scheduler=cosine", "scheduler.T_max=${totl_steps:}"], ["scheduler.T_max", "did you mean ${total_steps:}?"]),
        (["scheduler=cosine", "scheduler.T_max=${total_steps}"], ["write it with a colon: ${total_steps:}"]),
        (["scheduler=cosine", "scheduler.T_max=${total_steps:abc}"], ["scheduler.T_max", "shares of the run"]),
        (["scheduler=cosine", "scheduler.T_max=${total_steps:1,0}"], ["scheduler.T_max", "shares of the run"]),
        (["scheduler=warmup_cosine", "scheduler.schedulers=abc"], ["scheduler.schedulers", "must be a list"]),
        (["scheduler=off"], ["write scheduler=none"]),
    ],
)
def test_a_wrong_scheduler_is_an_error_that_names_its_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(TrainkitError) as caught:
        build.build_session(compose_settings(overrides))
    assert all(word in str(caught.value) for word in words), str(caught.value)
