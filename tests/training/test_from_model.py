"""loss=from_model: the loss that a model computes, with the denominator by which the model divides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers import CPU, ItemDataset, MetricsCollector, make_state
from trainkit.core.errors import ConfigError
from trainkit.data.collate import Pad
from trainkit.data.form import SampleForm
from trainkit.data.loaders import Loader, make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.store import Store
from trainkit.losses import FromModel
from trainkit.training.call import install_call
from trainkit.training.evaluation import evaluate
from trainkit.training.loop import fit

WORDS, SAMPLES = 7, 23


class Tagger(nn.Module):
    """A class per token; computes its loss from `labels` as Hugging Face models do."""

    shift = False

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 5, padding_idx=0), nn.Linear(5, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits (N, T, C), and the loss if there are labels."""
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return {"logits": logits}
        used = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return {"loss": functional.cross_entropy(used[0].flatten(0, 1), used[1].flatten()), "logits": logits}


class TaggerForCausalLM(Tagger):
    """Predicts the next token."""

    shift = True


class Classifier(Tagger):
    """A class per sequence."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits (N, C), and the loss."""
        logits = self.head(self.embed(input_ids).sum(1))
        assert labels is not None
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Regressor(Classifier):
    """A number per sequence."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions (N,), and the loss."""
        predictions = self.embed(input_ids).sum((1, 2))
        assert labels is not None
        return {"loss": functional.mse_loss(predictions, labels), "logits": predictions}


def sample(kind: type[Tagger], index: int) -> dict[str, Any]:
    """Return a sample; a third of the labels of tokens are ignored, and all labels of a few samples."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(1, WORDS, (2 + index % 5,), generator=generator)
    if kind is Regressor:
        return {"input_ids": ids, "labels": index / 3}
    if kind is Classifier:
        return {"input_ids": ids, "labels": -100 if index % 4 == 0 else index % WORDS}
    ignored = torch.rand(len(ids), generator=generator) < (1.0 if index < 6 else 0.3)
    return {"input_ids": ids, "labels": torch.where(ignored, -100, ids)}


def loader_of(kind: type[Tagger], batch_size: int, samples: int = SAMPLES) -> Loader:
    """Return a loader of samples padded per batch, in order."""
    form = SampleForm(targets_too=True, collate=Pad(values={"labels": -100}))
    store = Store(ItemDataset(lambda index: sample(kind, index), samples), form=form)
    return make_loader(store, Prepare(CPU), batch_size=batch_size, seed=None)


def built(kind: type[Tagger]) -> tuple[Tagger, FromModel, Any]:
    """Return a float64 model, its bound loss, and a batch of all samples."""
    torch.manual_seed(0)
    model, loss_fn = kind().double(), FromModel()
    loss_fn.bind(model)
    inputs, _ = next(loader_of(kind, SAMPLES).batches(0))
    install_call(model, inputs)
    return model, loss_fn, inputs


KINDS = [Tagger, TaggerForCausalLM, Classifier, Regressor]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 5, SAMPLES])
def test_the_losses_of_an_epoch_and_a_validation_equal_one_pass_over_everything(
    kind: type[Tagger], batch_size: int
) -> None:
    model, loss_fn, inputs = built(kind)
    expected = model(inputs)["loss"].item()
    metrics = evaluate(make_state(model, loss_fn), loader_of(kind, batch_size))
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-9)
    history: list[dict[str, Any]] = []
    fit(make_state(model, loss_fn), loader_of(kind, batch_size), None, [MetricsCollector(history)])
    assert history[0]["train/loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [Tagger, TaggerForCausalLM])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind: type[Tagger], micro_batch: int) -> None:
    model, loss_fn, inputs = built(kind)
    whole = copy.deepcopy(model)
    whole(inputs)["loss"].backward()
    before = [p.detach().clone() for p in model.parameters()]
    state = make_state(model, loss_fn, lr=1.0, micro_batch=micro_batch, monitor="train/loss")
    fit(state, loader_of(kind, SAMPLES))
    for start, param, reference in zip(before, model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(start - param.detach(), reference.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Tagger, TaggerForCausalLM])
def test_the_accuracy_counts_the_targets_that_are_not_ignored(kind: type[Tagger]) -> None:
    model, loss_fn, inputs = built(kind)
    logits, labels = model(inputs)["logits"], inputs["labels"]
    if kind.shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != -100
    expected = (logits.argmax(-1) == labels)[counted].double().mean().item()
    assert evaluate(make_state(model, loss_fn), loader_of(kind, 4))["val/accuracy"] == pytest.approx(expected)


def test_outputs_without_a_loss_are_an_error_with_the_fix() -> None:
    with pytest.raises(ConfigError, match="the model returns a dict with logits, without a 'loss'"):
        FromModel()({"logits": torch.ones(1)}, torch.ones(1))
