"""Tokens are counted if the inputs are token ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import make_loader_of, make_state
from trainkit.training.loop import train_epoch
from trainkit.training.tokens import count_tokens

IDS = torch.zeros((3, 5), dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [
        (IDS, 15),
        (IDS.int(), 15),
        ({"input_ids": IDS}, 15),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0, 0, 0]]).expand(3, 5)}, 6),
        (IDS.float(), 0),
        (IDS.to(torch.uint8), 0),
        (IDS[:, :, None], 0),
        (IDS[:, 0], 0),
        ({"pixels": IDS}, 0),
        ([IDS], 0),
    ],
)
def test_token_ids_are_integers_of_sequences_that_the_mask_keeps(inputs: Any, tokens: int) -> None:
    assert int(count_tokens(inputs)) == tokens


def test_the_speed_in_tokens_is_that_in_samples_times_their_length() -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(10, 2))
    state = make_state(model, nn.CrossEntropyLoss())
    metrics = train_epoch(state, make_loader_of(IDS, torch.tensor([0, 1, 1]), 2), [])
    state.progress.began = 0.0
    assert state.progress.tokens == 15
    assert metrics["tokens_per_second"] == pytest.approx(5 * metrics["samples_per_second"])
    floats = make_state(nn.Linear(5, 2), nn.CrossEntropyLoss())
    assert "tokens_per_second" not in train_epoch(floats, make_loader_of(IDS.float(), torch.tensor([0, 1, 1]), 2), [])
