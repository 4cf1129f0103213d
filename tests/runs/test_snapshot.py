"""Snapshots: a captured state is restored by name, with its dtypes, to the same bits, or refused."""

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
from trainkit.core.errors import CheckpointError
from trainkit.core.pytree import copy_to_cpu
from trainkit.core.rng import rng_state, set_rng_state
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import capture_state, digest, restore_state
from trainkit.training.loop import fit, train_epoch
from trainkit.training.state import State

# optim=gan needs a model with a generator and a discriminator: see tests/engine/test_generative_runs.py.
OPTIMIZERS = sorted(file.stem for file in (CONF / "optim").glob("*.yaml") if file.stem != "gan")
SCHEDULERS = sorted(file.stem for file in (CONF / "scheduler").glob("*.yaml"))


def through_a_file(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a captured state as a later process reads it."""
    return Checkpoints(folder).load(Checkpoints(folder).write(saved))


def check_resume(overrides: list[str], folder: Path) -> None:
    """Check that two epochs in one session equal one epoch in each of two sessions."""
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
def test_every_optimizer_resumes_to_the_same_bits(optim: str, here: Path) -> None:
    more = ["model.bias=false"] if optim == "muon" else []
    check_resume([f"optim={optim}", "model=mlp", "model.hidden=[16]", *more], here)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_resumes_to_the_same_bits(scheduler: str, here: Path) -> None:
    (here / "snapmodule.py").write_text("def factor(step):\n    return 0.9 ** step\n")
    more = ["scheduler.lr_lambda=snapmodule.factor"] if scheduler in ("lambda", "multiplicative") else []
    rules = "+param_groups.biases={name: '.*bias', lr_mult: 2}"
    check_resume([f"scheduler={scheduler}", "model=mlp", "model.hidden=[16]", "optim.momentum=0.9", rules, *more], here)


def test_a_cycled_momentum_resumes_to_the_same_bits(here: Path) -> None:
    check_resume(
        ["scheduler=onecycle", "scheduler.cycle_momentum=true", "model=mlp", "optim.momentum=0.9", "ema=0.9"], here
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_optimizer_states_keep_their_dtypes_although_torch_casts_them(dtype: torch.dtype, tmp_path: Path) -> None:
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


def test_optimizers_are_restored_by_name_in_any_order_of_groups(tmp_path: Path) -> None:
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
        (
            lambda s: s["optimizers"]["optim"]["groups"]["default"].update(lr="high"),
            "lr of param group default is 'high'",
        ),
        (lambda s: s.update(rng={}), "it lacks 'python'"),
        (lambda s: s["rng"].update(torch=torch.zeros(3)), "does not fit"),
        (lambda s: s.update(early_stop=None), "does not fit"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_the_reason(change: Any, words: str) -> None:
    model, loss_fn, _, _ = loss_case("cross entropy")
    state = make_state(model, loss_fn)
    saved = copy_to_cpu(capture_state(state, {}))
    change(saved)
    with pytest.raises(CheckpointError, match=words):
        restore_state(state, saved)


def test_the_rng_states_of_python_numpy_and_torch_are_restored() -> None:
    import random

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    np.random.randn()  # NumPy caches a second number
    before = rng_state()
    draws = [(torch.rand(2).tolist(), np.random.randn(), random.gauss(0, 1)) for _ in range(2)]
    set_rng_state(before)
    assert [(torch.rand(2).tolist(), np.random.randn(), random.gauss(0, 1)) for _ in range(2)] == draws


def test_a_digest_changes_with_any_bit_but_not_with_clocks() -> None:
    model, loss_fn, _, _ = loss_case("cross entropy")
    saved = copy_to_cpu(capture_state(make_state(model, loss_fn), {}))
    assert digest(copy.deepcopy(saved)) == digest(saved)
    saved["metrics"]["seconds"] = 123.0
    saved["fingerprint"] = {"other": 1}
    assert digest(copy.deepcopy(saved)) == digest(saved)
    before = digest(saved)
    saved["model"]["weight"][0, 0] = math.nextafter(float(saved["model"]["weight"][0, 0]), math.inf)
    assert digest(saved) == before  # float32 rounds this change away
    saved["model"]["weight"].view(torch.int32)[0, 0] += 1
    assert digest(saved) != before


class Lookahead(torch.optim.SGD):
    """An optimizer with slow weights outside of its state, which its own `state_dict` adds."""

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


def test_extra_entries_of_an_optimizers_state_dict_are_restored(tmp_path: Path) -> None:
    def made() -> State:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return make_state(model, nn.MSELoss(), epochs=2, optimizer=Lookahead(model.parameters(), 0.1))

    loader = make_loader_of(torch.randn(8, 3), torch.randn(8, 2), 4)
    straight, first, second = made(), made(), made()
    fit(straight, loader)
    first.progress.batches = len(loader)
    train_epoch(first, loader, [])
    only_optimizer(first).state["all"] = {"seen": 3}  # a key that is not a parameter
    restore_state(second, through_a_file(capture_state(first, {}), tmp_path))
    assert only_optimizer(second).state["all"] == {"seen": 3}
    fit(second, loader)
    assert digest(capture_state(second, {})["model"]) == digest(capture_state(straight, {})["model"])


def test_the_containers_of_a_scheduler_keep_their_types(tmp_path: Path) -> None:
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


def test_group_entries_that_are_not_arguments_are_restored_with_changed_rates() -> None:
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


def test_lbfgs_over_parameters_of_two_dtypes_resumes_to_the_same_bits(tmp_path: Path) -> None:
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
def test_a_value_is_stored_as_a_plain_value_or_refused(extra: Any, tmp_path: Path) -> None:
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


def test_the_seconds_of_an_epoch_include_all_processes_but_not_the_epoch_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
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
