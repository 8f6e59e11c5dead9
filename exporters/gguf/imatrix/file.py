"""llama.cpp's importance-matrix files: E[x²] of each matrix's input channels, read in both forms, written in the newer.

GGUF form (general.type "imatrix"): per matrix `<tensor>.in_sum2` f32 [matrices, in], sums of squared inputs, and
`<tensor>.counts` f32 [matrices, 1], tokens seen; several matrices are the experts of one tensor.
Binary form (`.dat`, little endian), up to 2025: int32 entries; per entry int32 length and bytes of the name, int32
calls, int32 values, f32 values; then, in all but the oldest files, int32 calls in all and int32 length and bytes of the
data set's name. It does not say how many experts a tensor has.

Source: `save_imatrix`, `save_imatrix_legacy` of tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and `load_imatrix`
of tools/quantize/quantize.cpp. Sizes are checked against the file before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import F32
from exporters.gguf.container.reader import MAGIC, GgufFile
from exporters.gguf.container.writer import write_file
from exporters.gguf.tensors import f32_tensor
from signround_edge.errors import UserError

Vector = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 256  # four times GGML_MAX_NAME: anything longer is damage
_SMALLEST_ENTRY = 4 + 1 + 4 + 4 + 4  # of the binary form: a name of one letter, one value


def read_imatrix(path: Path) -> dict[str, Vector]:
    """ggml tensor name → E[x²] f32 [in], or [experts, in] where the file counts experts apart.

    As in llama-quantize, an expert that no token reached gets 1 for every channel; a tensor that no token reached at
    all is left out. Vectors of the binary form are E[x²] up to one factor per tensor (calls are counted, not tokens),
    which no search of scales notices; experts lie there end to end, as [experts · in].

    Raises:
        UserError: no importance matrix, damaged, truncated, or with values that no sum of squares has.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of an importance matrix") from error
    found = _read_gguf(path) if start == MAGIC else _Dat(path).read()
    if not found:
        raise _foreign(path, "it holds no tensor that any token reached")
    return found


def write_imatrix(
    path: Path, vectors: Mapping[str, Vector], tokens: int, chunk_size: int, datasets: Sequence[str]
) -> Path:
    """Write the GGUF form, with every key that llama-quantize asks for; whole or not at all.

    Args:
        vectors: ggml tensor name → E[x²] f32 [in] or [experts, in].
        tokens: tokens that E[x²] is a mean over; `in_sum2` is E[x²] times this count, so that readers get E[x²] back
            (to the last bit or next to it) and llama-imatrix can merge the file with others of its kind.
        chunk_size: tokens a calibration sample.
        datasets: names of the calibration texts, at least one.
    Raises:
        UserError: the disk is full or cannot be written.
    """
    assert datasets, "llama-quantize refuses a file without them"
    assert tokens > 0
    writer = _Writer(None, "")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, list(datasets))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, -(-tokens // chunk_size))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, chunk_size)
    tensors = []
    for name in sorted(vectors):
        sums = np.atleast_2d(np.asarray(vectors[name], dtype=np.float32)) * np.float32(tokens)
        counts = np.full((len(sums), 1), tokens, dtype=np.float32)
        tensors += [f32_tensor(name + _SUMS, sums), f32_tensor(name + _COUNTS, counts)]
    return write_file(path, writer, tensors, flag="--save-imatrix")


class _Writer(gguf.GGUFWriter):  # type: ignore[misc]
    """A GGUFWriter for files that describe no model."""

    def add_architecture(self) -> None:
        """An importance matrix has none."""


def _foreign(path: Path, why: str) -> UserError:
    return UserError(f"{path} is no importance matrix ({why}); give a file made by llama-imatrix or --save-imatrix")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is a damaged or truncated importance matrix ({why}); make or download it again")


def _read_gguf(path: Path) -> dict[str, Vector]:
    file = GgufFile.open(path)
    kind = file.get("general.type")
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if kind not in (None, gguf.GGUFType.IMATRIX) or not names:
        raise _foreign(path, f"it is a GGUF file of type {kind or 'model'}, without sums of squared inputs")
    found = {}
    for name in names:
        sums, counts = _f32(file, name + _SUMS), np.rint(_f32(file, name + _COUNTS))
        if sums.size % counts.size:
            raise _damaged(path, f"{name} has {sums.size} sums for {counts.size} counts")
        if not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise _damaged(path, f"counts of {name} are no counts")
        if not counts.any():
            continue
        sums, counts = sums.reshape(counts.size, -1), counts.reshape(-1, 1)
        _check_values(path, name, sums)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)
        found[name] = means[0] if len(means) == 1 else means
    return found


def _f32(file: GgufFile, name: str) -> Vector:
    """A tensor's values, copied out of the file, flat."""
    info = file.tensors.get(name)
    if info is None:
        raise _damaged(file.path, f"tensor {name} is missing")
    if info.ggml_type is not F32 or info.nbytes == 0:
        raise _damaged(file.path, f"tensor {name} holds no 32-bit floats")
    return file.raw(name).reshape(-1).view("<f4").astype(np.float32)


def _check_values(path: Path, name: str, values: Vector) -> None:
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise UserError(
            f"{path}: {name} holds NaN, infinite or negative values, which no mean of squares is; make the importance "
            "matrix again"
        )


class _Dat:
    """A reader of the binary form that refuses to leave the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        size = path.stat().st_size
        if size < 4 + _SMALLEST_ENTRY:
            raise _foreign(path, f"it has {size} bytes")
        self.data = np.memmap(path, mode="r", dtype=np.uint8)

    def read(self) -> dict[str, Vector]:
        """All entries; the whole file must be of this form, since nothing but its form tells it from other files."""
        entries = self._int()
        if not 1 <= entries <= self._left() // _SMALLEST_ENTRY:
            raise _foreign(self.path, "it is neither GGUF nor llama.cpp's older binary form")
        found: dict[str, Vector] = {}
        for number in range(entries):
            # The first entry tells another kind of file from a damaged one.
            problem = _damaged if number else _foreign
            name = self._text(problem, f"the name of entry {number + 1}", longest=_LONGEST_NAME)
            calls, values = self._int(), self._int()
            if calls < 0 or not 1 <= values <= self._left() // 4:
                raise problem(self.path, f"it ends within the values of entry {number + 1}")
            sums = self._take(4 * values).view("<f4").astype(np.float32)
            if name in found:
                raise _damaged(self.path, f"tensor {name} twice")
            _check_values(self.path, name, sums)
            found[name] = sums / np.float32(calls) if calls else sums
        self._trailer()
        return found

    def _trailer(self) -> None:
        """Calls in all and the name of the data set: absent, or whole and followed by nothing."""
        if not self._left():
            return
        self._int()
        if self._left():
            self._text(_damaged, "the name of its data set", longest=self._left())
        if self._left():
            raise _damaged(self.path, f"{self._left()} bytes follow its end")

    def _text(self, problem: Callable[[Path, str], UserError], what: str, longest: int) -> str:
        length = self._int()
        if not 0 <= length <= min(longest, self._left()):
            raise problem(self.path, f"{what} cannot be read")
        try:
            text = bytes(self._take(length)).decode("utf-8")
        except UnicodeDecodeError:
            raise problem(self.path, f"{what} is no text") from None
        return text

    def _int(self) -> int:
        if self._left() < 4:
            raise _damaged(self.path, "it ends too early")
        return int(self._take(4).view("<i4")[0])

    def _take(self, count: int) -> NDArray[np.uint8]:
        piece = self.data[self.position : self.position + count]
        self.position += count
        return np.array(piece)  # a copy, which is aligned

    def _left(self) -> int:
        return len(self.data) - self.position
