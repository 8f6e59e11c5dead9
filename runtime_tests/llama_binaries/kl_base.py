"""Reference log-probabilities in the file format of `llama-perplexity --kl-divergence-base`.

Source of the format: `kl_divergence` and `log_softmax` in llama.cpp's tools/perplexity/perplexity.cpp. Little-endian:
the bytes `_logits_`, uint32 n_ctx, int32 n_vocab, int32 windows, int32 tokens [windows, n_ctx]; then for each scored
position (n_ctx/2 … n_ctx−2 of each window) f32 scale, f32 smallest log-probability, and uint16 codes [n_vocab], padded
to an even number. A log-probability is scale·code + smallest; what is more than 16 below the largest is cut there. The
codes are steps of at most 16/65535, so a divergence is known to about 1e-6.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from signround_edge.evaluation.metrics import FloatArray, Windows

_MAGIC = b"_logits_"
_RANGE = np.float32(16.0)  # log-probabilities further below the largest are cut
_STEPS = np.float32(65535.0)


class KlBaseWriter:
    """Writes the file window by window; use as a context manager.

    Args:
        path: the file.
        windows: what will be added, in order.
    """

    def __init__(self, path: Path, windows: Windows) -> None:
        self.path = path
        self._windows = windows
        self._file: BinaryIO = path.open("wb")
        self._has_head = False

    def add(self, logits: FloatArray) -> None:
        """Add the reference's logits f32 [scored, vocab] of the next window."""
        if not self._has_head:
            count, n_ctx = self._windows.tokens.shape
            self._file.write(_MAGIC + struct.pack("<Iii", n_ctx, logits.shape[1], count))
            self._file.write(self._windows.tokens.astype("<i4").tobytes())
            self._has_head = True
        self._file.write(encode(logits).tobytes())

    def close(self) -> None:
        """The file is complete. May be repeated."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def encode(logits: FloatArray) -> NDArray[np.uint16]:
    """uint16 [n, 4 + vocab (padded to even)] of f32 [n, vocab] logits, as llama-perplexity itself writes them."""
    largest = logits.max(axis=-1, keepdims=True)
    smallest = np.maximum(logits.min(axis=-1, keepdims=True), largest - _RANGE)
    total = np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (largest - smallest) / _STEPS
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scale > 0, np.float32(1.0) / scale, np.float32(0.0))
    n, vocab = logits.shape
    rows = np.zeros((n, 4 + vocab + vocab % 2), dtype="<u2")
    rows[:, :4] = np.concatenate([scale, smallest - largest - total], axis=-1).astype("<f4").view("<u2")
    rows[:, 4 : 4 + vocab] = np.clip(np.rint((logits - smallest) * inverse), 0, _STEPS)
    return rows
