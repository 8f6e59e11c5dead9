"""A CUDA device that exists on paper only: tensors have shapes and dtypes there, and no values; no GPU is needed.

It is torch's FakeTensorMode (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html) with what that lacks
where there is no GPU: a guard for the device type, without which no graph of gradients is recorded; a backward pass
that does not ask the driver for streams; pinned memory; and the attention that a GPU would take.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda", 0)
# Places of c10/core/DeviceType.h; the guard of "meta" does nothing, as this one is to do.
_CUDA, _META, _TYPES = 1, 14, 21
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Within, tensors are made without memory, also on `DEVICE`; real ones that are given become such."""
    if not torch.cuda.is_available():
        _set_guard()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        mode,
        mock.patch.object(Tensor, "backward", _backward),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention),
    ):
        yield mode


@contextlib.contextmanager
def bf16_products() -> Iterator[None]:
    """What `torch.autocast("cuda", torch.bfloat16)` is where there is a GPU; without one it only warns."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


def _set_guard() -> None:
    """A guard for CUDA devices in builds of torch that have none."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _TYPES).in_dll(library, _GUARDS)
    if not guards[_CUDA]:
        guards[_CUDA] = guards[_META]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's fused attention, which a GPU takes for bf16 without a mask; keys are shared by heads without copies."""
    assert attn_mask is None
    assert enable_gqa or query.shape[1] == key.shape[1]
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
    output: Tensor = found[0]
    return output


def _backward(output: Tensor, gradient: Tensor) -> None:
    """Gradients of all leaves, node by node, as autograd's engine computes them: it wants a driver."""
    root = output.grad_fn
    assert root is not None
    waiting: dict[Any, int] = {}
    seen, stack = {root}, [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None:
                continue
            waiting[following] = waiting.get(following, 0) + 1
            if following not in seen:
                seen.add(following)
                stack.append(following)
    found: dict[Any, dict[int, Tensor]] = {root: {output.output_nr: gradient}}
    ready = [root]
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _autocast_off():
        while ready:
            node = ready.pop()
            given = found.pop(node, {})
            results: Any = (None,) * len(node.next_functions)
            if isinstance(leaf := getattr(node, "variable", None), nn.Parameter | Tensor):
                _accumulate(leaf, given)
            elif given:
                count = len(node._input_metadata)
                results = node(*(given.get(i) for i in range(count)))
                results = results if isinstance(results, tuple) else (results,)
            for (following, place), slope in zip(node.next_functions, results, strict=False):
                if following is None:
                    continue
                if slope is not None:
                    slope = _as_forward(slope, following._input_metadata[place])
                    sums = found.setdefault(following, {})
                    sums[place] = sums[place] + slope if place in sums else slope
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def _as_forward(slope: Tensor, of: Any) -> Tensor:
    """The engine gives each node gradients of the shape and dtype that its outputs had."""
    return slope.sum_to_size(of.shape).to(of.dtype)


def _accumulate(leaf: Tensor, given: dict[int, Tensor]) -> None:
    if given:
        leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]


@contextlib.contextmanager
def _autocast_off() -> Iterator[None]:
    """The engine runs its nodes as they were recorded."""
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
