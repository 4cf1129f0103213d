"""How deep in a model each parameter lies: its layer, counted from the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def model_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of any model, frozen ones too, layer by layer from the input to the head.

    A layer is a block of a stack (a residual block, a transformer block), wherever in the model the
    stack is, or else a module. What is no layer of its own joins one: a norm behind a block the layer
    after it, a norm behind anything else the layer before it, a parameter that a model holds itself
    the layer before it. So a vision transformer has its embeddings, its blocks and its head, as in
    BEiT (https://arxiv.org/abs/2106.08254). A tied parameter counts where it is first met.
    """
    found: list[list[nn.Parameter]] = []
    waiting: list[nn.Parameter] = []  # for the next layer
    before = ""
    for kind, params in _pieces(model, set(), in_block=False):
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


def _pieces(module: nn.Module, seen: set[int], *, in_block: bool) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """The parameters inside a module in order, in pieces: a `block`, a `module`, a `norm`, its `own`."""
    yield "own", _unseen(module, seen, recurse=False)
    children = [child for child in module.children() if any(id(p) not in seen for p in child.parameters())]
    for child in children:
        blocks = in_block or child in _blocks(module)
        wrapped = type(module) not in CONTAINERS and len(children) == 1 and not list(child.parameters(recurse=False))
        opens = type(child) in CONTAINERS or (wrapped and list(child.children())) or _holds_stack(child, blocks)
        if opens and not is_parametrized(child):
            yield from _pieces(child, seen, in_block=blocks)
            continue
        params = _unseen(child, seen, recurse=True)
        whole = "block" if list(child.children()) else "module"
        yield "norm" if all(p.dim() < 2 for p in params) else whole, params


def _unseen(module: nn.Module, seen: set[int], *, recurse: bool) -> list[nn.Parameter]:
    params = [p for p in module.parameters(recurse=recurse) if id(p) not in seen]
    seen.update(map(id, params))
    return params


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a stack: a container's children of one kind, each with several weights.

    So a convolution with its norm and activation is no block, nor is one module with none like it.
    """
    if not isinstance(module, CONTAINERS):
        return []
    weights = {child: sum(p.dim() > 1 for p in child.parameters()) for child in module.children()}
    composed = [child for child in weights if weights[child] > 1 and list(child.children())]
    composed = [child for child in composed if not isinstance(child, CONTAINERS)]
    count = Counter(map(type, composed))
    return [child for child in composed if count[type(child)] > 1]


def _holds_stack(module: nn.Module, in_block: bool) -> bool:
    """Whether there is a stack inside at any depth; inside a block, of blocks that are composed themselves.

    That tells a stage's blocks from a block's experts.
    """
    for part in module.modules():
        for block in _blocks(part):
            if not in_block or any(list(p.parameters()) and list(p.children()) for p in block.children()):
                return True
    return False
