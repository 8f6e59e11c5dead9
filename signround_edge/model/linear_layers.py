"""Which linear layers of the decoder blocks are matrices to quantize: found by watching what the model does with them.

Not every one is. A router's output chooses experts, and is small and decides too much to be rounded; a gate of a single
row is one number a token; and a layer whose weight the model reads without calling the layer (Jamba's `dt_proj`) has no
inputs that could be watched. No list of names knows all models, so a pass of two tokens without weights tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from signround_edge.model.experts import Expert, Experts

_VALUE = 0.01  # of all parameters, in memory once


def matrices_of(model: nn.Module, blocks: nn.ModuleList, prefix: str) -> frozenset[str]:
    """Parameter names of the matrices of all blocks that can be quantized.

    Args:
        model: with parameters on the meta device, where they are again afterwards.
        prefix: name of `blocks` in it.
    """
    inside = {f"{prefix}.{name}": module for name, module in blocks.named_modules() if is_linear(module)}
    of_experts = {id(m) for expert in blocks.modules() if isinstance(expert, Expert) for m in expert.modules()}
    watched = {name: module for name, module in inside.items() if id(module) not in of_experts}
    watch = _Watch()
    try:
        with torch.no_grad(), _without_weights(model, watched, watch), watch:
            model(input_ids=torch.tensor([[0, 1]]), use_cache=False)
    except Exception:  # a model that does not run this way: whether it runs at all is the source check's question
        watch.called |= set(watched)
    kept = {name for name in watched if name in watch.called - watch.choosing and _rows(watched[name]) > 1}
    return frozenset(f"{name}.weight" for name in inside if name in kept or name not in watched)


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear or GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _rows(module: nn.Module) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.nf)  # type: ignore[arg-type]


class _Watch(TorchDispatchMode):
    """Follows what linear layers put out through all that is no product of matrices, up to the choice of experts.

    Attributes:
        called: names of the layers that ran.
        choosing: names of those whose output was sorted or searched for its largest values.
        weights: id of a weight → name of its layer, for layers that compute more than a product.
    """

    _PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "_scaled_dot_product", "matmul")
    _CHOICES = ("topk", "sort", "argsort", "argmax", "max", "kthvalue")

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.choosing: set[str] = set()
        self.weights: dict[int, str] = {}
        self._from: dict[int, set[str]] = {}
        self._alive: list[Tensor] = []  # an id must not be given twice

    def mark(self, name: str, output: Tensor) -> None:
        """`output` is what layer `name` puts out."""
        self.called.add(name)
        self._remember(output, {name})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = set().union(*(self._from.get(id(tensor), ()) for tensor in given))
        if operation in self._CHOICES and (operation != "max" or isinstance(output, tuple)):
            self.choosing |= sources
        weights = [self.weights[id(tensor)] for tensor in given if id(tensor) in self.weights]
        is_product = operation.startswith(self._PRODUCTS)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                if weights and not is_product:  # a view of a weight
                    self.weights[id(tensor)] = weights[0]
                self._remember(tensor, set(weights) if is_product else sources)
        return output

    def _remember(self, tensor: Tensor, sources: set[str]) -> None:
        if sources:
            self._from[id(tensor)] = sources
        self._alive.append(tensor)


@contextlib.contextmanager
def _without_weights(model: nn.Module, watched: dict[str, nn.Module], watch: _Watch) -> Iterator[None]:
    """Within, all parameters have one value that takes no memory, and layers and experts answer without computing."""
    from transformers.pytorch_utils import Conv1D

    kept = [(owner, dict(owner._parameters)) for owner in model.modules()]
    value = torch.tensor(_VALUE)
    stubs: list[nn.Module] = []
    for owner, parameters in kept:
        for leaf, parameter in parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(value.expand(parameter.shape), requires_grad=False)
    hooks = []
    for name, module in watched.items():
        if type(module).forward in (nn.Linear.forward, Conv1D.forward):
            module.forward = _answer(name, _rows(module), watch)
            stubs.append(module)
        else:
            watch.weights[id(module.weight)] = name
            hooks.append(module.register_forward_pre_hook(lambda _module, _args, name=name: watch.called.add(name)))
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = lambda hidden_states, *_: torch.zeros_like(hidden_states)  # type: ignore[method-assign]
            stubs.append(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in stubs:
            del module.forward
        for owner, parameters in kept:
            owner._parameters.update(parameters)


def _answer(name: str, rows: int, watch: _Watch) -> Any:
    def forward(inputs: Tensor) -> Tensor:
        output = torch.full((*inputs.shape[:-1], rows), _VALUE, dtype=inputs.dtype)
        watch.mark(name, output)
        return output

    return forward
