"""Where a decoder block has folds.

It is not looked up by architecture: candidates come from a trace of the block, and each is tried with random scales on
real inputs. What changes the block's output is no fold; so a router that reads a norm beside the experts, or a
nonlinearity on the way, rules a candidate out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from signround_edge.model.decoder import out_in, set_tensor
from signround_edge.transforms.block_transform import BlockTransform
from signround_edge.transforms.folds import Fold, is_norm, linear_layers, output_count

# Relative change of a block's contribution that is rounding of f32. What is no fold changes it by a hundredth or more.
_TOLERANCE = 2e-5


def find_folds(block: nn.Module, run: Callable[[], Tensor], inputs: Tensor, head_size: int) -> list[Fold]:
    """The folds of a loaded block.

    Args:
        run: gives the block's output [1, tokens, hidden] for the same inputs at each call, in f32.
        inputs: those inputs, [1, tokens, hidden].
        head_size: channels of an attention head.
    """
    expected, readers = trace_norms(block, run)
    size = (expected - inputs).norm(dim=-1)
    found: list[Fold] = []
    for fold in (*_after_norms(block, readers), *_between_layers(block, readers, head_size)):
        taken = {name for other in found for name in other.consumers}
        if not taken & set(fold.consumers) and _is_fold(block, fold, run, expected, size):
            found.append(fold)
    return found


def _is_fold(block: nn.Module, fold: Fold, run: Callable[[], Tensor], expected: Tensor, size: Tensor) -> bool:
    """Whether random scales leave the block's output as it is, but for rounding."""
    before = dict(block.named_parameters())
    random = torch.rand(fold.channels, generator=torch.Generator().manual_seed(0)).mul_(1.4).sub_(0.7).exp_()
    try:
        BlockTransform().with_fold(block, fold, random.to(expected.device)).install(block)
        change = (run() - expected).norm(dim=-1) / size.clamp_min(1e-30)
    finally:
        for name, parameter in before.items():
            set_tensor(block, name, parameter)
    # The median: a token of huge hidden states hides what the block adds to it behind rounding.
    return bool(change.isfinite().all()) and float(change.median()) <= _TOLERANCE


def trace_norms(block: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, list[str]]]:
    """What `run` gives, and for each norm of a block (or model) the linear layers that read its output itself."""
    norms = {n: m for n, m in block.named_modules() if is_norm(m)}
    layers = linear_layers(block)
    outputs: dict[str, Tensor] = {}  # kept alive, so that an address names one tensor
    inputs: dict[str, Tensor] = {}
    hooks = [m.register_forward_hook(lambda _m, _a, out, n=n: outputs.update({n: out})) for n, m in norms.items()]
    hooks += [m.register_forward_pre_hook(lambda _m, args, n=n: inputs.update({n: args[0]})) for n, m in layers.items()]
    try:
        expected = run()
    finally:
        for hook in hooks:
            hook.remove()
    address = {out.data_ptr(): name for name, out in outputs.items()}
    readers: dict[str, list[str]] = {}
    for name, tensor in inputs.items():
        if tensor.data_ptr() in address:
            readers.setdefault(address[tensor.data_ptr()], []).append(name)
    return expected, readers


def _after_norms(block: nn.Module, readers: dict[str, list[str]]) -> Iterator[Fold]:
    for norm, layers in readers.items():
        rows = (0, output_count(block.get_submodule(norm)))
        if all(out_in(block.get_submodule(name)).shape[1] == rows[1] for name in layers):
            for adds_one in (False, True):
                yield Fold(norm, tuple(layers), rows, adds_one)


def _between_layers(block: nn.Module, readers: dict[str, list[str]], head_size: int) -> Iterator[Fold]:
    """Pairs of layers of one module: up and down projection, V and output projection."""
    after_norm = {name for names in readers.values() for name in names}
    layers = linear_layers(block)
    for consumer, producer in ((c, p) for c in layers for p in layers):
        if consumer in after_norm or producer == consumer or _parent(producer) != _parent(consumer):
            continue
        wanted, outputs = out_in(layers[consumer]).shape[1], output_count(layers[producer])
        for count in _counts(wanted, outputs, head_size):
            group = wanted // count
            rows = (outputs - count, outputs)
            yield Fold(producer, (consumer,), rows, head_size=head_size if group > 1 else count, group=group)


def _counts(wanted: int, outputs: int, head_size: int) -> Iterator[int]:
    """How many of a layer's last outputs may be the channels that a layer of `wanted` inputs reads."""
    if outputs >= wanted:
        yield wanted  # all, or those that follow the gate or the queries and keys in a packed projection
    shared = outputs if outputs < wanted else (outputs - wanted) // 2  # grouped heads, alone or packed
    if 0 < shared < wanted and wanted % shared == 0 and shared % head_size == 0:
        yield shared


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
