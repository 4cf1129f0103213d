"""Memory formats and fused optimizers: neither changes the results of a model, a loss or an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Command
from tests.helpers import PLAIN_SGD, SmallCNN, assert_close, compose_settings, read_history, small_run, train_session
from trainkit.build import session as build
from trainkit.core.rng import rng_state
from trainkit.runs.snapshot import capture_state, digest, restore_state
from trainkit.training.loop import fit

HERE = "tests.build.test_memory_format"
VIEWING_OPTIM = [f"optim._target_={HERE}.Rowwise", "lr=0.01"]


class Views(SmallCNN):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        logits: Tensor = self.head(maps.view(len(maps), -1))
        return logits


class ViewsInTraining(SmallCNN):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        logits: Tensor = self.head(maps.view(len(maps), -1) if self.training else maps.flatten(1))
        return logits


class ViewsInValidation(SmallCNN):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        logits: Tensor = self.head(maps.flatten(1) if self.training else maps.view(len(maps), -1))
        return logits


class Flattens(torch.autograd.Function):
    """Assumes a contiguous gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:  # noqa: ARG004
        return maps.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.view(-1).mul(1).view(gradient.shape)


class ViewsBackward(SmallCNN):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv2d(3, 3, 3, padding=1)
        self.before = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        flattened: Tensor = Flattens.apply(self.before(images))
        return super().forward(self.after(flattened))


class Asserts(SmallCNN):
    def forward(self, images: Tensor) -> Tensor:
        assert images.is_contiguous(), "images must be contiguous"
        return super().forward(images)


class Solid(SmallCNN):
    def __init__(self) -> None:
        super().__init__()
        self.solid = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.solid(images[:, None])[:, 0])


class Counts(SmallCNN):
    """A model with state that a forward pass changes: buffers, batch norm and the RNG."""

    calls: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        self.norm(self.conv(images))
        return super().forward(images) + torch.rand(())


class Late(nn.Module):
    """A model in which a layer has no gradient in the first steps, as with stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.steps = nn.Linear(3072, 10), nn.Linear(3072, 10), 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        x = images.flatten(1)
        logits: Tensor = self.first(x) + (self.second(x) if self.steps > 2 else 0)
        return logits


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3072, 10, dtype=torch.complex64) * 0.01)

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1).to(torch.complex64) @ self.weight).real


class Rows(nn.Module):
    """A model with a sparse gradient, but without a sparse layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 10))

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.flatten(1)[:, ::64] * 255).long()
        return nn.functional.embedding(pixels, self.weight, sparse=True).mean(1)


class Projects(SmallCNN):
    """A model with a hook that replaces a gradient by a contiguous tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body.weight.register_post_accumulate_grad_hook(self.project)

    @staticmethod
    def project(param: Tensor) -> None:
        assert param.grad is not None
        param.grad = 0.5 * param.grad.contiguous()


class Flat(nn.Module):
    """A loss that assumes contiguous inputs, as many losses for segmentation do."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        return outputs.view(-1).square().mean()


class Maps(SmallCNN):
    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images)


class Rowwise(torch.optim.Optimizer):
    """An optimizer that assumes contiguous gradients, as Muon does for convolutions."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for param in self.param_groups[0]["params"]:
            rows = param.grad.view(len(param), -1)
            param.sub_((rows / (1 + rows.norm(dim=1, keepdim=True))).view(param.shape), alpha=0.01)


# -------------------------------------------------------------------------------------- memory formats


@pytest.mark.parametrize(
    "overrides",
    [
        small_run(Views),
        small_run(ViewsInTraining),
        small_run(ViewsInValidation, "data.split=0.9"),
        small_run(ViewsBackward),
        small_run(Asserts),
        small_run(Solid),
        small_run(Maps, "loss=identity", f"loss._target_={HERE}.Flat"),
        small_run(SmallCNN, "optim=sgd", *VIEWING_OPTIM, "~optim.weight_decay"),
    ],
    ids=[
        "views",
        "in training",
        "in validation",
        "backward",
        "asserts",
        "three dimensions",
        "a loss that views",
        "an optimizer that views",
    ],
)
def test_auto_becomes_contiguous_if_a_part_needs_it(overrides: list[str]) -> None:
    assert_close(train_session(overrides), train_session([*overrides, "memory_format=contiguous"]))


class Heavy(SmallCNN):
    """Its convolutions have 48 * 96 + 9 * 96**2 = 87,552 weights, and each outputs 6,144 values for a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 96, 4, stride=4), nn.Conv2d(96, 96, 3, padding=1)  # (N, 96, 8, 8) each
        self.head = nn.Linear(96 * 8 * 8, 10)


@pytest.mark.parametrize(
    ("more", "layout"),
    [
        (["batch_size=4"], "contiguous"),  # 4 * 2 * 6,144 values are less than 0.6 * 87,552
        (["batch_size=5"], "channels_last"),
        (["batch_size=32", "micro_batch=4"], "contiguous"),
        (["batch_size=4", "memory_format=channels_last"], "channels_last"),
    ],
)
def test_auto_becomes_contiguous_on_the_cpu_if_weights_outnumber_the_outputs(more: list[str], layout: str) -> None:
    session = build.build_session(compose_settings(small_run(Heavy, *more)))
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert session.train.prepare.memory_format is expected
    note = next(note for note in session.notes if note.startswith("images "))
    assert note == (
        "images in channels_last, for 2 convolutions"
        if layout == "channels_last"
        else "images contiguous: 4 samples are few for 87,552 weights of convolutions"
    )


class Strided(SmallCNN):
    """Its first layer is a strided 1x1 convolution of the three colours."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 16, 1, stride=4)
        self.head = nn.Linear(16 * 8 * 8, 10)


@pytest.mark.parametrize(("channels", "layout"), [(7, "contiguous"), (8, "channels_last")])
def test_auto_is_contiguous_if_channels_last_may_crash_torch(channels: int, layout: str) -> None:
    session = build.build_session(compose_settings(small_run(Strided, f"+model.channels={channels}")))
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert session.train.prepare.memory_format is expected
    assert any("strided 1x1 convolution" in note for note in session.notes) == (layout == "contiguous")


def test_testing_a_memory_format_has_no_side_effects() -> None:
    models, draws = [], []
    for layout in ("auto", "contiguous"):
        models.append(build.build_session(compose_settings(small_run(Counts, f"memory_format={layout}"))).state.model)
        draws.append(digest(rng_state()))
    assert draws[0] == draws[1]
    assert models[0].conv.weight.stride() == models[1].conv.weight.stride()
    for (name, ours), theirs in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("optim", ["sgd", "adamw", "adagrad"])
@pytest.mark.parametrize(("there", "here_"), [("contiguous", "channels_last"), ("channels_last", "contiguous")])
@pytest.mark.parametrize("more", [[], ["ema=0.9"]], ids=["", "ema"])
def test_a_run_resumes_equally_in_another_memory_format(optim: str, there: str, here_: str, more: list[str]) -> None:
    overrides = [*small_run(SmallCNN, f"optim={optim}", *more), *["optim.momentum=0.9"] * (optim == "sgd"), "epochs=2"]

    class Stop(Exception):  # noqa: N818
        pass

    class Once:
        def on_epoch_end(self, state: Any, metrics: Any) -> None:  # noqa: ARG002
            raise Stop

    begun, other = (
        build.build_session(compose_settings([*overrides, f"memory_format={name}"])) for name in (there, here_)
    )
    with pytest.raises(Stop):
        fit(begun.state, begun.train, begun.val, [Once()])
    restore_state(other.state, capture_state(begun.state, {}))
    fit(other.state, other.train, other.val)
    assert_close(other, train_session([*overrides, f"memory_format={there}"]), rtol=1e-4, atol=1e-5)


def test_the_memory_format_may_change_on_resume_but_the_precision_may_not(forked: Command, tmp_path: Path) -> None:
    run = ["hydra.run.dir=run", "epochs=1", "limit_batches=3", "optim.momentum=0.9", "progress=off"]
    done = forked(*run, "memory_format=contiguous")
    assert done.returncode == 0, done.stderr
    done = forked("resume", "run", "epochs=2", "memory_format=channels_last")
    assert done.returncode == 0, done.stderr
    assert len(read_history(tmp_path / "run")) == 2
    done = forked("resume", "run", "epochs=3", "precision=bf16")
    assert done.returncode != 0
    assert "resume.allow=[precision]" in done.stderr


# --------------------------------------------------------------------------------------------- fused


@pytest.mark.parametrize("model", [SmallCNN, Late, Complex, Rows, Projects])
@pytest.mark.parametrize("layout", ["auto", "contiguous"])
def test_fused_steps_equal_plain_steps_for_every_model(model: type[nn.Module], layout: str) -> None:
    overrides = small_run(model, f"memory_format={layout}")
    assert_close(
        train_session([*overrides, "optim=sgd", "optim.momentum=0.9"]), train_session([*overrides, *PLAIN_SGD])
    )


@pytest.mark.parametrize("rule", [[], ["+param_groups.a={name: '.*weight', dampening: 0.5, fused: true}"]], ids=str)
def test_dampening_is_equal_with_and_without_fused_steps(rule: list[str]) -> None:
    overrides = ["model=mlp", "limit_batches=4", "epochs=1", "optim.momentum=0.9"]
    overrides += rule or ["optim.dampening=0.9", "+optim.fused=true"]
    plain = [text.replace("fused: true", "fused: false").replace("fused=true", "fused=false") for text in overrides]
    assert_close(train_session(overrides), train_session(plain))
