"""What the device can do at best: matrix products and copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import Row
from benchmarks.gpu.timing import median_seconds

_TOKENS = 4096  # of a step: 8 × 512
_ENOUGH_FLOPS = 2e12  # a repeat: some milliseconds on a large GPU


def products(bench: Bench) -> Iterator[Row]:
    """Rows of the table "products": square ones, those of an 8B block's forward pass, and f32."""
    shape = bench.shape("Llama-3-8B")
    squares = (32, 64, 96) if bench.options.tiny else (2048, 4096, 8192)
    tokens = 16 if bench.options.tiny else _TOKENS
    sizes = [(n, n, n) for n in squares]
    sizes += [(tokens, rows, cols) for rows, cols, _ in shape.products()]
    for size in dict.fromkeys(sizes):
        yield _product(bench, size, torch.bfloat16, "bfloat16")
    for name, precision in (("float32", "highest"), ("float32 as tf32", "high")):
        with _f32_products(precision):
            for n in squares[1:]:
                yield _product(bench, (n, n, n), torch.float32, name)


@contextlib.contextmanager
def _f32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product(bench: Bench, size: tuple[int, int, int], dtype: torch.dtype, name: str) -> Row:
    """x·wᵀ with x [m, k] and w [n, k], random: zeros would run faster."""
    m, n, k = size
    x, w = (torch.randn(rows, k, device=bench.device).to(dtype) for rows in (m, n))
    flops = 2 * m * n * k
    enough = 1e5 if bench.options.tiny else _ENOUGH_FLOPS if dtype == torch.bfloat16 else _ENOUGH_FLOPS / 10
    seconds = median_seconds(lambda: torch.mm(x, w.T), bench.device, inner=max(1, round(enough / flops)))
    row = {"table": "products", "what": f"{m:,} × {k:,} · {k:,} × {n:,}", "dtype": name}
    return {**row, "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12}


def copies(bench: Bench) -> Iterator[Row]:
    """Rows of the table "copies": on the device, and over the bus from pinned and pageable memory."""
    large, small = (1 << 20, 1 << 18) if bench.options.tiny else (1 << 32, 1 << 28)
    source = torch.randint(256, (large,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    yield _copy("device to device, read and written", target, source, moved=2 * large, bench=bench)
    del target
    on_device = source[:small]
    pageable = torch.ones(small, dtype=torch.uint8)
    yield _copy("pageable host to device", on_device, pageable, small, bench)
    yield _copy("device to pageable host", pageable, on_device, small, bench)
    if bench.device.type == "cuda":
        pinned = pageable.pin_memory()
        yield _copy("pinned host to device", on_device, pinned, small, bench)
        yield _copy("device to pinned host", pinned, on_device, small, bench)
    host = torch.ones(8, small // 8, dtype=torch.uint8)
    order = torch.tensor([7, 2, 5, 0, 6, 1, 4, 3])
    seconds = median_seconds(lambda: host[order].to(bench.device), bench.device)
    yield {**_row("samples gathered on the host, then to the device", small), "gb_s": small / seconds / 1e9}


def _copy(what: str, target: Tensor, source: Tensor, moved: int, bench: Bench) -> Row:
    seconds = median_seconds(lambda: target.copy_(source, non_blocking=True), bench.device)
    return {**_row(what, moved), "gb_s": moved / seconds / 1e9}


def _row(what: str, moved: int) -> Row:
    return {"table": "copies", "what": what, "megabytes": moved / 1e6}
