"""The peer `llama-quantize --imatrix`: it reads our importance matrices, uses them, and its files load in llama.cpp."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.llama_quantize import QuantizeFailed, installed_library, quantize, why_unavailable
from exporters.gguf import GgufExporter
from exporters.gguf.container.reader import GgufFile
from exporters.gguf.imatrix.file import read_imatrix, write_imatrix
from exporters.interface import ExportOptions
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.worker.llama_cpp_bindings import load_library
from tests.support import make_run

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

# The tiny model's types by preset, as llama.cpp's rules for mixes have them; its tied embedding is the output head.
PRESETS = {
    "Q4_0": {"Q4_0": 35, "Q6_K": 1},
    "Q8_0": {"Q8_0": 36},
    "Q2_K": {"Q2_K": 20, "Q3_K": 15, "Q6_K": 1},
    "Q3_K_M": {"Q3_K": 20, "Q4_K": 13, "Q5_K": 2, "Q6_K": 1},
    "Q4_K_M": {"Q4_K": 31, "Q6_K": 5},
    "Q5_K_M": {"Q5_K": 31, "Q6_K": 5},
    "Q6_K": {"Q6_K": 36},
    "IQ4_XS": {"IQ4_XS": 35, "Q6_K": 1},
}
SLOW = ("Q8_0", "Q5_K_M", "Q6_K", "Q3_K_M")


@pytest.fixture(scope="module")
def f32_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peer")
    run = make_run(tiny_llama, folder / "run", "gguf:q8_0")
    return GgufExporter().export(run, folder / "model.gguf", ExportOptions(dtype="f32", log=str))


@pytest.fixture(scope="module")
def imatrix_file(f32_file: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = GgufFile.open(f32_file).tensors.values()
    vectors = {t.name: rng.random(t.shape[1]).astype(np.float32) ** 4 for t in tensors if len(t.shape) == 2}
    del vectors["token_embd.weight"]
    return write_imatrix(f32_file.parent / "imatrix.gguf", vectors, 5120, 512, ["speeches.txt"])


def test_llama_quantize_reads_our_file(imatrix_file: Path) -> None:
    script = Path(__file__).parent / "llama_imatrix_loader.py"
    common = installed_library().parent / "libllama-common.so"
    command = [sys.executable, str(script), str(common), str(imatrix_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["accepted"]
    assert document["has_metadata"]
    assert not document["is_legacy"]
    assert (document["chunk_count"], document["chunk_size"]) == (10, 512)
    ours = read_imatrix(imatrix_file)
    assert set(document["entries"]) == set(ours)
    for name, entry in document["entries"].items():
        assert entry["counts"] == [5120]
        np.testing.assert_allclose(np.float32(entry["sums"]) / np.float32(5120), ours[name], rtol=2**-23)


@pytest.mark.parametrize("preset", [pytest.param(p, marks=pytest.mark.full) if p in SLOW else p for p in PRESETS])
def test_every_block_is_what_libggml_makes_of_the_same_importance(
    preset: str, f32_file: Path, imatrix_file: Path, tmp_path: Path
) -> None:
    """The types are llama.cpp's mix; the bytes those of `ggml_quantize_chunk` in the build that we run files with."""
    out, imatrix = tmp_path / "out.gguf", read_imatrix(imatrix_file)
    cost = quantize(f32_file, out, preset, imatrix)
    assert cost.wall_s > 0
    assert 0 < cost.peak_mb < 300
    source, made = GgufFile.open(f32_file), GgufFile.open(out)
    types = Counter(t.ggml_type.name for t in made.tensors.values() if len(t.shape) == 2)
    assert types == PRESETS[preset]
    quantize_chunk = load_library().ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    for tensor in made.tensors.values():
        if len(tensor.shape) != 2:
            continue
        weights = np.ascontiguousarray(source.raw(tensor.name)).view(np.float32)
        vector = imatrix.get(tensor.name)
        expected = np.empty(tensor.nbytes, dtype=np.uint8)
        pointer = None if vector is None else vector.ctypes.data
        size = quantize_chunk(
            tensor.ggml_type.number, weights.ctypes.data, expected.ctypes.data, 0, *tensor.shape, pointer
        )
        assert size == tensor.nbytes
        assert np.array_equal(made.raw(tensor.name).reshape(-1), expected), tensor.name
    with LlamaCppRuntime().open(out) as session:
        logits = session.logits(np.arange(2, 34, dtype=np.int32))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("preset", ["Q4_0", "Q2_K"])
def test_the_importance_changes_the_codes(preset: str, f32_file: Path, imatrix_file: Path, tmp_path: Path) -> None:
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    quantize(f32_file, plain, preset)
    quantize(f32_file, weighted, preset, read_imatrix(imatrix_file))
    one, other = GgufFile.open(plain), GgufFile.open(weighted)
    for name in ("blk.0.attn_q.weight", "blk.4.ffn_down.weight"):
        same = other.tensors[name].ggml_type is one.tensors[name].ggml_type
        assert not same or not np.array_equal(one.raw(name), other.raw(name))
    assert np.array_equal(one.raw("token_embd.weight"), other.raw("token_embd.weight"))


def test_threads_change_nothing(f32_file: Path, tmp_path: Path) -> None:
    for threads in (1, 2):
        quantize(f32_file, tmp_path / f"{threads}.gguf", "Q4_K_M", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_refusals_say_what_llama_cpp_says(f32_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(QuantizeFailed, match="unknown preset 'Q9_9'"):
        quantize(f32_file, out, "Q9_9")
    with pytest.raises(QuantizeFailed, match="requires an imatrix"):
        quantize(f32_file, out, "IQ2_XXS")
    with pytest.raises(QuantizeFailed, match="imatrix size 7 is different from tensor size 256"):
        quantize(f32_file, out, "Q4_0", {"blk.0.attn_q.weight": np.ones(7, dtype=np.float32)})
    assert not out.exists()
