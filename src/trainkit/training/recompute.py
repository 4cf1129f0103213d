"""Activation checkpointing: activations are not kept, and the backward pass computes them again, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Buffers = dict[nn.Module, dict[str, Tensor | None]]


def recompute_blocks(blocks: Sequence[nn.Module]) -> None:
    """Keep only the inputs of the blocks for the backward pass, which runs the blocks a second time.

    Parameters and buffers keep their names. The numbers stay the same to the bit, because the second pass draws the
    same random numbers, starts from the same buffers, and changes no buffer.
    """
    for block in blocks:
        block.forward = RecomputedForward(block, block.forward)


class RecomputedForward:
    """The forward method of a block whose activations are computed again.

    Args:
        block: the block.
        forward: the original forward method of the block.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.block, self.forward = block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the block."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # compiled code updates each buffer once
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(self._two_passes(), *args, use_reentrant=False, **kwargs)

    def _two_passes(self) -> Callable[..., Any]:
        """Return the forward method for one step. Both of its passes start from the same buffers."""
        before: Buffers = {}

        def run(*args: Any, **kwargs: Any) -> Any:
            if not before:
                before.update(_copy_buffers(self.block))
                return self.forward(*args, **kwargs)
            after = {module: dict(module._buffers) for module in before}
            _set_buffers(_clone(before))
            try:
                return self.forward(*args, **kwargs)
            finally:  # torch ends this pass with an exception once the backward pass has what it needs
                _set_buffers(after)

        return run


def _copy_buffers(block: nn.Module) -> Buffers:
    return _clone({module: module._buffers for module in block.modules()})


def _clone(buffers: Buffers) -> Buffers:
    return {
        module: {name: None if buffer is None else buffer.detach().clone() for name, buffer in named.items()}
        for module, named in buffers.items()
    }


def _set_buffers(buffers: Buffers) -> None:
    for module, named in buffers.items():
        module._buffers.update(named)
