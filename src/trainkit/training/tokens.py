"""The number of tokens in a batch, for models of language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def count_tokens(inputs: Any) -> Tensor | int:
    """Return the number of token ids in the inputs of a batch; 0 if the inputs are not token ids.

    Token ids are an int64 or int32 tensor (N, T), or `input_ids` in a mapping. Tokens that the mapping's
    `attention_mask` hides do not count; their number is a scalar tensor on the device, which is not synchronized.
    """
    mask = None
    if isinstance(inputs, Mapping):
        inputs, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(inputs, Tensor) or inputs.dtype not in (torch.int64, torch.int32) or inputs.dim() != 2:
        return 0
    if isinstance(mask, Tensor) and mask.shape == inputs.shape:
        return (mask != 0).sum()
    return inputs.numel()
