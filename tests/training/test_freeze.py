"""Param groups that join the training after some epochs, compared with a loop written by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import SmallCNN, compose_settings, small_run
from trainkit.build.session import Session, build_session
from trainkit.core.errors import ConfigError
from trainkit.engine.session_facts import startup_notes
from trainkit.training.loop import fit

BODY = "+param_groups.body={module: [conv, body], lr_mult: 0.5, freeze: 2}"
RUN = small_run(SmallCNN, "epochs=4", "optim=adamw", "lr=0.01", "+optim.fused=false", "scheduler=exponential")


def session_of(*more: str) -> Session:
    return build_session(compose_settings([*RUN, *more]))


def train_by_hand(model: nn.Module, session: Session, frozen_epochs: int) -> None:
    """Train as a tutorial does: the body at half the rate, and frozen at first."""
    body = [*model.get_submodule("conv").parameters(), *model.get_submodule("body").parameters()]
    head = [*model.get_submodule("head").parameters()]
    optimizer = torch.optim.AdamW([{"params": body, "lr": 0.005}, {"params": head, "lr": 0.01}])
    gamma = session.settings.scheduler[""]["gamma"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    for epoch in range(4):
        for param in body:
            param.requires_grad_(epoch >= frozen_epochs)
        for inputs, targets in session.train.batches(epoch):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()


def test_a_group_that_joins_later_trains_as_a_loop_written_by_hand() -> None:
    session = session_of(BODY)
    model = copy.deepcopy(session.state.objects.model)
    train_by_hand(model, session, frozen_epochs=2)
    fit(session.state, session.train, session.val)
    for ours, theirs in zip(session.state.objects.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_state_of_the_optimizer_starts_when_a_group_joins() -> None:
    seen: list[tuple[bool, bool, float]] = []

    class Watch:
        def on_epoch(self, state: Any, metrics: dict[str, Any]) -> None:
            param = state.model.conv.weight
            content = state.optimizer.state.get(param)
            seen.append((param.requires_grad, bool(content), metrics["lr/body"] / metrics["lr/default"]))

    session = session_of(BODY)
    before = session.state.objects.model.get_parameter("conv.weight")
    assert not before.requires_grad
    fit(session.state, session.train, session.val, [Watch()])
    assert seen == [(False, False, 0.5), (False, False, 0.5), (True, True, 0.5), (True, True, 0.5)]
    assert session.state.optimizer.state[before]["step"] == 12


def test_a_rule_without_freezing_protects_from_later_rules() -> None:
    session = session_of(
        "+param_groups.a={module: body, freeze: false}", "+param_groups.b={module: [body, conv], freeze: 1}"
    )
    assert session.named["body.weight"].requires_grad
    assert not session.named["conv.weight"].requires_grad


def test_groups_that_join_at_different_epochs_are_not_merged() -> None:
    session = session_of("+param_groups.a={module: conv, freeze: 1}", "+param_groups.b={module: body, freeze: 3}")
    assert [(group.name, group.frozen_epochs) for group in session.groups] == [("a", 1), ("b", 3), ("default", 0)]
    rows = {row["name"]: row for row in session.params}
    assert (rows["conv.bias"]["options"]["freeze"], rows["conv.bias"]["decided_by"]["freeze"]) == (1, "a")
    assert "freeze" not in rows["head.bias"]["options"]
    assert any(line.split()[-1] == "freeze" for line in startup_notes(session) if line.startswith("param group"))


def test_a_note_says_that_a_group_never_joins() -> None:
    notes = startup_notes(session_of("+param_groups.body={module: [conv, body], freeze: 4}"))
    assert "note: param group body stays frozen, because the run has 4 epochs" in notes


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon"])
def test_a_wrong_number_of_epochs_is_an_error(value: str) -> None:
    with pytest.raises(ConfigError, match="must be true, false, or a number of epochs of at least 1"):
        session_of(f"+param_groups.body={{module: body, freeze: {value}}}")


def test_the_first_epochs_must_train_a_parameter() -> None:
    with pytest.raises(ConfigError, match="freeze all parameters in the first 2 epochs"):
        session_of("+param_groups.all={name: '.*', freeze: 2}")


def in_turn(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Update the body and the head by losses of their own."""
    yield "body", loss_fn(model(inputs), targets)
    yield "head", 2 * loss_fn(model(inputs), targets)


@pytest.mark.parametrize("frozen", ["conv", "[conv, body]"])
def test_a_step_of_several_optimizers_skips_parameters_that_join_later(frozen: str, here: Path) -> None:
    (here / "conf" / "optim").mkdir(parents=True)
    sgd = "{_target_: torch.optim.SGD, lr: 0.1}"
    (here / "conf" / "optim" / "two.yaml").write_text(f"body: {sgd}\nhead: {sgd}\n")
    rules = [f"+param_groups.frozen={{module: {frozen}, freeze: 1}}"]
    rules += ["+param_groups.body={module: [conv, body], optimizer: body}"]
    rules += ["+param_groups.head={module: head, optimizer: head}"]
    step = f"training_step={in_turn.__module__}.in_turn"
    session = build_session(compose_settings([*small_run(SmallCNN, "epochs=2"), "optim=two", *rules, step]))
    before = {name: param.detach().clone() for name, param in session.named.items()}
    changed: list[set[str]] = []

    class Watch:
        def on_epoch(self, *_: Any) -> None:
            changed.append({name for name, param in session.named.items() if not torch.equal(param, before[name])})

    fit(session.state, session.train, session.val, [Watch()])
    frozen_names = {name for name in before if name.split(".")[0] in frozen}
    assert changed == [before.keys() - frozen_names, before.keys()]
