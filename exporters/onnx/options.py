"""What `export --format onnx` can be told besides the options of every format."""

from __future__ import annotations

from dataclasses import dataclass

from exporters.interface import ExportOptions
from signround_edge.errors import UserError

# Level of MatMulNBits → what it does on a CPU.
ACCURACY_LEVELS = {
    0: "ONNX Runtime chooses how MatMulNBits computes, which on CPUs is f32",
    1: "MatMulNBits computes in f32",
    4: "MatMulNBits rounds its inputs to int8, which is faster on most CPUs and less exact",
}
SCALE_DTYPES = ("f32", "f16")
# Whose names and places of files.
GENAI, TRANSFORMERS_JS = LAYOUTS = ("onnxruntime-genai", "transformers.js")
# matmulnbits: ONNX Runtime's own, MatMulNBits and GatherBlockQuantized; qdq: ONNX's, DequantizeLinear in front.
OPERATORS = ("matmulnbits", "qdq")
IO_DTYPES = ("f32", "f16")


@dataclass(frozen=True)
class OnnxOptions(ExportOptions):
    """Options of the ONNX export.

    Attributes:
        accuracy_level: of every MatMulNBits, one of `ACCURACY_LEVELS`.
        scale_dtype: how scales are stored, one of `SCALE_DTYPES`; the integers and weights are the same.
        ort_format: also write ONNX Runtime's own file format.
        layout: where the files lie, one of `LAYOUTS`.
        operators: which hold the integers, one of `OPERATORS`.
        io_dtype: what the graph computes in, one of `IO_DTYPES`: activations, caches, logits.
        no_cache: of an architecture that is traced: the graph takes whole texts and keeps nothing between calls.
    """

    accuracy_level: int = 0
    scale_dtype: str = "f32"
    ort_format: bool = False
    layout: str = GENAI
    operators: str = "matmulnbits"
    io_dtype: str = "f32"
    no_cache: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accuracy_level not in ACCURACY_LEVELS:
            *most, last = map(str, ACCURACY_LEVELS)
            raise UserError(
                f"--accuracy-level {self.accuracy_level} is unknown; "
                f"MatMulNBits on a CPU has {', '.join(most)} and {last}"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise UserError(
                f"--scale-dtype {self.scale_dtype} is unknown; scales are stored in {' or '.join(SCALE_DTYPES)}"
            )
        if self.layout not in LAYOUTS:
            raise UserError(f"--layout {self.layout} is unknown; there are {' and '.join(LAYOUTS)}")
        if self.layout != GENAI and self.ort_format:
            raise UserError(f"--ort-format is for the layout {GENAI}; leave it out with --layout {self.layout}")
        if self.operators not in OPERATORS:
            raise UserError(f"--operators {self.operators} is unknown; known are {' and '.join(OPERATORS)}")
        if self.io_dtype not in IO_DTYPES:
            raise UserError(f"--io-dtype {self.io_dtype} is unknown; a graph computes in {' or '.join(IO_DTYPES)}")
        if self.io_dtype == "f16":
            self._check_half()
        if self.no_cache and self.layout == TRANSFORMERS_JS:
            raise UserError(f"--layout {TRANSFORMERS_JS}: it generates with a cache only; leave --no-cache out")
        if self.no_cache and self.template is not None:
            raise UserError("--no-cache is for a graph that is traced, and --template brings its own; give one of them")
        self._check_floats()
        if self.operators == "qdq" and self.dtype is not None:
            raise UserError(f"--operators qdq holds integers, and --dtype {self.dtype} writes floats; give one of them")
        if self.operators == "qdq" and self.layout == TRANSFORMERS_JS:
            raise UserError(f"--layout {TRANSFORMERS_JS} names its file by MatMulNBits; leave --operators qdq out")
        if self.operators == "qdq" and self.ort_format:
            raise UserError(
                "--ort-format: ONNX Runtime writes MatMulNBits for --operators qdq there; give one of the two options"
            )

    @property
    def has_level_4(self) -> bool:
        """Whether the card says what accuracy level 4 costs: on floats, and in f16, MatMulNBits has no such level."""
        return self.dtype is None and self.io_dtype == "f32"

    def _check_floats(self) -> None:
        """UserError for what floats instead of integers do not have: scales, and MatMulNBits."""
        others = {"--scale-dtype f16": self.scale_dtype == "f16", "--accuracy-level 4": self.accuracy_level == 4}
        given = next((name for name, is_given in others.items() if is_given), None)
        if given is not None and self.dtype is not None:
            raise UserError(f"{given} is for integers, and --dtype {self.dtype} writes floats; give one of them")

    def _check_half(self) -> None:
        """UserError for what does not go with f16 activations."""
        others = {
            "--dtype": self.dtype is not None,
            "--template": self.template is not None,
            "--operators qdq": self.operators == "qdq",
            "--no-cache": self.no_cache,
            "--accuracy-level 4": self.accuracy_level == 4,
        }
        given = next((name for name, is_given in others.items() if is_given), None)
        if given is not None:
            raise UserError(f"--io-dtype f16 does not go with {given}; give one of them")

    @classmethod
    def of(cls, options: ExportOptions) -> OnnxOptions:
        """These options; with the defaults of ONNX where they are those of every format."""
        if isinstance(options, cls):
            return options
        return cls(options.dtype, options.template, options.split_max_bytes, options.log)


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
