"""Sharded trainings: each rank holds a part of every parameter of the model, by FSDP2 of torch.

The ranks gather the parameters of a block for each forward and backward pass of the block. So all ranks must make
the same number of passes: a rank with fewer micro batches makes passes over a sample that does not count.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.core.pytree import batch_size_of, take_samples
from trainkit.core.rng import preserve_rng
from trainkit.core.shards import is_sharded, local_part, shard_as
from trainkit.data.prepare import Batch
from trainkit.optim.layers import model_blocks
from trainkit.training.objects import Objects
from trainkit.training.state import Phase, State

Renewed = dict[Tensor, nn.Parameter]  # a parameter -> the sharded parameter that replaces it
FUSED = (torch.optim.Adam, torch.optim.AdamW)  # the optimizers whose fused kernels support shards


# --------------------------------------------------------------------------------------------- shard


def shard_objects(objects: Objects) -> Renewed:
    """Divide the parameters of the model and of its moving average among the ranks.

    The parameters of the loss stay whole on each rank.

    Returns:
        The sharded parameter that replaces each parameter of the model.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(objects.device.type, (objects.ranks.size,))
    renewed = shard_model(objects.model, mesh)
    for optimizer in objects.optimizers.values():
        renew_optimizer(optimizer, renewed)
    objects.watch = {name: renewed.get(param, param) for name, param in objects.watch.items()}
    objects.joining = {n: [renewed.get(param, param) for param in params] for n, params in objects.joining.items()}
    if objects.ema is not None:
        shard_model(objects.ema.module["model"], mesh, is_average=True)  # type: ignore[index]
        average = objects.ema.multi_avg_fn

        def average_shards(averages: Any, params: Any, count: Any) -> None:
            assert average is not None
            average([*map(local_part, averages)], [*map(local_part, params)], count)

        objects.ema.multi_avg_fn = average_shards
    objects.sharded = True
    return renewed


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters are gathered together: the blocks of the model, then the model."""
    return [*model_blocks(model), model]


def shard_model(model: nn.Module, mesh: Any, *, is_average: bool = False) -> Renewed:
    """Divide the parameters of a model among the ranks; return the new parameters.

    Scalar parameters stay whole on each rank.

    Args:
        model: the model, whose weights are equal on all ranks.
        mesh: the ranks, as a `DeviceMesh` of one dimension.
        is_average: whether the parameters change without a backward pass, so none of them may stay gathered.
    """
    from torch.distributed.fsdp import fully_shard

    before = dict(model.named_parameters())
    for param in before.values():
        param.data = param.data.contiguous()  # FSDP2 does not support channels_last
    scalars = {param for param in before.values() if not param.dim()}
    for unit in sharding_units(model):
        sharded: Any = fully_shard(
            unit, mesh=mesh, reshard_after_forward=True if is_average else None, ignored_params=scalars
        )
        # The losses are divided by the denominator of the whole batch, so gradients are summed.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # the other way needs NCCL
    # The parameters of the model itself stay gathered after the forward pass, so this warning does not concern it.
    warnings.filterwarnings("ignore", message=rf"FSDP2-wrapped module \({type(model).__name__}\)")
    after = dict(model.named_parameters())
    return {param: after[name] for name, param in before.items()}


def renew_optimizer(optimizer: Optimizer, renewed: Renewed) -> None:
    """Let an optimizer update the sharded parameters instead of those that they replace."""
    for group in optimizer.param_groups:
        group["params"] = [renewed.get(param, param) for param in group["params"]]
        if group.get("fused") and not isinstance(optimizer, FUSED):
            group["fused"] = False
    states = dict(optimizer.state)
    optimizer.state.clear()
    for param, content in states.items():  # Adagrad has a state before its first step
        new = renewed.get(param, param)
        optimizer.state[new] = shard_as(content, new)


# -------------------------------------------------------------------------------------------- a step


def filling_batches(state: State, inputs: Any, targets: Any) -> Iterator[Batch]:
    """Yield a batch of one sample for each pass that this rank makes less than another one. Its result must not count.

    RNG states do not change in the passes.

    Args:
        state: the state of the training.
        inputs: the inputs of this rank's share of the batch.
        targets: the targets of the share.
    """
    if not state.objects.sharded or (state.objects.synced is not None and state.phase is not Phase.EVALUATING):
        return  # with batch norm over the ranks, all of them make as many passes
    samples, size = batch_size_of(inputs), state.progress.micro_batch
    passes = [-(-count // (size or count)) if count else 0 for count in (state.progress.largest_share, samples)]
    if passes[0] <= passes[1]:
        return
    if not samples:
        inputs, targets = state.loaders["val" if state.phase is Phase.EVALUATING else "train"].example()
        samples = batch_size_of(inputs)
    batch = take_samples(inputs, 0, 1, samples), take_samples(targets, 0, 1, samples)
    with preserve_rng():
        for _ in range(passes[0] - passes[1]):
            yield batch


# ----------------------------------------------------------------------------------------- gradients


def total_norm(gradients: list[Tensor], objects: Objects) -> Tensor:
    """Return the norm over several gradients, a plain scalar on the device. All ranks must call it."""
    if not objects.sharded:
        return nn.utils.get_total_norm(gradients)
    shards = [local_part(gradient) for gradient in gradients if is_sharded(gradient)]
    replicas = [gradient for gradient in gradients if not is_sharded(gradient)]
    squares = [nn.utils.get_total_norm(part).to(objects.device).double() ** 2 for part in (shards, replicas)]
    return (objects.ranks.sum(squares[0]) + squares[1]).sqrt().float()


def clip_sharded_gradients(state: State, params: Iterable[Tensor]) -> None:
    """Clip the gradients as `clip_gradients` does, each rank those that it holds."""
    settings = state.settings
    gradients = [param.grad for param in params if param.grad is not None]
    if settings.clip_value is not None:
        for gradient in gradients:
            local_part(gradient).clamp_(-settings.clip_value, settings.clip_value)
    if settings.clip_norm is not None:
        factor = settings.clip_norm / (total_norm(gradients, state.objects) + 1e-6)  # as in torch
        for gradient in gradients:
            local_part(gradient).mul_(factor.clamp(max=1.0))
