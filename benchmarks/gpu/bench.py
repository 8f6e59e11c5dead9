"""What the parts of a run share: options, device, and the block that was prepared last.

A block is one of a model with random weights, and is made, called and tuned by the product's own functions: `Job`,
`open_shell`, `run_all`, `block_unit`. No file of weights is written.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.parts import Options
from benchmarks.gpu.shapes import SHAPES, TINY_SHAPES, VOCABULARY, Shape
from benchmarks.gpu.timing import free_memory, timed
from signround_edge.formats import get_grid
from signround_edge.manifest import OUTSIDE, Manifest
from signround_edge.model.decoder import Decoder, build_decoder
from signround_edge.model.source import SourceModel
from signround_edge.model.weights import ModelWeights
from signround_edge.progress import SILENT
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import make_plan
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.block.compute import compute_context, compute_dtype
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.block.units import block_matrices, block_unit, run_all
from signround_edge.tuning.calibration.activations import Stream
from signround_edge.tuning.calibration.importance import Importance
from signround_edge.tuning.calibration.input_moments import SecondMoments
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.cpu.attention import use_blocked_attention
from signround_edge.tuning.cpu.rms_norm import use_cached_rms_norm
from signround_edge.tuning.job import Job
from signround_edge.tuning.outside import embed, open_shell
from signround_edge.tuning.settings import TuningSettings

# Random values are drawn once and repeated: drawing the 855 million of a 70B block takes a core many seconds. An odd
# number of them, so that rows are not alike.
_POOL = (1 << 24) + 43


@dataclass(frozen=True)
class RandomWeights(SourceModel):
    """A model folder that holds a config alone, and whose weights are random bf16 values in memory.

    Attributes:
        made: the tensors that were asked for.
    """

    made: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, decoder: Decoder) -> RandomWeights:
        """Weights for a decoder, in the folder of its config."""
        shapes = {name: tuple(parameter.shape) for name, parameter in decoder.model.named_parameters()}
        return cls(path, dict.fromkeys(shapes, "none"), dict.fromkeys(shapes, torch.bfloat16), shapes)

    def tensor(self, name: str, index: tuple[int | slice, ...] = ()) -> Tensor:
        """Matrices of variance 1/columns, vectors around 1, an embedding of variance 1."""
        if name not in self.made:
            shape, start = self.shapes[name], zlib.crc32(name.encode())
            generator = torch.Generator().manual_seed(start)
            count = math.prod(shape)
            drawn = torch.randn(min(count, _POOL), generator=generator).to(torch.bfloat16)
            values = drawn.repeat(-(-count // len(drawn)))[:count].view(shape)
            if len(shape) == 1:
                values = values.mul_(0.1).add_(1)
            elif "embed" not in name:
                values = values.mul_(shape[1] ** -0.5)
            self.made[name] = values
        return self.made[name][index] if index else self.made[name]


@dataclass(frozen=True)
class PreparedBlock:
    """A decoder block on a device, with the data it is tuned on.

    Attributes:
        unit: its matrices hold the source's weights.
        inputs: what enters the block in the quantized model, f32 [samples, seqlen, hidden] on the CPU.
        target: what leaves it in the exact model, same shape.
        pass_s: seconds in which all samples went through the block while E[x²] was collected.
    """

    job: Job
    shell: Shell
    unit: Unit
    inputs: Tensor
    target: Tensor
    pass_s: float

    @property
    def settings(self) -> TuningSettings:
        """Of the job."""
        return self.job.settings

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return self.job.device

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return compute_dtype(self.settings, (m.grid for m in self.unit.matrices), self.device)

    @property
    def autocast(self) -> torch.autocast:
        """Context of the products."""
        return compute_context(self.settings, (m.grid for m in self.unit.matrices), self.device)

    @property
    def batch(self) -> Tensor:
        """Indices of the samples of one step."""
        return self.unit.train[: self.settings.batch_size]

    def batch_inputs(self) -> Tensor:
        """What enters the block in that step, on the device."""
        return self.inputs[self.batch].to(self.device)

    def on_grid(self, name: str) -> PreparedBlock:
        """The same block with all its matrices to be rounded on another grid."""
        return self.with_matrices([replace(m, grid=get_grid(name)) for m in self.unit.matrices])

    def with_matrices(self, matrices: list[Matrix]) -> PreparedBlock:
        """The same block with other matrices to be tuned."""
        return replace(self, unit=replace(self.unit, matrices=matrices))

    def with_settings(self, settings: TuningSettings) -> PreparedBlock:
        """The same block tuned otherwise, on the same samples."""
        return replace(self, job=replace(self.job, settings=settings))

    def restore(self) -> None:
        """Put the source's weights back into the modules."""
        for matrix in self.unit.matrices:
            matrix.install(matrix.exact)


def prepare(
    source: SourceModel,
    tokens: Tensor,
    settings: TuningSettings,
    device: torch.device,
    importance: dict[str, Tensor] | None = None,
) -> PreparedBlock:
    """Block 0 of a model, all its matrices on Q4_0, ready to be tuned; the model is loaded as `quantize` does.

    What enters it in the quantized model has drifted by a fiftieth.

    Args:
        tokens: int64 [samples, seqlen].
        importance: parameter name → E[x²] instead of that of the calibration pass.
    """
    weights = ModelWeights.of(source, build_decoder(source.path))
    decoder = weights.decoder
    use_blocked_attention(decoder.model, device)
    use_cached_rms_norm(decoder.model, device)
    plan = make_plan(weights, parse_scheme("gguf:q4_0"), float_fallback=True)
    for entry in plan.tensors:
        if entry.format is not None and entry.part != OUTSIDE:
            entry.format = "Q4_0"
    manifest = Manifest("gguf:q4_0", ["gguf"], {}, settings.to_json(), {}, plan.parts, plan.tied, plan.tensors)
    run = RunDirectory(source.path / "none", manifest)
    job = Job(weights, plan, tokens, settings, device, run, SILENT, Importance({}))
    shell = open_shell(weights, tokens)
    exact = embed(job, shell)
    block, prefix = decoder.blocks[0], decoder.block_prefix(0)
    weights.load(block, prefix, device)
    moments, targets = SecondMoments(job.token_weights), []
    with moments.watching(block, decoder.matrices(0)):
        pass_s = timed(lambda: targets.append(run_all(job, shell, 0, exact, moments)), device)
    given = moments.result() if importance is None else {k: v.to(device) for k, v in importance.items()}
    inputs = exact.hidden.roll(1, dims=0).mul_(0.02).add_(exact.hidden)
    unit = block_unit(job, shell, 0, block_matrices(job, 0, given), Stream(inputs), targets[0].hidden)
    return PreparedBlock(job, shell, unit, inputs, targets[0].hidden, pass_s)


class Bench:
    """Options and device of a run, and what several of its parts need."""

    def __init__(self, options: Options) -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
        self.options = options
        self.device = torch.device(options.device)
        self._block: tuple[str, PreparedBlock] | None = None

    def shape(self, name: str) -> Shape:
        """A block's shape, or the tiny one that stands for it."""
        return (TINY_SHAPES if self.options.tiny else SHAPES)[name]

    def settings(self) -> TuningSettings:
        """The default ones where a GPU has the time."""
        if self.options.tiny:
            return TuningSettings(steps=4, samples=8, seqlen=32, batch_size=2)
        return TuningSettings(steps=50, samples=64) if self.options.quick else TuningSettings()

    def block(self, name: str, grid: str) -> PreparedBlock:
        """The block of that shape on the device with the source's weights, all matrices on one grid."""
        if self._block is None or self._block[0] != name:
            self.forget_block()
            with tempfile.TemporaryDirectory() as folder:
                self.shape(name).config().save_pretrained(folder)
                source = RandomWeights.of(Path(folder), build_decoder(Path(folder)))
                settings = self.settings()
                generator = torch.Generator().manual_seed(0)
                tokens = torch.randint(VOCABULARY, (settings.samples, settings.seqlen), generator=generator)
                self._block = name, prepare(source, tokens, settings, self.device)
            source.made.clear()
        prepared = self._block[1].on_grid(grid)
        prepared.restore()
        return prepared

    def is_sound(self) -> bool:
        """Whether the device still works: after some errors nothing does in the same process."""
        free_memory(self.device)
        try:
            return float(torch.ones(8, device=self.device).sum()) == 8
        except RuntimeError:
            return False

    def forget_block(self) -> None:
        """Give back the memory of the block that was prepared last."""
        self._block = None
        free_memory(self.device)
