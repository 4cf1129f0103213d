"""Sum gradients over the ranks, in messages of many gradients."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from trainkit.core.ranks import Ranks

BUCKET_BYTES = 25 * 2**20  # of gradients in a message: large messages use the network well
NO_GRADIENT, DENSE, SPARSE = 0, 1, 2


def kinds_of_gradients(params: Sequence[Tensor]) -> bytes:
    """Return the kind of the gradient of each parameter."""
    return bytes(map(_kind_of_gradient, params))


def _kind_of_gradient(param: Tensor) -> int:
    if param.grad is None:
        return NO_GRADIENT
    return DENSE if param.grad.layout == torch.strided else SPARSE


def sum_gradients(params: Sequence[Tensor], kinds: Sequence[bytes], ranks: Ranks) -> None:
    """Sum gradients over the ranks, in place.

    Args:
        params: the parameters, in the same order on every rank.
        kinds: the kind of each parameter's gradient, for each rank, or once if the kinds are equal on all ranks.
        ranks: the ranks.
    """
    found = [max(own[index] for own in kinds) for index in range(len(params))]
    for param, kind in zip(params, found, strict=True):
        if kind == SPARSE:
            gradients = [gradient for gradient in ranks.gather(param.grad) if gradient is not None]
            param.grad = functools.reduce(operator.add, gradients).to(param.device)
        elif kind == DENSE and param.grad is None:  # only other ranks have used the parameter
            param.grad = torch.zeros_like(param)
    dense = [_real(param.grad) for param, kind in zip(params, found, strict=True) if kind == DENSE]
    buckets = [(bucket, torch.cat([gradient.reshape(-1) for gradient in bucket])) for bucket in _buckets(dense)]
    with ranks.exchange():
        for work in [dist.all_reduce(flat, async_op=True) for _, flat in buckets]:
            work.wait()
    for bucket, flat in buckets:
        for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(total.view(gradient.shape))


def _real(gradient: Tensor | None) -> Tensor:
    """Return a view of a gradient as real numbers."""
    assert gradient is not None
    return torch.view_as_real(gradient.detach()) if gradient.is_complex() else gradient.detach()


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the gradients in lists of one dtype and device, each with at most `BUCKET_BYTES` or one gradient."""
    buckets: list[list[Tensor]] = []
    sizes: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}  # the open bucket and its size
    for gradient in gradients:
        key = gradient.dtype, gradient.device
        bucket, size = sizes.get(key, ([], 0))
        if not bucket or size + gradient.nbytes > BUCKET_BYTES:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(gradient)
        sizes[key] = bucket, size + gradient.nbytes
    return buckets
