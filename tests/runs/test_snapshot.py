"""What is remembered of a training, and put back: by name, with its types, or refused in words."""

from __future__ import annotations

import collections
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import compose_settings, loss_case, make_loader_of, make_state, only_optimizer
from trainkit.build import session as build
from trainkit.config.search_path import CONF
from trainkit.core.errors import CheckpointError, NonFiniteError, Stopped
from trainkit.core.pytree import copy_to_cpu
from trainkit.core.rng import rng_state, set_rng_state
from trainkit.data.loaders import make_loader
from trainkit.data.prepare import Prepare
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import capture_state, digest, restore_state
from trainkit.training.loop import evaluate, fit, train_epoch
from trainkit.training.state import State

OPTIMIZERS = sorted(file.stem for file in (CONF / "optim").glob("*.yaml"))
SCHEDULERS = sorted(file.stem for file in (CONF / "scheduler").glob("*.yaml"))


def through_a_file(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a later process reads of what was remembered."""
    return Checkpoints(folder).load(Checkpoints(folder).write(saved))


def same_after(overrides: list[str], folder: Path) -> None:
    """Train two epochs at once, and in two processes' worth of objects; compare."""
    overrides = [*overrides, "epochs=2", "limit_batches=3", "batch_size=8"]
    straight = build.build_session(compose_settings(overrides))
    fit(straight.state, straight.train, straight.val)
    first = build.build_session(compose_settings(overrides))
    first.state.progress.batches = len(first.train)
    train_epoch(first.state, first.train, [])
    saved = through_a_file(capture_state(first.state, {}), folder)
    second = build.build_session(compose_settings(overrides))
    torch.manual_seed(99)
    restore_state(second.state, saved)
    assert digest(capture_state(second.state, {})) == digest(saved)
    fit(second.state, second.train, second.val)
    assert digest(capture_state(second.state, {})) == digest(capture_state(straight.state, {}))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_goes_on_to_the_same_bits(optim: str, here: Path) -> None:
    more = ["model.bias=false"] if optim == "muon" else []
    same_after([f"optim={optim}", "model=mlp", "model.hidden=[16]", *more], here)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_goes_on_to_the_same_bits(scheduler: str, here: Path) -> None:
    (here / "snapmodule.py").write_text("def factor(step):\n    return 0.9 ** step\n")
    more = ["scheduler.lr_lambda=snapmodule.factor"] if scheduler in ("lambda", "multiplicative") else []
    rules = "+param_groups.biases={name: '.*bias', lr_mult: 2}"
    same_after([f"scheduler={scheduler}", "model=mlp", "model.hidden=[16]", "optim.momentum=0.9", rules, *more], here)


def test_a_schedulers_cycled_momentum_goes_on_too(here: Path) -> None:
    same_after(
        ["scheduler=onecycle", "scheduler.cycle_momentum=true", "model=mlp", "optim.momentum=0.9", "ema=0.9"], here
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tensors_keep_their_types_also_where_torch_gives_a_state_that_of_its_parameter(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = nn.Linear(3, 2).to(dtype)
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1)
    state = make_state(model, nn.MSELoss(), optimizer=optimizer)
    inputs, targets = torch.randn(8, 3).to(dtype), torch.randn(8, 2).to(dtype)
    fit(state, make_loader_of(inputs, targets, 4))
    for content in optimizer.state.values():
        content["mask"] = torch.tensor([True, False])
    saved = through_a_file(capture_state(state, {}), tmp_path)
    twin = nn.Linear(3, 2).to(dtype)
    later = make_state(twin, nn.MSELoss(), optimizer=torch.optim.ASGD(twin.parameters(), lr=0.1))
    restore_state(later, saved)
    assert digest(capture_state(later, {})) == digest(capture_state(state, {}))


def test_optimizers_are_restored_by_name_whatever_the_order_of_their_groups(tmp_path: Path) -> None:
    def made(order: list[str]) -> State:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("a", "b")})
        model.forward = lambda x: model["b"](model["a"](x))
        groups = [
            {
                "params": list(model[name].parameters()),
                "name": name,
                "param_names": [f"{name}.weight", f"{name}.bias"],
            }
            for name in order
        ]
        return make_state(model, nn.MSELoss(), optimizer=torch.optim.Adam(groups, lr=0.1))

    first, second = made(["a", "b"]), made(["b", "a"])
    loader = make_loader_of(torch.randn(8, 2), torch.randn(8, 2), 4)
    fit(first, loader)
    restore_state(second, through_a_file(capture_state(first, {}), tmp_path))
    for optimizer_state, module in (
        (only_optimizer(second).state, second.model),
        (only_optimizer(first).state, first.model),
    ):
        assert len(optimizer_state) == 4
        assert all(optimizer_state[p]["exp_avg"].shape == p.shape for p in module.parameters())
    mine, theirs = first.model["a"].weight, second.model["a"].weight
    assert torch.equal(only_optimizer(first).state[mine]["exp_avg"], only_optimizer(second).state[theirs]["exp_avg"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(step=-1), "step is -1, expected a count"),
        (lambda s: s.update(epoch="3"), "epoch is '3', expected a count"),
        (lambda s: s.update(batch=True), "batch is True, expected a count"),
        (lambda s: s["model"].pop("weight"), "Missing key"),
        (lambda s: s["model"].update(weight=torch.zeros(9)), "size mismatch"),
        (lambda s: s.update(optimizers={}), "its optimizers differ"),
        (lambda s: s["optimizers"]["optim"].update(groups={"other": {}}), "its param groups differ"),
        (lambda s: s["optimizers"]["optim"]["state"].update(x={}), "its optimized parameters differ: it has x"),
        (lambda s: s.update(schedulers=[{}]), "schedulers: 1 in the checkpoint, 0 here"),
        (lambda s: s.update(ema={}), "ema: on in the checkpoint, off here"),
        (lambda s: s.update(metrics={}), "it lacks 'seen'"),
        (lambda s: s["metrics"].update(seconds="nan"), "seconds has the wrong type"),
        (lambda s: s.update(best="good"), "best has the wrong type"),
        (lambda s: s.update(fingerprint=[1]), "fingerprint has the wrong type"),
        (lambda s: s.update(epoch=9, fingerprint={"epochs": 3}), "it has done 9 of 3 epochs"),
        (
            lambda s: s["optimizers"]["optim"]["groups"]["default"].update(lr="high"),
            "lr of param group default is 'high'",
        ),
        (lambda s: s.update(rng={}), "it lacks 'python'"),
        (lambda s: s["rng"].update(torch=torch.zeros(3)), "does not fit"),
        (lambda s: s.update(early_stop=None), "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: Any, words: str) -> None:
    model, loss_fn, _, _ = loss_case("cross entropy")
    state = make_state(model, loss_fn)
    saved = copy_to_cpu(capture_state(state, {}))
    change(saved)
    with pytest.raises(CheckpointError, match=words):
        restore_state(state, saved)


def test_all_three_random_generators_are_put_back() -> None:
    import random

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    np.random.randn()  # which keeps a second one for later
    before = rng_state()
    draws = [(torch.rand(2).tolist(), np.random.randn(), random.gauss(0, 1)) for _ in range(2)]
    set_rng_state(before)
    assert [(torch.rand(2).tolist(), np.random.randn(), random.gauss(0, 1)) for _ in range(2)] == draws


def test_a_digest_tells_the_last_bit_of_anything_but_the_clocks() -> None:
    model, loss_fn, _, _ = loss_case("cross entropy")
    saved = copy_to_cpu(capture_state(make_state(model, loss_fn), {}))
    assert digest(copy.deepcopy(saved)) == digest(saved)
    saved["metrics"]["seconds"] = 123.0
    saved["fingerprint"] = {"other": 1}
    assert digest(copy.deepcopy(saved)) == digest(saved)
    before = digest(saved)
    saved["model"]["weight"][0, 0] = math.nextafter(float(saved["model"]["weight"][0, 0]), math.inf)
    assert digest(saved) == before  # which is less than a float32 can tell
    saved["model"]["weight"].view(torch.int32)[0, 0] += 1
    assert digest(saved) != before


class Lookahead(torch.optim.SGD):
    """Keeps slow weights beside its state, and gives them by its own `state_dict`, as torch lets it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        fast = [p for group in self.param_groups for p in group["params"]]
        for slow, p in zip(self.slow, fast, strict=True):
            slow.lerp_(p.detach(), 0.5)
            p.data.copy_(slow)
        return done

    def state_dict(self) -> Any:
        return {**super().state_dict(), "slow": self.slow}

    def load_state_dict(self, state_dict: Any) -> None:
        self.slow = [tensor.clone() for tensor in state_dict["slow"]]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "slow"})


def test_what_an_optimizer_adds_to_its_state_dict_is_kept(tmp_path: Path) -> None:
    def made() -> State:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return make_state(model, nn.MSELoss(), epochs=2, optimizer=Lookahead(model.parameters(), 0.1))

    loader = make_loader_of(torch.randn(8, 3), torch.randn(8, 2), 4)
    straight, first, second = made(), made(), made()
    fit(straight, loader)
    first.progress.batches = len(loader)
    train_epoch(first, loader, [])
    only_optimizer(first).state["all"] = {"seen": 3}  # a key that is no parameter
    restore_state(second, through_a_file(capture_state(first, {}), tmp_path))
    assert only_optimizer(second).state["all"] == {"seen": 3}
    fit(second, loader)
    assert digest(capture_state(second, {})["model"]) == digest(capture_state(straight, {})["model"])


def test_a_schedulers_containers_keep_their_types(tmp_path: Path) -> None:
    class Odd(torch.optim.lr_scheduler.ConstantLR):
        def __init__(self, optimizer: Any) -> None:
            self.seen, self.counts = {1, 2}, collections.defaultdict(int, a=1)
            self.array = np.arange(3)
            super().__init__(optimizer)

    def made() -> State:
        model = nn.Linear(3, 2)
        state = make_state(model, nn.MSELoss())
        state.objects.epoch_schedulers = [Odd(state.objects.optimizer)]
        return state

    first, second = made(), made()
    first.objects.epoch_schedulers[0].seen.add(7)
    restore_state(second, through_a_file(capture_state(first, {}), tmp_path))
    scheduler: Any = second.objects.epoch_schedulers[0]
    assert scheduler.seen == {1, 2, 7}
    assert scheduler.counts["missing"] == 0
    assert scheduler.array.tolist() == [0, 1, 2]


def test_options_that_are_no_arguments_are_state_also_where_the_rates_are_planned_anew() -> None:
    class Counting(torch.optim.SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr=lr)
            self.param_groups[0]["k"] = 0

    def made() -> State:
        model = nn.Linear(3, 2)
        return make_state(model, nn.MSELoss(), optimizer=Counting(model.parameters(), 0.1))

    first, second = made(), made()
    first.optimizer.param_groups[0].update(k=7, lr=0.3)
    restore_state(second, capture_state(first, {}), changed={"lr"})
    assert second.optimizer.param_groups[0]["k"] == 7
    assert second.optimizer.param_groups[0]["lr"] == 0.1


def test_lbfgs_over_parameters_of_two_types_goes_on(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4).bfloat16(), nn.Linear(4, 2).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.b(self.a(x.bfloat16()).double())
            return outputs.float()

    def made() -> State:
        torch.manual_seed(0)
        model = Mixed()
        return make_state(model, nn.MSELoss(), epochs=2, optimizer=torch.optim.LBFGS(model.parameters(), lr=0.1))

    loader = make_loader_of(torch.randn(8, 3), torch.randn(8, 2), 8)
    straight, first, second = made(), made(), made()
    fit(straight, loader)
    first.progress.batches = len(loader)
    train_epoch(first, loader, [])
    restore_state(second, through_a_file(capture_state(first, {}), tmp_path))
    fit(second, loader)
    assert digest(capture_state(second, {})) == digest(capture_state(straight, {}))


@pytest.mark.parametrize("extra", [{np.int64(1): 2}, {"big": 2**3000}])
def test_what_is_written_can_be_read_again_or_is_refused(extra: Any, tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return extra

        def set_extra_state(self, state: Any) -> None: ...

    state = make_state(Extra(2, 2), nn.MSELoss())
    if "big" in extra:
        with pytest.raises(CheckpointError, match=r"model\._extra_state\.big: an integer of 3001 bits"):
            capture_state(state, {})
    else:
        assert through_a_file(capture_state(state, {}), tmp_path)["model"]["_extra_state"] == {1: 2}


# --------------------------------------------------------------------------------------- where it may stop


class StoppingDataset:
    """Data whose fifth sample receives a signal: its handler raises `state.stop` while the sample is read."""

    classes = ("a", "b")

    def __init__(self, how: str) -> None:
        self.how, self.state = how, None

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        sample = torch.randn(3), index % 2
        if index == 4 and self.state is not None and self.how != "during the restore of RNG states":
            self.state.stop = Stopped(15)
            if self.how == "raised":
                raise self.state.stop
            try:
                raise self.state.stop
            except:  # noqa: E722  # some data sets do this
                return torch.zeros(3), 0
        return sample


@pytest.mark.parametrize("how", ["raised", "swallowed", "during the restore of RNG states"])
def test_a_stop_while_a_sample_is_read_keeps_the_rng_states_and_the_weights(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    state = make_state(model, nn.CrossEntropyLoss())
    data = StoppingDataset(how)
    loader = make_loader(data, Prepare(torch.device("cpu")), batch_size=2, seed=None)
    seen: list[Any] = []

    class Watch:
        def on_step(self, state: State) -> None:
            seen.append(digest({"rng": rng_state(), "model": dict(state.objects.model.state_dict())}))
            if state.progress.step == 2:
                data.state = state  # type: ignore[assignment]

    set_state = torch.set_rng_state

    def interrupted(value: Any) -> None:
        if state.stop is None and state.progress.step == 2:
            state.stop = Stopped(15)
            raise state.stop
        set_state(value)

    if how.startswith("during"):
        monkeypatch.setattr(torch, "set_rng_state", interrupted)
    with pytest.raises(Stopped):
        fit(state, loader, hooks=[Watch()])
    assert state.progress.batch == state.progress.step == 2
    assert digest({"rng": rng_state(), "model": dict(state.objects.model.state_dict())}) == seen[-1]


def test_a_stop_in_validation_undoes_what_that_did_to_buffers() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.get_buffer("seen").add_(1)
            outputs: torch.Tensor = self.linear(x)
            return outputs

    state = make_state(Counting(), nn.CrossEntropyLoss())
    data = StoppingDataset("raised")
    data.state = state  # type: ignore[assignment]
    with pytest.raises(Stopped):
        evaluate(state, make_loader(data, Prepare(torch.device("cpu")), batch_size=2, seed=None))
    assert state.objects.model.get_buffer("seen").item() == 0


# ------------------------------------------------------------------------------------ what is not finite


class Poisoned(nn.Module):
    """A linear model with batch norm whose output is NaN for inputs above 100."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.linear(self.norm(x))
        return outputs * torch.where(x.amax() > 100, math.nan, 1.0)


def poisoned(bad: list[int], **more: Any) -> tuple[State, Any]:
    """A training on 40 samples in batches of 4, in order, some of which are poison."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 6), torch.randint(0, 5, (40,))
    inputs[bad] = 1000.0
    model = Poisoned()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "all"}], lr=0.1, momentum=0.9)
    state = make_state(model, nn.CrossEntropyLoss(), optimizer=optimizer, **more)
    return state, make_loader_of(inputs, targets, 4, seed=None)


def test_before_a_step_that_is_not_finite_changes_anything_the_training_stops_and_names_it() -> None:
    state, loader = poisoned([22])
    weights: list[torch.Tensor] = []

    class Keep:
        def on_step(self, state: State) -> None:
            weights[:] = [p.detach().clone() for p in state.objects.model.parameters()]

    with pytest.raises(NonFiniteError) as caught:
        fit(state, loader, hooks=[Keep()])
    told = str(caught.value)
    assert "step 6: the loss is nan, the gradient is not finite in param group all" in told
    assert "(batch 6 of epoch 1, samples 20, 21, 22, 23)" in told
    assert all(torch.equal(p, kept) for p, kept in zip(state.objects.model.parameters(), weights, strict=True))


def test_the_sample_whose_inputs_are_not_finite_is_named() -> None:
    state, loader = poisoned([])
    loader.tensors[0][17, 3] = math.inf
    with pytest.raises(NonFiniteError, match="samples 16, 17, 18, 19; the inputs of sample 17 are not finite"):
        fit(state, loader)


def test_a_norm_that_overflows_is_no_gradient_that_is_not_finite() -> None:
    model = nn.Linear(2, 1, bias=False)
    state = make_state(model, nn.L1Loss())
    fit(state, make_loader_of(torch.full((2, 2), 3e19), torch.zeros(2, 1), 2))
    assert state.progress.epoch == 1
    assert state.progress.grad_norm is not None
    assert state.progress.grad_norm.isinf()


def test_skip_leaves_out_what_is_not_finite_and_is_else_the_training_without_it() -> None:
    state, loader = poisoned([9, 10, 30], on_nonfinite="skip", ema=0.9)
    seen: list[dict[str, Any]] = []

    class Keep:
        def on_epoch(self, _: State, metrics: dict[str, Any]) -> None:
            seen.append(metrics)

    fit(state, loader, hooks=[Keep()])
    without, _ = poisoned([], ema=0.9)
    kept = [row for row in range(40) if row // 4 not in (2, 7)]
    inputs, targets = (tensor[kept] for tensor in loader.tensors)
    fit(without, make_loader_of(inputs, targets, 4, seed=None))
    mine, theirs = capture_state(state, {}), capture_state(without, {})
    for key in ("model", "optimizers", "ema", "step"):
        assert digest({key: mine[key]}) == digest({key: theirs[key]}), key
    assert seen[0]["train/skipped"] == 2
    assert seen[0]["train/samples"] == 32
    assert seen[0]["step"] == 8
    assert without.best is not None
    assert seen[0]["train/loss"] == without.best["train/loss"]


def test_skip_gives_up_where_an_epoch_has_too_many() -> None:
    state, _ = poisoned([], on_nonfinite="skip")
    loader = make_loader_of(torch.full((40, 6), 1000.0), torch.zeros(40, dtype=torch.long), 2)
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        fit(state, loader)
    assert state.progress.batch == 10


def test_a_loss_over_nothing_is_not_what_is_meant() -> None:
    state, loader = poisoned([])
    loader.tensors[1][4:8] = -100  # a batch whose every target is ignored
    fit(state, loader)
    assert state.progress.epoch == 1


def test_the_seconds_of_an_epoch_are_those_of_all_its_parts_and_of_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    seen: list[dict[str, Any]] = []

    class Clock:
        def on_start(self, _: State) -> None:
            clock[0] += 50

        def on_step(self, state: State) -> None:
            clock[0] += 1
            if state.progress.step == 2:
                seen.append(capture_state(state, {}))

        def on_epoch(self, _: State, metrics: dict[str, Any]) -> None:
            clock[0] += 20
            seen.append(metrics)

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    loader = make_loader_of(torch.randn(8, 3), torch.randn(8, 2), 2)
    fit(make_state(model, nn.MSELoss(), epochs=2), loader, hooks=[Clock()])
    middle, first, second = seen
    assert (middle["metrics"]["seconds"], first["seconds"], second["seconds"]) == (2, 4, 4)
    assert first["samples_per_second"] == 8 / 4
    later = make_state(model, nn.MSELoss(), epochs=1)
    restore_state(later, middle)
    clock[0] += 1000
    fit(later, loader, hooks=[Clock()])
    assert seen[-1]["seconds"] == 4
