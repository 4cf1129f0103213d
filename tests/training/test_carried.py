"""A model with `reset_state()` carries its state from batch to batch, over validations, stops and kills."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Command
from tests.helpers import make_state, train_session
from trainkit.core.errors import ConfigError
from trainkit.models import LSTMLanguageModel
from trainkit.training.carried import match_saved_buffers
from trainkit.training.evaluation import evaluate

LM = ["data=text", "data.file=text.txt", "data.length=8", "model=lstm_lm", "model.hidden=16", "model.embedding=16"]
LM += ["data.sampler=contiguous", "batch_size=6", "progress=off", "epochs=2", "optim.lr=0.1", "lr=0.1"]


@pytest.fixture
def corpus(here: Path) -> Path:
    """A text file in an empty working directory."""
    letters = random.Random(0).choices("abcde \n", k=3000)
    (here / "text.txt").write_text("".join(letters))
    return here


def hand_written_losses(epochs: int) -> tuple[list[float], list[Tensor]]:
    """Return the mean loss of each epoch, and the final weights, of a loop with the LSTM's state in two variables."""
    session = train_session([*LM, "epochs=1", "limit_batches=1"])  # for its data set
    dataset = session.train.dataset
    torch.manual_seed(0)
    model = LSTMLanguageModel(len(dataset.vocabulary), 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    steps = len(dataset) // 6
    for _ in range(epochs):
        state, total = None, 0.0
        for k in range(steps):
            rows = [k + steps * row for row in range(6)]
            inputs, targets = dataset.tensors[0][rows], dataset.tensors[1][rows]
            outputs, (h, c) = model.lstm(model.embedding(inputs), state)
            state = h.detach(), c.detach()
            loss = nn.functional.cross_entropy(model.head(outputs).transpose(1, 2), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
    return losses, [param.detach() for param in model.parameters()]


@pytest.mark.usefixtures("corpus")
@pytest.mark.parametrize("more", [[], ["ema=0.9"]], ids=["plain", "ema"])
def test_a_training_with_carried_state_equals_a_hand_written_loop(more: list[str]) -> None:
    losses, weights = hand_written_losses(2)
    session = train_session([*LM, "+optim.fused=false", "optim.momentum=0", *more])
    best = session.state.progress.best
    assert best is not None
    assert best["train/loss"] == pytest.approx(losses[-1], rel=1e-6)
    for one, other in zip(session.state.model.parameters(), weights, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("corpus")
def test_a_validation_starts_without_state_and_does_not_change_the_state() -> None:
    session = train_session([*LM, "val_batch_size=5"])
    model = session.state.model
    assert model.hidden_state.shape == (1, 6, 16)
    before = model.hidden_state.clone(), model.cell_state.clone()
    assert session.val is not None
    first = evaluate(session.state, session.val)
    assert model.hidden_state.equal(before[0])
    assert model.cell_state.equal(before[1])
    assert evaluate(session.state, session.val) == first


@pytest.mark.usefixtures("corpus")
def test_a_model_with_carried_state_is_not_split() -> None:
    with pytest.raises(ConfigError, match=r"LSTMLanguageModel .*carries state from batch to batch"):
        train_session([*LM, "micro_batch=2"])


def test_the_buffers_of_a_saved_state_may_have_any_batch_size() -> None:
    saved, other = LSTMLanguageModel(5, 4, 4), LSTMLanguageModel(5, 4, 4)
    saved(torch.zeros(3, 2, dtype=torch.int64))
    other(torch.zeros(7, 2, dtype=torch.int64))
    match_saved_buffers(other, saved.state_dict())
    other.load_state_dict(saved.state_dict())
    assert saved.hidden_state is not None
    assert other.hidden_state.equal(saved.hidden_state)
    saved.reset_state()
    match_saved_buffers(other, saved.state_dict())
    other.load_state_dict(saved.state_dict())
    assert other.hidden_state is None


class WithoutBuffer(nn.Linear):
    """A model that keeps its state in an attribute."""

    def reset_state(self) -> None:
        self.state = None


class Volatile(nn.Linear):
    """A model whose state is in a buffer that checkpoints do not hold."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("state", torch.zeros(1), persistent=False)

    def reset_state(self) -> None:
        self.state.zero_()


@pytest.mark.parametrize(
    ("model", "words"), [(WithoutBuffer, "has no buffer for the state"), (Volatile, "'state', which is not persistent")]
)
def test_state_that_a_checkpoint_would_not_hold_is_a_config_error(model: Callable[..., nn.Module], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_state(model(2, 2), nn.MSELoss())


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["ema=0.9"]], ids=["plain", "ema"])
def test_a_killed_run_with_carried_state_resumes_to_the_same_bits(
    more: list[str], corpus: Path, trainkit: Command
) -> None:
    _ = corpus  # the working directory of the command
    done = trainkit("verify-resume", *LM, *more, "checkpoint.every_steps=2", "--kills", "3", "--json")
    assert json.loads(done.stdout)["equal"], done.stderr
