"""Batch norm over the batch of all ranks. Each rank computes on its share, so the ranks exchange their statistics.

So parameters and running statistics equal those of a training in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as FusedFunction

from trainkit.core.ranks import Ranks
from trainkit.training.carried import carrying_modules
from trainkit.training.objects import Objects


def sync_batchnorm(model: nn.Module, ranks: Ranks, *, compiled: bool = False) -> None:
    """Let the batch norm layers of a model use the statistics of the whole batch, in place.

    Only the classes of torch are changed, because a subclass may compute something else. Parameters, buffers, hooks and
    names stay. A copy of a layer normalizes alone.

    Args:
        model: the model.
        ranks: the processes that train together.
        compiled: whether the model will be compiled.
    """
    exchange = StatisticsExchange(ranks, compiled=compiled)
    for module in model.modules():
        if type(module) in SYNCED:
            module.__class__, module.exchange = SYNCED[type(module)], exchange  # type: ignore[assignment]


def is_synced(module: nn.Module) -> bool:
    """Return whether a layer uses the statistics of the whole batch of several ranks."""
    return isinstance(module, Synced) and module.exchange is not None


class StatisticsExchange:
    """The exchange of small tensors between the ranks, in the middle of a forward or backward pass.

    Args:
        ranks: the processes that train together.
        compiled: the model is compiled. The exchange is no part of the compiled graph.
    """

    def __init__(self, ranks: Ranks, *, compiled: bool = False) -> None:
        self.ranks, self.call = ranks, _call
        if compiled:
            self.call = torch.compiler.disable(_call)  # imports the compiler, which takes a second

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()  # a copy of a layer has none: a check may run it on one rank only

    def gather(self, own: Tensor) -> Tensor:
        """Return the tensors of all ranks, in rows.

        Raises:
            RankFailedInPassError: another rank has failed, so it does not compute this layer.
        """
        return self.ranks.gather_in_pass(own)


class Synced(nn.modules.batchnorm._BatchNorm):
    """A batch norm layer that uses the statistics of the whole batch in training."""

    exchange: StatisticsExchange | None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalized inputs, (N, C, ...)."""
        if self.exchange is None or not self.training:
            return super().forward(inputs)
        self._check_input_dim(inputs)
        momentum = self._count_batch()
        return self.exchange.call(_normalize, self, self.exchange, inputs, momentum)

    def _count_batch(self) -> float:
        """Count a batch; return the weight of its statistics."""
        if not self.track_running_stats or self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class BatchNorm1d(Synced, nn.BatchNorm1d):
    """See `Synced`. The name is that of torch, because rules of param groups may select it."""


class BatchNorm2d(Synced, nn.BatchNorm2d):
    """See `BatchNorm1d`."""


class BatchNorm3d(Synced, nn.BatchNorm3d):
    """See `BatchNorm1d`."""


class SyncBatchNorm(Synced, nn.SyncBatchNorm):
    """See `BatchNorm1d`."""


SYNCED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _normalize(layer: Synced, exchange: StatisticsExchange, inputs: Tensor, momentum: float) -> Tensor:
    """Return the normalized inputs of a layer, and update its running statistics."""
    statistics = (layer.running_mean, layer.running_var) if layer.track_running_stats else (None, None)
    if inputs.device.type == "cuda":
        channels_last = inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
        dense = inputs if channels_last else inputs.contiguous()
        arguments = (*statistics, layer.eps, momentum, exchange.ranks.pass_group, exchange.ranks.size)
        output: Tensor = FusedFunction.apply(dense, layer.weight, layer.bias, *arguments)
        return output
    output, mean, var = _Normalize.apply(inputs, layer.weight, layer.bias, layer.eps, exchange)
    for running, of_batch in zip(statistics, (mean, var), strict=True):
        if running is not None:
            running.lerp_(of_batch.to(running.dtype), momentum)
    return output


class _Normalize(torch.autograd.Function):
    """The normalization of a share by the statistics of the whole batch.

    Each rank computes the mean and the sum of squared deviations of its share. The ranks exchange and combine them in
    float64 (T. Chan, G. Golub and R. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979).
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, exchange: StatisticsExchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, and the mean and the unbiased variance of the whole batch, (C,) float64."""
        values = inputs if inputs.dtype == torch.float64 else inputs.float()
        channels, dims = inputs.shape[1], [0, *range(2, inputs.dim())]
        count = values.numel() // channels
        if count:
            var, mean = torch.var_mean(values, dims, correction=0)
        else:
            var = mean = values.new_zeros(channels)
        own = torch.cat([mean.double(), var.double() * count, mean.new_tensor([count], dtype=torch.float64)])
        means, squares, counts = exchange.gather(own).split([channels, channels, 1], dim=1)
        total = counts.sum()
        if total <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {inputs.shape}")
        mean = (counts * means).sum(dim=0) / total
        squared = (squares + counts * (means - mean).square()).sum(dim=0)
        var = squared / total
        ctx.save_for_backward(inputs, weight, mean, torch.rsqrt(var + eps), total)
        ctx.exchange, ctx.dims, unbiased = exchange, dims, squared / (total - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        output = nn.functional.batch_norm(
            inputs, mean.to(values.dtype), var.to(values.dtype), weight, bias, training=False, momentum=0.0, eps=eps
        )
        return output, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Return the gradients of inputs, weight and bias; those of weight and bias are of this rank's share."""
        inputs, weight, mean, inverse, total = ctx.saved_tensors
        values, gradient = (
            tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in (inputs, gradient)
        )
        shape = (1, -1, *[1] * (inputs.dim() - 2))

        def per_channel(tensor: Tensor) -> Tensor:
            return tensor.to(values.dtype).view(shape)

        centered = values - per_channel(mean)
        own = torch.cat([gradient.sum(ctx.dims), (gradient * centered).sum(ctx.dims)]).double()
        of_bias, of_centered = own.chunk(2)
        of_input = None
        if ctx.needs_input_grad[0]:
            total_gradient, total_centered = ctx.exchange.gather(own).sum(dim=0).chunk(2)
            scale = inverse if weight is None else inverse * weight.double()
            of_input = torch.addcmul(
                per_channel(-scale * total_gradient / total),
                centered,
                per_channel(-scale * inverse.square() * total_centered / total),
            )
            of_input = of_input.addcmul_(gradient, per_channel(scale)).to(inputs.dtype)
        if weight is None:
            return of_input, None, None, None, None
        return of_input, (of_centered * inverse).to(weight.dtype), of_bias.to(weight.dtype), None, None


def copy_first_buffers(objects: Objects) -> None:
    """Copy the buffers of rank 0 that may differ between the ranks to the other ranks."""
    modules = [objects.trained] + ([] if objects.ema is None else [objects.ema])
    carrying = [layer for module in modules for layer in carrying_modules(module)] if objects.carrying else []
    objects.ranks.copy_first(buffer for module in modules for buffer in unsynced_buffers(module, carrying))


def unsynced_buffers(modules: nn.Module, carrying: Sequence[nn.Module] = ()) -> list[Tensor]:
    """Return the buffers that may differ between the ranks after a step.

    Args:
        modules: the model and the loss.
        carrying: modules whose buffers belong to the samples of each rank.
    """
    excluded = {id(buffer) for module in carrying for buffer in module.buffers()}
    excluded |= {
        id(buffer) for module in modules.modules() if isinstance(module, Synced) for buffer in module.buffers()
    }
    return [buffer for buffer in modules.buffers() if id(buffer) not in excluded]
