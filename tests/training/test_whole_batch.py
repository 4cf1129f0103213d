"""Batches that may not be split: found before the first split, with no false alarm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers import make_loader_of, make_state
from trainkit.core.errors import ConfigError, OutOfMemoryError
from trainkit.core.rng import rng_state
from trainkit.runs.snapshot import digest
from trainkit.training.loop import fit
from trainkit.training.split_comparison import Finding, compare_loss_and_model
from trainkit.training.state import State
from trainkit.training.whole_batch import check_may_split

SAMPLES, SIZE, OUTPUTS = 24, 7, 6


def floats(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape)


def classes(*shape: int) -> Tensor:
    return torch.randint(0, OUTPUTS, (SAMPLES, *shape))


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, (SAMPLES, *shape)).float() * 2 - 1


class OfPair(nn.Module):
    """A loss of torch that compares the two halves of each sample's output."""

    def __init__(self, loss: nn.Module, *, with_targets: bool = True) -> None:
        super().__init__()
        self.loss, self.with_targets = loss, with_targets

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        first, second = outputs.chunk(2, dim=1)
        value: Tensor = self.loss(first, second, *([targets] if self.with_targets else []))
        return value


class Triplet(nn.Module):
    """A triplet loss of torch over the three parts of each sample's output."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        value: Tensor = self.loss(*outputs.chunk(3, dim=1))
        return value


class CTC(nn.Module):
    """CTC over outputs of one time step per column."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        steps = outputs.view(len(outputs), 2, 3).transpose(0, 1).log_softmax(2)
        lengths = torch.full((len(outputs),), 2)
        return functional.ctc_loss(steps, targets.clamp(1, 2)[:, None], lengths, torch.ones_like(lengths))


class Log(nn.Module):
    """A loss of torch over log-probabilities."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = self.loss(outputs.log_softmax(1), targets)
        return value


WEIGHTS = torch.tensor([0.1, 3.0, 1.0, 0.5, 7.0, 1.0])
IGNORED = torch.tensor([-100, 2, 3, -100] * 6)
LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "L1": (nn.L1Loss, lambda: floats(OUTPUTS)),
    "MSE": (nn.MSELoss, lambda: floats(OUTPUTS)),
    "MSE sum": (lambda: nn.MSELoss(reduction="sum"), lambda: floats(OUTPUTS)),
    "SmoothL1": (nn.SmoothL1Loss, lambda: floats(OUTPUTS)),
    "Huber": (lambda: nn.HuberLoss(delta=0.3), lambda: floats(OUTPUTS)),
    "CrossEntropy": (nn.CrossEntropyLoss, classes),
    "CrossEntropy weights": (lambda: nn.CrossEntropyLoss(WEIGHTS), classes),
    "CrossEntropy ignore": (nn.CrossEntropyLoss, lambda: IGNORED),
    "CrossEntropy both": (lambda: nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), lambda: IGNORED),
    "CrossEntropy sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), classes),
    "CrossEntropy probabilities": (nn.CrossEntropyLoss, lambda: floats(OUTPUTS).softmax(1)),
    "NLL": (lambda: nn.NLLLoss(WEIGHTS), classes),
    "BCEWithLogits": (lambda: nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), lambda: floats(OUTPUTS).sigmoid()),
    "PoissonNLL": (nn.PoissonNLLLoss, lambda: floats(OUTPUTS).exp()),
    "KLDiv mean": (lambda: Log(nn.KLDivLoss(reduction="mean")), lambda: floats(OUTPUTS).softmax(1)),
    "KLDiv batchmean": (lambda: Log(nn.KLDivLoss(reduction="batchmean")), lambda: floats(OUTPUTS).softmax(1)),
    "MultiLabelSoftMargin": (nn.MultiLabelSoftMarginLoss, lambda: signs(OUTPUTS).clamp(0)),
    "MultiLabelMargin": (nn.MultiLabelMarginLoss, lambda: classes(OUTPUTS)),
    "MultiMargin": (nn.MultiMarginLoss, classes),
    "MultiMargin weights": (lambda: nn.MultiMarginLoss(weight=WEIGHTS), classes),
    "SoftMargin": (nn.SoftMarginLoss, lambda: signs(OUTPUTS)),
    "HingeEmbedding": (nn.HingeEmbeddingLoss, lambda: signs(OUTPUTS)),
    "MarginRanking": (lambda: OfPair(nn.MarginRankingLoss()), lambda: signs(3)),
    "CosineEmbedding": (lambda: OfPair(nn.CosineEmbeddingLoss()), signs),
    "GaussianNLL": (lambda: Gaussian(), lambda: floats(3)),
    "TripletMargin": (lambda: Triplet(nn.TripletMarginLoss()), signs),
    "TripletMarginWithDistance": (lambda: Triplet(nn.TripletMarginWithDistanceLoss()), signs),
    "CTC": (CTC, classes),
    "BCE": (lambda: Sigmoid(nn.BCELoss()), lambda: floats(OUTPUTS).sigmoid()),
    "PairwiseDistance": (lambda: Distance(), signs),
    "CosineSimilarity": (lambda: OfPair(Similar(), with_targets=False), signs),
    "AdaptiveLogSoftmax": (lambda: Adaptive(), classes),
}


class Gaussian(nn.Module):
    """The negative log-likelihood of a normal distribution, whose mean and variance are the outputs."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, variance = outputs.chunk(2, dim=1)
        return functional.gaussian_nll_loss(mean, targets, variance.exp())


class Sigmoid(nn.Module):
    """A loss of torch over probabilities."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = self.loss(outputs.sigmoid(), targets)
        return value


class Distance(nn.Module):
    """The mean distance between the halves of an output."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        one, other = outputs.chunk(2, dim=1)
        return functional.pairwise_distance(one, other).mean()


class Similar(nn.Module):
    """One minus the mean cosine similarity."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(one, other).mean()


class Adaptive(nn.Module):
    """torch's adaptive softmax, which holds parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(OUTPUTS, OUTPUTS, cutoffs=[3])

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = self.softmax(outputs, targets).loss
        return value


class Recurrent(nn.Module):
    """A GRU with dropout between its layers."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, 10, num_layers=2, dropout=0.5, batch_first=True)  # type: ignore[call-arg,arg-type]
        self.head = nn.Linear(10, OUTPUTS)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.rnn(inputs.view(len(inputs), 4, 8))[0][:, -1])
        return outputs


class Attention(nn.Module):
    """A transformer encoder with a padding mask, dropout and layer norm."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, OUTPUTS)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.view(len(inputs), 4, 8)
        padding = (tokens[:, :, 0] > 0) & (torch.arange(4) > 0)
        outputs: Tensor = self.head(self.encoder(tokens, src_key_padding_mask=padding)[:, 0])
        return outputs


class FunctionalDropout(nn.Module):
    """Dropout as a function, which depends on the mode of a custom module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, OUTPUTS)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(functional.dropout(inputs, 0.5, training=self.training))
        return outputs


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(32, OUTPUTS),
    "batch norm": lambda: nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, OUTPUTS)),
    "batch norm of maps": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, OUTPUTS)
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.GELU(), nn.Linear(64, OUTPUTS)),
    "functional dropout": FunctionalDropout,
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, OUTPUTS)),
    "group norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.Flatten(), nn.Linear(32, OUTPUTS)
    ),
    "rnn": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "attention": Attention,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(32, OUTPUTS)),
    "batch norm without statistics": lambda: nn.Sequential(
        nn.BatchNorm1d(32, track_running_stats=False), nn.Linear(32, OUTPUTS)
    ),
}


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("model", MODELS)
def test_losses_over_samples_may_be_split_with_any_model(model: str) -> None:
    """The linear model has each loss. Any other model has every fifth, from a place of its own on."""
    place = list(MODELS).index(model)
    losses = list(LOSSES)[place % 5 :: 5] if place else list(LOSSES)
    findings = {}
    for number, loss in enumerate(losses):
        make, targets = LOSSES[loss]
        torch.manual_seed(number)
        state = make_state(MODELS[model](), make())
        findings[loss] = compare_loss_and_model(state.objects.model, state.objects.loss_fn, floats(32), targets(), SIZE)
    assert findings == dict.fromkeys(losses, Finding())


# -------------------------------------------------------------------- losses between samples


class NTXent(nn.Module):
    """The contrastive loss of SimCLR over two views, (N, 2, D)."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        views = functional.normalize(outputs.view(len(outputs), 2, 3), dim=2).transpose(0, 1).flatten(0, 1)
        similar = views @ views.T / 0.5
        similar.fill_diagonal_(-1e9)
        count = len(outputs)
        return functional.cross_entropy(similar, (torch.arange(2 * count) + count) % (2 * count))


class HardTriplets(nn.Module):
    """Batch-hard triplet mining: the farthest positive and the nearest negative in the batch."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        distances = torch.cdist(outputs, outputs)
        same = targets[:, None] == targets[None]
        positive = distances.masked_fill(~same, 0).amax(1)
        negative = distances.masked_fill(same, 1e6).amin(1).clamp(max=10)
        return (positive - negative + 1).relu().mean()


class BarlowTwins(nn.Module):
    """The cross-correlation of two views over the batch."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        one, other = ((view - view.mean(0)) / (view.std(0, unbiased=False) + 1e-5) for view in outputs.chunk(2, dim=1))
        correlation = one.T @ other / len(outputs)
        return (correlation - torch.eye(3)).square().sum()


class ByMaximum(nn.Module):
    """Errors divided by the largest error of the batch."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        errors = (outputs - targets[:, None]).abs()
        return (errors / errors.max().detach()).mean()


class MaskedMean(nn.Module):
    """A mean over targets that are not negative, without a `denominator`."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        errors = functional.cross_entropy(outputs, targets.clamp(0), reduction="none")
        return (errors * (targets >= 3)).sum() / (targets >= 3).sum()


class Sum(nn.Module):
    """A sum over the batch that does not say so."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="sum")


class LossInTheModel(nn.Module):
    """A model that returns a contrastive loss while it trains, and embeddings otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MODELS["dropout"]()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.body(inputs)
        loss: Tensor = NTXent()(outputs, inputs)
        return loss if self.training else outputs


class MeanOf(nn.Module):
    """A loss of a model that returns its own loss."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        return outputs.mean()


class Centered(nn.Module):
    """A model whose outputs are relative to the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, OUTPUTS)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        return outputs - outputs.mean(0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "SimCLR": (MODELS["batch norm"], NTXent),
    "triplet mining": (MODELS["dropout"], HardTriplets),
    "Barlow Twins": (MODELS["batch norm"], BarlowTwins),
    "a maximum over the batch": (MODELS["rnn"], ByMaximum),
    "a mean over an undeclared number": (MODELS["linear"], MaskedMean),
    "an undeclared sum": (MODELS["linear"], Sum),
    "a contrastive loss in the model": (LossInTheModel, MeanOf),
    "a model that centers its batch": (Centered, nn.CrossEntropyLoss),
}


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return floats(32), classes()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("size", [2, 8, 16])
def test_a_loss_between_samples_is_refused_before_the_first_step(name: str, size: int) -> None:
    inputs, targets = batch()
    make_model, make_loss = REFUSED[name]
    state = make_state(make_model(), make_loss(), lr=0.1, micro_batch=size)
    before = copy.deepcopy(state.objects.model.state_dict())
    with pytest.raises(ConfigError, match=rf"micro_batch={size}: .*the loss of") as raised:
        fit(state, make_loader_of(inputs, targets, SAMPLES))
    assert "micro_batch=off" in str(raised.value)
    assert digest(before) == digest(state.objects.model.state_dict())


@pytest.mark.parametrize("name", REFUSED)
def test_memory_that_runs_out_does_not_split_a_loss_between_samples(name: str) -> None:
    inputs, targets = batch()
    make_model, make_loss = REFUSED[name]

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def forward(self, inputs: Tensor) -> Tensor:
            if torch.is_grad_enabled() and len(inputs) > SAMPLES // 2:
                raise torch.OutOfMemoryError("out of memory")
            outputs: Tensor = self.model(inputs)
            return outputs

    state = make_state(Fails(), make_loss(), on_oom="split")
    with pytest.raises(OutOfMemoryError, match="may not be split") as raised:
        fit(state, make_loader_of(inputs, targets, SAMPLES))
    assert "lower batch_size" in str(raised.value)


@pytest.mark.parametrize("part", ["loss", "model", "a part of the model"])
def test_a_declared_whole_batch_is_never_split(part: str) -> None:
    inputs, targets = batch()
    model, loss_fn = MODELS["linear"](), nn.CrossEntropyLoss()
    model = nn.Sequential(model, nn.Identity()) if part == "a part of the model" else model
    declaring: Any = {"loss": loss_fn, "model": model}.get(part) or model[1]
    declaring.whole_batch = True
    with pytest.raises(ConfigError, match=r"micro_batch=8: .* has whole_batch = True"):
        fit(make_state(model, loss_fn, micro_batch=8), make_loader_of(inputs, targets, SAMPLES))
    assert make_state(model, loss_fn, on_oom="split").settings.on_oom == "stop"
    assert make_state(model, loss_fn, on_oom="auto").settings.on_oom == "stop"
    fit(make_state(model, loss_fn, micro_batch=SAMPLES), make_loader_of(inputs, targets, SAMPLES))


@pytest.mark.parametrize("declares", ["loss", "model"])
def test_a_loss_or_a_model_that_declares_it_may_be_split_is_not_compared(declares: str) -> None:
    inputs, targets = batch()
    loss_fn, model = Sum(), MODELS["linear"]()
    {"loss": loss_fn, "model": model}[declares].whole_batch = False  # type: ignore[assignment]
    fit(make_state(model, loss_fn, micro_batch=8), make_loader_of(inputs, targets, SAMPLES))


@pytest.mark.parametrize("model", MODELS)
def test_the_comparison_changes_no_state(model: str) -> None:
    class Counts(nn.Module):
        """A loss with every kind of state: a buffer, an attribute, and random numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))
            self.calls = 0

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            self.mean += outputs.detach().mean()
            return functional.cross_entropy(outputs, targets) + 0 * torch.rand(())

    inputs, targets = batch()
    state = make_state(MODELS[model](), Counts(), micro_batch=SIZE)
    state.objects.model.train()
    before = digest({"state": state.objects.state_dict(), "rng": rng_state()})
    modes = [module.training for module in state.objects.model.modules()]
    check_may_split(state, inputs, targets, [])
    assert state.progress.split_checked
    assert digest({"state": state.objects.state_dict(), "rng": rng_state()}) == before
    assert [module.training for module in state.objects.model.modules()] == modes
    assert state.objects.loss_fn.calls == 0
    assert all(param.grad is None for param in state.objects.model.parameters())


def test_the_comparison_runs_once_and_only_if_a_batch_is_split() -> None:
    class Counts(nn.Module):
        sizes: list[int] = []  # noqa: RUF012  # of all copies of the model

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, OUTPUTS)

        def forward(self, inputs: Tensor) -> Tensor:
            self.sizes.append(len(inputs))
            outputs: Tensor = self.linear(inputs)
            return outputs

    inputs, targets = batch()
    for micro_batch, calls in ((None, 6), (12, 6), (6, 2 * 6)):
        model = Counts()
        Counts.sizes = []
        state = make_state(model, nn.CrossEntropyLoss(), epochs=3, micro_batch=micro_batch)
        state.objects.loss_fn.register_forward_hook(lambda *_: None)
        fit(state, make_loader_of(inputs, targets, 12))
        assert max(model.sizes) <= (micro_batch or 12)  # also while it compares
        extra = len(model.sizes) - calls
        assert (extra > 0) == (micro_batch == 6)


class Notes:
    """A hook that collects notes."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_note(self, state: State, text: str) -> None:  # noqa: ARG002
        self.seen.append(text)


def test_a_comparison_that_is_impossible_is_reported_and_the_training_continues() -> None:
    class Random(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs + torch.randn_like(outputs), targets)

    inputs, targets = batch()
    state, notes = make_state(MODELS["linear"](), Random(), micro_batch=8), Notes()
    fit(state, make_loader_of(inputs, targets, SAMPLES), hooks=[notes])
    assert len(notes.seen) == 1
    assert "Random" in notes.seen[0]
    assert "draws random numbers" in notes.seen[0]
    assert "whole_batch = True" in notes.seen[0]


class Stateful(nn.Module):
    """A model with state in every place: a parameter, buffers, a list, an attribute and a private generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, OUTPUTS)
        self.slow = nn.Parameter(torch.zeros(OUTPUTS), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[float] = []
        self.last = torch.zeros(())
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        with torch.no_grad():
            self.slow.mul_(0.9).add_(outputs.mean(0))
            self.count.add_(1)
            self.seen.append(float(outputs.mean()))
            self.last = outputs.mean().detach()
            torch.rand((), generator=self.generator)
        inputs.mul_(0)  # in place
        return outputs


def test_the_comparison_changes_nothing_of_a_model_that_changes_itself() -> None:
    inputs, targets = batch()
    state = make_state(Stateful(), nn.CrossEntropyLoss(), micro_batch=SIZE)
    model: Any = state.objects.model
    before, unchanged = digest({"state": model.state_dict(), "rng": model.generator.get_state()}), inputs.clone()
    check_may_split(state, inputs, targets, [])
    assert state.progress.split_checked
    assert digest({"state": model.state_dict(), "rng": model.generator.get_state()}) == before
    assert model.seen == []
    assert float(model.last) == 0
    torch.testing.assert_close(inputs, unchanged, rtol=0, atol=0)


def test_a_comparison_without_enough_memory_is_repeated_for_a_smaller_micro_batch() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODELS["linear"]()

        def forward(self, inputs: Tensor) -> Tensor:
            if len(inputs) > 6:
                raise torch.OutOfMemoryError("out of memory")
            outputs: Tensor = self.model(inputs)
            return outputs

    inputs, targets = batch()
    state, notes = make_state(Small(), NTXent(), on_oom="split"), Notes()
    with pytest.raises(OutOfMemoryError, match="may not be split"):
        fit(state, make_loader_of(inputs, targets, SAMPLES), hooks=[notes])
    assert state.progress.micro_batch == 6
    assert all("memory ran out" in note for note in notes.seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_low_precision_are_no_difference(dtype: torch.dtype) -> None:
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODELS["linear"]()

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.model(inputs).to(dtype)
            return outputs

    class Squares(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs - targets.to(outputs.dtype)).square().mean()

    inputs, _ = batch()
    assert compare_loss_and_model(Low(), Squares(), inputs, floats(OUTPUTS), 8) == Finding()


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-8])
def test_a_tiny_loss_is_no_difference(scale: float) -> None:
    inputs, _ = batch()
    model = MODELS["linear"]()
    targets = model(inputs).detach() * (1 + scale * torch.randn(SAMPLES, OUTPUTS))
    for size in range(2, SAMPLES):
        assert compare_loss_and_model(model, nn.MSELoss(), inputs, targets, size) == Finding()


@pytest.mark.parametrize("steps", [8, 16, 24, 7])
def test_outputs_with_the_time_first_are_not_joined_along_the_time(steps: int) -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, steps * 3)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.linear(inputs).view(len(inputs), steps, 3).transpose(0, 1)
            return outputs

    class OfLastDimension(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs.flatten(0, 1), targets.T.flatten())

    inputs, _ = batch()
    targets = torch.randint(0, 3, (SAMPLES, steps))
    assert compare_loss_and_model(TimeFirst(), OfLastDimension(), inputs, targets, 8) == Finding()


def test_batch_norm_and_dropout_in_a_loss_are_no_difference() -> None:
    class Perceptual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(OUTPUTS, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            difference: Tensor = self.features(outputs) - self.features(targets)
            return difference.square().mean()

    inputs, _ = batch()
    assert compare_loss_and_model(MODELS["linear"](), Perceptual(), inputs, floats(OUTPUTS), 8) == Finding()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_with_batch_norm_is_no_difference() -> None:
    inputs, targets = batch()
    model = torch.jit.script(nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Linear(8, OUTPUTS)))
    before = digest(model.state_dict())
    assert compare_loss_and_model(model, nn.CrossEntropyLoss(), inputs, targets, 8) == Finding()
    assert digest(model.state_dict()) == before


def test_a_model_whose_hooks_hold_itself_is_not_compared_and_not_changed() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.kept = nn.Linear(32, OUTPUTS), []  # type: ignore[var-annotated]
            self.linear.register_forward_hook(lambda *call: self.kept.append(call[2]))

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.linear(inputs)
            kept: Tensor = self.kept.pop()
            assert not self.kept
            return outputs + kept

    inputs, targets = batch()
    state, notes = make_state(Hooked(), nn.CrossEntropyLoss(), micro_batch=8), Notes()
    fit(state, make_loader_of(inputs, targets, SAMPLES), hooks=[notes])
    assert "a forward hook of Linear holds objects" in notes.seen[0]
