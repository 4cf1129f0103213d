"""Sum the gradients over the ranks during the backward pass, by torch's `DistributedDataParallel` (DDP).

Sums after the backward pass (`Ranks.summed_gradients`) are the general way: they work for any model and step, and all
ranks can still repeat the step if memory runs out on one of them. DDP sums the gradients of a part of the model while
the backward pass computes those of the next part, so a fast device does not wait for the network.

With three or more ranks, the order in which they add a number depends on its place in a message. DDP chooses the places
anew in each process. So a resumed training equals one that was never stopped up to rounding; sums after the backward
pass are equal to the bit.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from trainkit.core.pytree import tensors_in
from trainkit.training.losses import is_sum
from trainkit.training.state import State


def sum_bucket(bucket: Any) -> Future[Tensor]:
    """Sum the gradients of a bucket of DDP, whose own sum would be divided by the number of ranks."""
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    summed: Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return summed


def begin_overlap(state: State, outputs: Any) -> None:
    """Let DDP sum the gradients from the next step on, if it gives the same numbers for this training.

    The first step sums after the backward pass, so that the ranks can still split it if memory runs out. From then on,
    `on_oom=auto` stops the training.

    Args:
        state: the state after a step.
        outputs: the outputs of the model in that step; None: this rank had no samples.
    """
    objects = state.objects
    if not objects.may_overlap or objects.overlapped is not None:
        return
    params = list(objects.model.parameters())
    is_dense = all(param.grad is None or param.grad.layout == torch.strided for param in params)
    has_tensors = outputs is None or bool(tensors_in(outputs))  # in which DDP finds the parameters that were used
    objects.may_overlap = all(row[0] for row in objects.ranks.agree(is_dense and has_tensors))
    if not objects.may_overlap:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the device of the model
        objects.overlapped = DistributedDataParallel(
            objects.model,
            find_unused_parameters=True,  # the ranks may use other parameters, for example if layers are dropped
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
            init_sync=False,  # the weights are equal on all ranks
        )
    objects.overlapped.register_comm_hook(None, lambda _, bucket: sum_bucket(bucket))  # DDP refuses annotations as text
    state.settings = replace(state.settings, on_oom="stop")


def why_not_overlapped(state: State) -> str:
    """Return why the backward pass of a training cannot sum its gradients; '' if it can."""
    objects, loss_fn = state.objects, state.objects.loss_fn
    if objects.training_step is not None:
        return "a custom step may call parts of the model"
    if objects.needs_closure:
        return "the optimizer evaluates the loss itself"
    if objects.joining:
        return "parameters join later"
    if any(param.requires_grad for param in loss_fn.parameters()):
        return "the loss has parameters"
    if not any(param.requires_grad for param in objects.model.parameters()):
        return "the model has no parameter to train"
    if getattr(loss_fn, "denominator", None) is not None and not is_sum(loss_fn):
        return "the denominator of the loss may be 0 on a rank"  # then this rank has no backward pass
    return ""


def overlapped_model(state: State) -> nn.Module | None:
    """Return the model that sums gradients in its backward pass; None: sum them afterwards.

    DDP needs a sample on each rank.
    """
    return state.objects.overlapped if state.progress.smallest_share else None


def sum_in_backward(model: nn.Module, *, last: bool) -> None:
    """Let DDP sum gradients in the backward pass of the last micro batch of a batch only."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
