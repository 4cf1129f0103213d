"""Tensors that are divided among several processes: each process holds a shard (`DTensor` of torch).

The checks look for a method of `DTensor`, because the import of torch.distributed.tensor takes time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is divided among several processes."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """Return the shard of this process, which shares its memory with the tensor; a plain tensor as it is."""
    if type(tensor) is Tensor:
        return tensor
    part: Any = tensor
    shard: Tensor = part.to_local() if is_sharded(tensor) else tensor
    return shard


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor on the CPU, if it is sharded; a plain tensor as it is. All processes must call it."""
    part: Any = tensor.detach()
    full: Tensor = part.full_tensor().cpu() if is_sharded(tensor) else tensor
    return full


def shard_as(value: Any, like: Any) -> Any:
    """Return a whole tensor divided as another tensor is; no data is exchanged.

    A tensor of another shape is held whole by each process, such as the row sums that an optimizer keeps of a matrix.
    Tensors inside of containers are divided too. Other values, and scalars, stay as they are.
    """
    if not is_sharded(like) or is_sharded(value):
        return value
    if isinstance(value, Mapping):
        return {key: shard_as(item, like) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(shard_as(item, like) for item in value)
    if not isinstance(value, Tensor) or not value.dim():
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = like.placements if value.shape == like.shape else [Replicate()]
    return distribute_tensor(value.detach().to(like.device), like.device_mesh, placements, src_data_rank=None)


def shard_state_dict(content: Any, like: Mapping[str, Any]) -> Any:
    """Return the state dict of a module, with each tensor divided as the tensor of the same name."""
    if not any(map(is_sharded, like.values())):
        return content
    divided: Any = OrderedDict((name, shard_as(value, like.get(name))) for name, value in content.items())
    divided._metadata = getattr(content, "_metadata", OrderedDict())  # torch stores the versions of layers here
    return divided
