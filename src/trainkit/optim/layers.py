"""The layers of a model: groups of parameters, counted from the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def model_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of a model, including frozen parameters, layer by layer from the input to the head.

    A layer is a block of a stack (a residual block, a transformer block) at any depth, or else a module.
    Other parameters join a neighbouring layer:

    - A norm after a block joins the next layer. Any other norm joins the previous layer.
    - A parameter that a composed module holds directly joins the previous layer.

    So the layers of a vision transformer are its embeddings, its blocks and its head, as in BEiT
    (https://arxiv.org/abs/2106.08254). A tied parameter belongs to the first layer that contains it.
    """
    layers: list[list[nn.Parameter]] = []
    for_next: list[nn.Parameter] = []
    previous = ""
    for kind, _, params in _pieces(model, set(), in_block=False):
        if kind in ("block", "composed", "module"):
            layers.append(for_next + params)
            for_next, previous = [], kind
        elif not layers or (kind == "norm" and previous in ("block", "composed")):
            for_next += params
        else:
            layers[-1] += params
    if layers:
        layers[-1] += for_next
    return layers or [for_next]


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the stacks of a model that are layers, from the input to the head."""
    return [module for kind, module, _ in _pieces(model, set(), in_block=False) if kind == "block"]


def _pieces(
    module: nn.Module, seen: set[int], *, in_block: bool
) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
    """Yield the parts of a module with their parameters, in order.

    A part is of a kind: `block` (of a stack), `composed` (of other modules), `module`, `norm`, or `direct` (the
    parameters that the module holds itself).
    """
    yield "direct", module, _take_unseen(module, seen, recurse=False)
    children = [child for child in module.children() if any(id(p) not in seen for p in child.parameters())]
    for child in children:
        child_in_block = in_block or child in _stack_blocks(module)
        wrapped = type(module) not in CONTAINERS and len(children) == 1 and not list(child.parameters(recurse=False))
        descend = type(child) in CONTAINERS or (wrapped and list(child.children()))
        if (descend or _contains_stack(child, child_in_block)) and not is_parametrized(child):
            yield from _pieces(child, seen, in_block=child_in_block)
            continue
        params = _take_unseen(child, seen, recurse=True)
        kind = ("block" if child_in_block else "composed") if list(child.children()) else "module"
        yield "norm" if all(p.dim() < 2 for p in params) else kind, child, params


def _take_unseen(module: nn.Module, seen: set[int], *, recurse: bool) -> list[nn.Parameter]:
    """Return the parameters that are not in `seen`, and add them to `seen`."""
    params = [p for p in module.parameters(recurse=recurse) if id(p) not in seen]
    seen.update(map(id, params))
    return params


def _stack_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of a stack: children of a container that have the same class and several weights each.

    A convolution with its norm and activation has only one weight, so it is not a block.
    """
    if not isinstance(module, CONTAINERS):
        return []
    weights = {child: sum(p.dim() > 1 for p in child.parameters()) for child in module.children()}
    composed = [child for child in weights if weights[child] > 1 and list(child.children())]
    composed = [child for child in composed if not isinstance(child, CONTAINERS)]
    count = Counter(map(type, composed))
    return [child for child in composed if count[type(child)] > 1]


def _contains_stack(module: nn.Module, in_block: bool) -> bool:
    """Return whether a module contains a stack at any depth.

    Inside a block, only a stack of composed blocks counts: the blocks of a stage, not the experts of a block.
    """
    for part in module.modules():
        for block in _stack_blocks(part):
            if not in_block or any(list(p.parameters()) and list(p.children()) for p in block.children()):
                return True
    return False
