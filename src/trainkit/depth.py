"""How deep in a model each parameter lies: its layer, counted from the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of any model, frozen ones too, layer by layer from the input to the head.

    A layer is a block of a stack (a residual block, a transformer block) or, outside stacks, a
    module. What is no layer of its own joins one: a norm behind a block the layer after it, a norm
    behind anything else the layer before it, a parameter that a model holds itself the layer before
    it. So a vision transformer has its embeddings, its blocks and its head, as in BEiT
    (https://arxiv.org/abs/2106.08254). A tied parameter counts where it is first met.
    """
    found: list[list[nn.Parameter]] = []
    waiting: list[nn.Parameter] = []  # for the next layer
    before = ""
    for kind, params in _pieces(model, set()):
        if kind in ("block", "module"):
            found.append(waiting + params)
            waiting, before = [], kind
        elif not found or (kind == "norm" and before == "block"):
            waiting += params
        else:
            found[-1] += params
    if found:
        found[-1] += waiting
    return found or [waiting]


def _pieces(module: nn.Module, seen: set[int]) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """The parameters inside a module in order, in pieces: a `block`, a `module`, a `norm`, its `own`."""
    yield "own", _unseen(module, seen, recurse=False)
    children = [child for child in module.children() if any(id(p) not in seen for p in child.parameters())]
    for child in children:
        parts = list(child.children())
        wraps = len(children) == 1 and bool(parts)
        if type(child) in CONTAINERS or wraps or any(_is_stack(part) for part in (child, *parts)):
            yield from _pieces(child, seen)
            continue
        params = _unseen(child, seen, recurse=True)
        yield "norm" if all(p.dim() < 2 for p in params) else "block" if parts else "module", params


def _unseen(module: nn.Module, seen: set[int], *, recurse: bool) -> list[nn.Parameter]:
    params = [p for p in module.parameters(recurse=recurse) if id(p) not in seen]
    seen.update(map(id, params))
    return params


def _is_stack(module: nn.Module) -> bool:
    """Whether it holds blocks of one kind; a Sequential (convolution, norm, activation) is no block."""
    blocks = [child for child in module.children() if not isinstance(child, CONTAINERS) and list(child.children())]
    return isinstance(module, CONTAINERS) and any(count > 1 for count in Counter(map(type, blocks)).values())
