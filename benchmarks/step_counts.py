"""What one tuning step launches, copies over the bus and waits for, counted on a CUDA device that needs no GPU.

    python -m benchmarks.step_counts

A block of each shape is made, called and tuned by the product's own functions on fake tensors (`fake_cuda`), and a
dispatch mode counts the operators that reach the device. A launch is an operator that writes: no view, nothing that
only changes shapes, nothing on the host. Some are more kernels than one (attention's backward pass is three). The sign
step of a matrix, which torch.compile makes, counts as one; its operators stand beside. A read of a value on the host,
which would wait for the device, raises where it is not asked for: fake tensors have no values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.fake_cuda import DEVICE, bf16_products, fake_cuda
from benchmarks.gpu.shapes import SHAPES, VOCABULARY, Shape
from signround_edge.formats import Grid, get_grid
from signround_edge.model.decoder import Decoder, build_decoder, set_tensor, set_weight, weight_of
from signround_edge.tuning.block import sign_step, tune
from signround_edge.tuning.block.compute import hidden_dtype
from signround_edge.tuning.block.gptq import DAMPING, round_columns
from signround_edge.tuning.block.ldl import ColumnScales, spread_errors
from signround_edge.tuning.block.loss import held_out_loss
from signround_edge.tuning.block.sign_step import RoundingState
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.calibration.activations import CPU, Store, Stream, fetch, relative_weights, run_block
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.cpu.attention import use_blocked_attention
from signround_edge.tuning.cpu.rms_norm import use_cached_rms_norm
from signround_edge.tuning.settings import TuningSettings, choices

_COLUMNS_A_KERNEL = 64  # `gptq_kernel.COLUMNS_AT_ONCE`, which can only be read where Triton is installed
Samples = tuple[Tensor, Tensor]
_SHAPE_ONLY = ("empty", "detach", "lift_fresh", "_unsafe_view", "is_pinned", "device", "set_", "is_same_size")


@dataclass
class Counts:
    """What reached the device, or made the host wait for it.

    Attributes:
        launches: by operator.
        compiled: operators inside what torch.compile would make one kernel of; each call of it is one of `launches`.
        to_device, to_host: bytes of each copy over the bus.
        pageable: of the copies to the device, those from memory that is not pinned.
        waits: by what the host waited for.
        host_bytes: written on the host by operators on tensors there.
    """

    launches: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    to_device: list[int] = field(default_factory=list)
    to_host: list[int] = field(default_factory=list)
    pageable: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    host_bytes: int = 0

    def row(self) -> dict[str, Any]:
        """Sums."""
        return {
            "launches": self.launches.total(),
            "in_compiled": self.compiled.total(),
            "copies_to_device": len(self.to_device),
            "mb_to_device": sum(self.to_device) / 1e6,
            "pageable": self.pageable,
            "copies_to_host": len(self.to_host),
            "mb_to_host": sum(self.to_host) / 1e6,
            "waits": self.waits.total(),
            "host_mb": self.host_bytes / 1e6,
        }


class Counting(TorchDispatchMode):
    """Counts what is dispatched within; to be entered inside of `fake_cuda`.

    Args:
        pinned: tensors in pinned memory by their storage, which fake ones forget; kept, so that no other is there.
        answers: reads of values are answered with 1 and counted; without it they raise.
    """

    def __init__(self, pinned: dict[int, Tensor], answers: bool = False) -> None:
        super().__init__()
        self.counts, self.answers, self.in_compiled = Counts(), answers, False
        self._pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removeprefix("prim::")
        tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors) and not kwargs.get("device"):
            with _disable_current_modes():  # indices of samples have values
                return func(*args, **kwargs)
        if name == "_pin_memory":
            out = torch.empty_like(tensors[0])
            self._pinned[_storage(out)] = out
            self.counts.host_bytes += _bytes(out)
            return out
        if name == "is_pinned":
            return _storage(tensors[0]) in self._pinned
        if name in ("_local_scalar_dense", "is_nonzero", "equal") and any(t.is_cuda for t in tensors):
            self.counts.waits[name] += 1
            if self.answers:
                return 1.0
        out = func(*args, **kwargs)
        results = [x for x in _leaves(out) if isinstance(x, Tensor)]
        if name == "empty" and kwargs.get("pin_memory"):
            self._pinned[_storage(out)] = out
        if not name.startswith(_SHAPE_ONLY) and results and not _is_view(func):
            self._count(name, tensors, results[0], kwargs, args)
        return out

    def _count(self, name: str, tensors: list[Tensor], out: Tensor, kwargs: Any, args: Any) -> None:
        source = args[1] if name == "copy_" else tensors[0] if tensors else out
        if name in ("copy_", "_to_copy") and source.is_cuda != out.is_cuda:
            waits = not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            self._copy(source, to_device=out.is_cuda, waits=waits)
            return
        if not out.is_cuda:
            self.counts.host_bytes += _bytes(out)
            return
        for index in tensors[1:] if name.startswith("index") else ():
            if not index.is_cuda:  # the kernel's own doing: it takes indices where the values are
                self._copy(index, to_device=True, waits=True)
        (self.counts.compiled if self.in_compiled else self.counts.launches)[name] += 1

    def _copy(self, source: Tensor, to_device: bool, waits: bool) -> None:
        pageable = to_device and _storage(source) not in self._pinned
        (self.counts.to_device if to_device else self.counts.to_host).append(_bytes(source))
        self.counts.pageable += pageable
        if waits or pageable or not to_device:
            self.counts.waits["copy to the device" if to_device else "copy to the host"] += 1


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _is_view(func: Any) -> bool:
    """Whether all that an operator returns is a view of what it was given."""
    infos = [result.alias_info for result in func._schema.returns]
    return all(info is not None and not info.is_write for info in infos)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class FakeBlock:
    """A block on the fake device in the middle of its tuning, and what `tune_unit` has there."""

    decoder: Decoder
    shell: Shell
    unit: Unit
    stream: Stream
    tokens: Tensor
    settings: TuningSettings
    steps: Any

    @classmethod
    def of(
        cls,
        shell: Shell,
        tokens: Tensor,
        samples: Samples,
        grid: str,
        hidden_on: torch.device,
        settings: TuningSettings,
    ) -> FakeBlock:
        """Within `fake_cuda`; `tokens` [samples, seqlen] and the samples to train on and to hold out are real."""
        decoder = shell.decoder
        block = decoder.blocks[0]
        for name, parameter in list(block.named_parameters()):
            set_tensor(block, name, _frozen(torch.empty(parameter.shape, device=DEVICE)))
        width = weight_of(decoder.embedding).shape[1]
        dtype = torch.bfloat16 if hidden_dtype(settings) == "bfloat16" else torch.float32
        store = Store(hidden_on, dtype=dtype, pinned=hidden_on == CPU)
        hidden, target = (store.empty((*tokens.shape, width)) for _ in range(2))
        stream = Stream(hidden)
        matrices = _matrices(decoder, get_grid(grid))

        def forward(samples: Tensor) -> Tensor:
            call = shell.block_call(0, tokens[samples], DEVICE)
            return call.run(block, *stream.at(samples, DEVICE))

        unit = Unit(
            matrices,
            forward,
            lambda samples: fetch(target, samples, DEVICE).float(),
            relative_weights,
            *samples,
            block,
        )
        states = {
            m.name: RoundingState.start(m.grid, m.exact, initial_scales(m.grid, m.exact, m.importance, "absmax"))
            for m in matrices
        }
        steps = tune._Steps(states, settings)
        steps.watch(matrices, torch.bfloat16)
        return cls(decoder, shell, unit, stream, tokens, settings, steps)

    def step(self, number: int) -> None:
        """`_Steps.take`."""
        self.steps.take(number, self.unit, self.unit.train, bf16_products())

    def held_out(self) -> None:
        """The loss of a batch of held-out samples."""
        held_out_loss(self.unit, self.settings, bf16_products())

    def batch(self) -> None:
        """One batch of `run_block`, in place."""
        size, hidden = self.settings.batch_size, self.stream.hidden
        stream = Stream(hidden[:size])
        run_block(self.decoder, self.shell, 0, self.tokens[:size], stream, size, DEVICE, bf16_products(), in_place=True)


def recorded_shell(shape: Shape, settings: TuningSettings) -> Shell:
    """How the block of a shape is called, outside of `fake_cuda`: transformers looks at values to leave out a mask."""
    with tempfile.TemporaryDirectory() as folder:
        shape.config().save_pretrained(folder)
        decoder = build_decoder(Path(folder))
    use_blocked_attention(decoder.model, DEVICE)
    use_cached_rms_norm(decoder.model, DEVICE)
    set_weight(decoder.embedding, torch.zeros(1, 1).expand(VOCABULARY, shape.hidden))
    shell = Shell(decoder, returns_tuple=False)
    shell._depends_on_tokens = False
    shell.block_call(0, torch.zeros(settings.batch_size, settings.seqlen, dtype=torch.int64), CPU)
    return shell


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _matrices(decoder: Decoder, grid: Grid) -> list[Matrix]:
    return [
        Matrix(
            name,
            module,
            grid,
            torch.empty(weight_of(module).shape, dtype=torch.bfloat16, device=DEVICE),
            torch.empty(weight_of(module).shape[1], device=DEVICE),
        )
        for name, module in decoder.matrices(0).items()
    ]


@contextlib.contextmanager
def counting(pinned: dict[int, Tensor], answers: bool = False) -> Iterator[Counting]:
    """Within, operators are counted; of the sign step, which is not compiled here, as those of one kernel."""
    mode = Counting(pinned, answers)

    def kernel(*args: Any) -> None:
        mode.in_compiled = True
        try:
            sign_step._update(*args)
        finally:
            mode.in_compiled = False
        mode.counts.launches["sign step"] += 1

    with mock.patch.object(sign_step, "_compiled_update", return_value=kernel), mode:
        yield mode


def counted(shape: Shape, grid: str, hidden_on: torch.device, settings: TuningSettings) -> Iterator[tuple[str, Counts]]:
    """(what, counts) of a step, a batch of held-out samples, and one of `run_block`; each the second of its kind."""
    shell, size = recorded_shell(shape, settings), settings.batch_size
    tokens, every = torch.zeros(2 * size, settings.seqlen, dtype=torch.int64), torch.arange(2 * size)
    samples = every[:size], every[size:]
    pinned: dict[int, Tensor] = {}
    with fake_cuda():
        with counting(pinned):
            block = FakeBlock.of(shell, tokens, samples, grid, hidden_on, settings)
        works: dict[str, Callable[[], None]] = {
            "step": lambda: block.step(1),
            "held-out batch": block.held_out,
            "batch of a pass": block.batch,
        }
        with counting(pinned, answers=True):
            block.step(0)
            block.held_out()
            block.batch()
        for what, work in works.items():
            with counting(pinned, answers=what == "held-out batch") as mode:
                work()
            yield what, mode.counts


def columns_counted(grid: Grid, cols: int = 512, rows: int = 256) -> tuple[float, float]:
    """Launches a column of GPTQ with one damping: by the loop, and by a kernel for each group of columns."""
    with fake_cuda(), torch.no_grad():
        work, factor = torch.empty(cols, rows, device=DEVICE), torch.empty(cols, cols, device=DEVICE)
        scale = torch.empty(cols // grid.block_size, rows, device=DEVICE)
    scales = ColumnScales(scale, scale, scale, torch.arange(cols) // grid.block_size)
    with fake_cuda(), torch.no_grad(), counting({}) as loop:
        round_columns(work, factor, grid, scales, by_kernel=False)
    with fake_cuda(), torch.no_grad(), counting({}) as kernel:
        groups = Counter[str]()
        spread_errors(work, work, factor, lambda *_: groups.update(["group"]), at_once=_COLUMNS_A_KERNEL)
    return loop.counts.launches.total() / cols, (kernel.counts.launches.total() + groups.total()) / cols


def _print_columns(grid: Grid) -> None:
    loop, kernel = columns_counted(grid)
    print(f"\nGPTQ's columns on {grid.name}: {loop:.1f} launches a column by the loop, {kernel:.2f} by kernels")
    for name, shape in SHAPES.items():
        columns = len(DAMPING) * sum(cols * count for _, cols, count in shape.products())
        print(f"- {name}, both dampings: {columns * loop:,.0f} launches a block by the loop, {columns * kernel:,.0f}")


_HEAD = {
    "block": "block of",
    "grid": "grid",
    "hidden": "hidden states",
    "what": "what",
    "launches": "launches",
    "in_compiled": "operators in the sign steps",
    "copies_to_device": "copies to the device",
    "mb_to_device": "MB",
    "pageable": "of them pageable",
    "copies_to_host": "copies to the host",
    "mb_to_host": "MB",
    "waits": "waits of the host",
    "host_mb": "written on the host, MB",
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: all")
    parser.add_argument("--grid", default="Q4_K")
    parser.add_argument("--hidden-dtype", choices=choices("hidden_dtype"), default="auto")
    parser.add_argument("--operators", action="store_true", help="name them, as JSON")
    args = parser.parse_args()
    settings = TuningSettings(hidden_dtype=args.hidden_dtype)
    if not args.operators:
        print(f"| {' | '.join(_HEAD.values())} |\n|{'---|' * len(_HEAD)}")
    for name in args.shape or SHAPES:
        for where, device in (("GPU", DEVICE), ("host", CPU)):
            for what, counts in counted(SHAPES[name], args.grid, device, settings):
                row = {"block": name, "grid": args.grid, "hidden": where, "what": what, **counts.row()}
                if args.operators:
                    named = {key: dict(getattr(counts, key)) for key in ("launches", "compiled", "waits")}
                    print(json.dumps({**row, "operators": named}))
                    continue
                cells = (f"{row[key]:.1f}" if isinstance(row[key], float) else str(row[key]) for key in _HEAD)
                print(f"| {' | '.join(cells)} |")
    if not args.operators:
        _print_columns(get_grid(args.grid))


if __name__ == "__main__":
    main()
