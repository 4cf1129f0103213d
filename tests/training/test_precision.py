"""Precisions: fp16 against a handwritten loop with a scaler, and every loss against float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.conftest import Command
from tests.helpers import PLAIN_SGD, STEPS, SmallCNN, assert_close, compose_settings, small_run, train_session
from trainkit.build import session as build
from trainkit.build.memory_format import choose_memory_format
from trainkit.core.errors import ConfigError, TrainkitError
from trainkit.data.loaders import epoch_order
from trainkit.diagnostics import inspect as inspection
from trainkit.runs.snapshot import capture_state, digest, restore_state
from trainkit.training import step as steps
from trainkit.training.loop import fit

GAIN = 20.0  # the gradient overflows in the first steps only


class UnusedMatrix(nn.Module):
    """A model whose matrix gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.bias = nn.Linear(4, 4, bias=False), nn.Parameter(torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10] + self.bias


class NanGradient(torch.autograd.Function):
    """The identity with a NaN gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient * math.nan


class NanAtFirst(nn.Module):
    """A model whose matrix, but not its bias, has a NaN gradient in the first step or in every step."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Linear(3072, 10, bias=False), nn.Parameter(torch.zeros(10))
        self.steps, self.always = 0, always

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        logits: Tensor = self.matrix(images.flatten(1))
        bad = self.training and (self.always or self.steps == 1)
        return (NanGradient.apply(logits) if bad else logits) + self.bias


# ------------------------------------------------------------------------------------- fp16 by hand


@pytest.mark.parametrize("gain", [1.0, GAIN], ids=["fits", "overflows"])
@pytest.mark.parametrize("more", [{}, {"clip_norm": 0.05}, {"micro_batch": 12}, {"ema": 0.9}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fp16_equals_a_handwritten_loop_with_a_scaler(layout: str, more: dict[str, Any], gain: float) -> None:
    options = [f"{key}={value}" for key, value in more.items()]
    overrides = small_run(SmallCNN, "precision=fp16", "optim=adam", f"memory_format={layout}", *options, gain=gain)
    scales: list[float] = []

    class Record:
        def on_step(self, state: Any) -> None:
            scales.append(state.objects.scaler.get_scale())

    session = train_session(overrides, [Record()])

    images, labels = session.train.tensors  # type: ignore[attr-defined]
    strides = getattr(torch, "contiguous_format" if layout == "contiguous" else layout)
    torch.manual_seed(0)
    model = SmallCNN(gain)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(
        model.parameters(), lr=session.state.objects.optimizer.param_groups[0]["lr"], fused=True
    )
    scaler, wanted = torch.amp.GradScaler("cpu"), []
    for rows in epoch_order(len(images), 0, 0).split(32)[:STEPS]:
        optimizer.zero_grad()
        for part in rows.split(more.get("micro_batch", 32)):
            with torch.autocast("cpu", torch.float16):
                inputs = (images[part].float() / 255).to(memory_format=strides)
                whole = len(part) == len(rows)
                loss = nn.functional.cross_entropy(model(inputs), labels[part], reduction="mean" if whole else "sum")
            scaler.scale(loss if whole else loss / len(rows)).backward()
        scaler.unscale_(optimizer)
        if "clip_norm" in more:
            nn.utils.clip_grad_norm_(model.parameters(), more["clip_norm"])
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        wanted.append(scaler.get_scale())
    assert scales == wanted
    assert (scales[0] < 2**16) == (gain > 1)
    assert scales[-2] == scales[-1]  # the last step changes the weights
    evaluated = average if "ema" in more else model
    for ours, theirs in zip(session.state.objects.evaluated[0].parameters(), evaluated.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_momentum_starts_with_the_first_step_without_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty_like
    # Uninitialized memory may hold any number.
    monkeypatch.setattr(torch, "empty_like", lambda *args, **more: empty(*args, **more).fill_(1e3))
    overrides = small_run(SmallCNN, "precision=fp16", gain=GAIN)
    fused = train_session([*overrides, "optim=sgd", "optim.momentum=0.9", "lr=1e-6"])
    assert_close(fused, train_session([*overrides, *PLAIN_SGD, "lr=1e-6"]), rtol=1e-5)


def test_an_overflow_in_the_first_step_causes_no_scheduler_warning() -> None:
    train_session(small_run(SmallCNN, "precision=fp16", "optim=radam", "scheduler=onecycle", gain=GAIN))


@pytest.mark.parametrize("clip", [[], ["clip_norm=1"], ["clip_value=1"]], ids=str)
def test_an_overflow_in_one_optimizer_keeps_the_weights_of_both_finite(clip: list[str]) -> None:
    model = train_session(small_run(NanAtFirst, "precision=fp16", "optim=muon_sgd", *clip)).state.model
    assert all(bool(param.isfinite().all()) for param in model.parameters())


def test_an_optimizer_without_gradients_does_not_step_in_fp16() -> None:
    session = train_session(small_run(UnusedMatrix, "precision=fp16", "optim=muon_sgd"))
    assert bool(session.state.objects.model.bias.abs().sum() > 0)


@pytest.mark.parametrize("epochs", [2, 8])
def test_a_gradient_that_always_overflows_ends_with_exit_code_4(epochs: int) -> None:
    with pytest.raises(TrainkitError, match="overflowed in fp16") as caught:
        train_session(small_run(NanAtFirst, "precision=fp16", f"epochs={epochs}", always=True))
    assert caught.value.exit_code == 4


def test_fp16_repeats_a_step_after_a_memory_error_in_clipping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip, calls = steps.clip_gradients, []

    def once(state: Any, optimizer: Any) -> None:
        calls.append(state.progress.step)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        clip(state, optimizer)

    overrides = small_run(SmallCNN, "precision=fp16", "on_oom=split", "clip_norm=0.1")
    whole = train_session(overrides)
    monkeypatch.setattr(steps, "clip_gradients", once)
    assert_close(train_session(overrides), whole, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_inspect_shows_the_unscaled_gradient(precision: str) -> None:
    plain, rows = (
        inspection.inspect_step(build.build_session(compose_settings(small_run(SmallCNN, f"precision={name}"))))[
            "parameters"
        ]
        for name in ("fp32", precision)
    )
    for key in ("grad", "grad_twice", "update"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in plain], rel=0.05)


def test_a_resumed_training_restores_the_scaler() -> None:
    overrides = small_run(SmallCNN, "precision=fp16", "optim=adam", "epochs=2", gain=GAIN)
    straight, begun, later = (build.build_session(compose_settings(overrides)) for _ in range(3))
    kept: list[dict[str, Any]] = []

    class Keep:
        def on_step(self, state: Any) -> None:
            if state.progress.step == 4:
                kept.append(copy.deepcopy(capture_state(state, {})))

    fit(begun.state, begun.train, None, [Keep()])
    restore_state(later.state, kept[0])
    for session in (straight, later):
        fit(session.state, session.train)
    assert later.state.objects.scaler is not None
    assert later.state.objects.scaler.get_scale() < 2**16
    assert digest(capture_state(later.state, {})) == digest(capture_state(straight.state, {}))


@pytest.mark.slow
def test_a_killed_run_in_fp16_resumes_to_the_same_bits(forked: Command) -> None:
    small = ["verify-resume", "precision=fp16", "optim=adam", "epochs=2", "limit_batches=3", "scheduler=onecycle"]
    done = forked(*small, "--kills", "1")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- losses and validation


@pytest.mark.parametrize("loss", ["cross_entropy", "nll", "mse", "l1", "smooth_l1", "bce"])
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 2e-3)])
def test_every_loss_equals_that_of_float64_within_the_precision(loss: str, precision: str, within: float) -> None:
    data = ["data.split=0.2", "model.num_classes=10", "model=toy_cnn"]
    if loss not in ("cross_entropy", "nll"):
        data = ["data=line", "data.split=0.4", "model=linear", "model.init=0.3"]
    overrides = [*data, f"loss={loss}", f"precision={precision}", "lr=0", "epochs=1", "limit_batches=2"]
    seen: list[dict[str, Any]] = []

    class Record:
        def on_epoch(self, state: Any, metrics: dict[str, Any]) -> None:  # noqa: ARG002
            seen.append(metrics)

    session = train_session([*overrides, "progress=off"], [Record()])
    assert session.val is not None
    model, loss_fn = (
        copy.deepcopy(session.state.objects.model).double().eval(),
        copy.deepcopy(session.state.objects.loss_fn).double(),
    )
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in session.val.batches(0):
            outputs = model(inputs.double())
            total += loss_fn(outputs, targets.double() if targets.is_floating_point() else targets).item() * len(inputs)
            right += int((outputs.argmax(1) == targets).sum()) if loss in ("cross_entropy", "nll") else 0
            count += len(inputs)
    assert seen[0]["val/loss"] == pytest.approx(total / count, rel=within, abs=within / 10)
    if loss in ("cross_entropy", "nll"):
        assert seen[0]["val/accuracy"] == pytest.approx(right / count, abs=0.04 if precision != "fp32" else 0)


# ------------------------------------------------------------------------------------- refused configs


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("precision=tf32", "write precision=bf16"),
        ("precision=bf61", "did you mean precision=bf16"),
        ("precision=off", "precision=off: must be fp32"),
        ("memory_format=channel_last", "did you mean memory_format=channels_last"),
        ("compile=max_autotune", "did you mean compile=max-autotune"),
        ("compile=fast", "compile=fast: must be"),
    ],
)
def test_the_error_of_a_wrong_value_suggests_a_valid_value(wrong: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build.build_session(compose_settings(small_run(SmallCNN, wrong)))
    assert words in str(caught.value)
    assert "TRACEBACK" not in str(caught.value)


def test_lbfgs_refuses_fp16_and_channels_last() -> None:
    with pytest.raises(ConfigError, match="precision=fp16: LBFGS"):
        build.build_session(compose_settings(small_run(SmallCNN, "optim=lbfgs", "precision=fp16")))
    accelerator = torch.device("cuda")  # on accelerators, gradients have the memory format of the images
    with pytest.raises(ConfigError, match="memory_format=channels_last: LBFGS"):
        choose_memory_format(
            compose_settings(small_run(SmallCNN, "optim=lbfgs", "memory_format=channels_last")), accelerator
        )
    settings = compose_settings(small_run(SmallCNN, "optim=lbfgs"))
    assert choose_memory_format(settings, accelerator) == ("contiguous", None)
    # Further steps would amplify rounding errors.
    short = small_run(SmallCNN, "optim=lbfgs", "optim.max_iter=3", "limit_batches=2")
    assert_close(
        train_session([*short, "memory_format=channels_last"]), train_session([*short, "memory_format=contiguous"])
    )
