"""ggml's tensor types: number, values a block and bytes a block; and the types of files, which presets are.

gguf-py's tables, and what they do not know yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from gguf import GGML_QUANT_SIZES, LlamaFileType


@dataclass(frozen=True)
class GgmlType:
    """One row of `type_traits` in ggml.c.

    Attributes:
        name: "F32", "Q4_K", …
        number: as in a GGUF file.
        block_values: values a block.
        block_bytes: bytes a block.
    """

    name: str
    number: int
    block_values: int
    block_bytes: int

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of that shape (numpy order)."""
        return prod(shape) // self.block_values * self.block_bytes


_ROWS = (
    *(GgmlType(t.name, int(t), *sizes) for t, sizes in GGML_QUANT_SIZES.items()),
    GgmlType("Q2_0", 42, 64, 18),  # not in gguf-py 0.19; block_q2_0 in ggml-common.h
)

BY_NAME = {row.name: row for row in _ROWS}
BY_NUMBER = {row.number: row for row in _ROWS}

# Preset of llama-quantize ("q4_k_m", "f16") → its number in `enum llama_ftype` (llama.h), a file's general.file_type.
FILE_TYPES = {t.name.removeprefix("ALL_").removeprefix("MOSTLY_").lower(): int(t) for t in LlamaFileType}
FILE_TYPES["q2_0"] = 41  # not in gguf-py 0.19
FILE_TYPES["mxfp4"] = FILE_TYPES["mxfp4_moe"]  # llama.cpp has no other for files of this type

F32, F16, BF16, Q4_0 = (BY_NAME[name] for name in ("F32", "F16", "BF16", "Q4_0"))
