"""What an exporter is. Exporters are found through the entry points `signround_edge.exporters`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from signround_edge.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LevelCost:
    """What accuracy level 4 of MatMulNBits costs on one model.

    Attributes:
        ppl_floats, ppl_level_4: perplexity at level 1 and at level 4.
        kld_mean, top1_agreement: level 4 against level 1.
        tokens: tokens scored.
        text: name of the text.
    """

    ppl_floats: float
    ppl_level_4: float
    kld_mean: float
    top1_agreement: float
    tokens: int
    text: str


@dataclass(frozen=True)
class ExportOptions:
    """Options of `signround-edge export`.

    Attributes:
        dtype: None packs the integers; "f32" or "f16" writes the dequantized weights as floats instead.
        template: a file of the target format whose metadata and naming (GGUF) or graph (ONNX) to keep.
        accuracy_level: MatMulNBits' accuracy_level (ONNX only).
        scale_dtype: how scales are stored, "f32" or "f16" (ONNX only); the integers and weights are the same.
        split_max_bytes: split the model's data into files of at most so many bytes.
        ort_format: also write ONNX Runtime's own file format (ONNX only).
        measure_level_4: given the written folder, what accuracy level 4 costs (ONNX only), or a string that says why
            that is not known. None leaves it out.
        log: called with one line of progress.
    """

    dtype: str | None = None
    template: Path | None = None
    accuracy_level: int = 0
    scale_dtype: str = "f32"
    split_max_bytes: int | None = None
    ort_format: bool = False
    measure_level_4: Callable[[Path], LevelCost | str] | None = None
    log: Callable[[str], None] = print


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of an artifact, as `inspect` lists it.

    Attributes:
        name: the artifact's name of the tensor.
        type: the artifact's name of its format ("Q4_0", "MatMulNBits-4x32", "F32").
        shape: as in the Hugging Face model, outermost first.
        bytes: stored bytes, scale fields included.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


class ExpectedTensor(NamedTuple):
    """What a stored tensor should hold.

    Attributes:
        name: the artifact's name of the tensor; the runtime's `stored_tensors` gives it the same one.
        weights: makes them, f32 [rows, values a row] in the artifact's own orientation and order of rows.
    """

    name: str
    weights: Callable[[], NDArray[np.float32]]


class Exporter(Protocol):
    """Turns a complete run directory into an artifact; packs bits, never rounds a weight."""

    name: str

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like this exporter's format (cheap; it may still be broken)."""
        ...

    def inspect(self, path: Path) -> list[TensorInfo]:
        """Tensors of an artifact; UserError when it is truncated or broken."""
        ...

    def export(self, run: RunDirectory, out: Path, options: ExportOptions) -> Path:
        """Write the artifact at `out` (whole or not at all) and return the path that a runtime loads."""
        ...

    def iter_expected(self, run: RunDirectory, artifact: Path) -> Iterator[ExpectedTensor]:
        """What each tensor of an artifact that stems from the run should hold, computed from the run's own data.

        `verify` compares it with what the runtime's dequantizer gives; a tensor that only one of them has is a failure.

        Raises:
            UserError: the artifact is damaged.
            CheckFailed: it lacks a parameter of the run.
        """
        ...
