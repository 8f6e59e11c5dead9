"""general.file_type, which people see as the type of a file, is what llama.cpp's quantizer writes for the preset."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, Qwen2Config

from benchmarks import llama_quantize
from benchmarks.float_gguf import write_float_gguf
from exporters.gguf.blocks.ggml_types import FILE_TYPES
from exporters.gguf.blocks.packing import LAYOUTS
from exporters.gguf.container.reader import GgufFile
from exporters.gguf.reader import read_metadata
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.gguf_presets import GGUF_PRESETS
from signround_edge.schemes.scheme import PRESET_ALIASES, parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from tests.exporters.gguf.conftest import export
from tests.support import make_run, save_random_model

RunOf = Callable[..., RunDirectory]

_SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "llama": LlamaConfig(**_SIZES, num_key_value_heads=2, vocab_size=600),
    # No K-quant divides its rows, so all of them fall back; llama.cpp names the file by the preset all the same.
    "rows_of_192": Qwen2Config(**{**_SIZES, "hidden_size": 192}, num_key_value_heads=4, vocab_size=600),
}
NEAREST = TuningSettings(steps=0, samples=2, seqlen=16, batch_size=2, compute_dtype="float32")
needs_llama_quantize = pytest.mark.skipif(
    llama_quantize.why_unavailable() is not None, reason=str(llama_quantize.why_unavailable())
)


@pytest.fixture(scope="session")
def model_of(byte_level_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model's folder, in which f32.gguf lies too."""

    @functools.cache
    def make(name: str) -> Path:
        folder = save_random_model(MODELS[name], tmp_path_factory.mktemp(name), byte_level_folder)
        write_float_gguf(folder, folder / "f32.gguf")
        return folder

    return make


# One of each group; the numbers of all others are compared below, and in the full tests in files too.
_QUICK = ("q4_0", "q8_0", "q4_k_m", "q2_k", "q3_k_l", "q6_k", "iq4_xs", "iq3_s", "iq2_xxs", "mxfp4_moe")
assert set(_QUICK) <= set(GGUF_PRESETS)


@needs_llama_quantize
@pytest.mark.parametrize(
    ("name", "preset"),
    [pytest.param("llama", preset, marks=() if preset in _QUICK else pytest.mark.full) for preset in GGUF_PRESETS]
    + [("rows_of_192", "q4_k_m")]
    + [pytest.param("rows_of_192", preset, marks=pytest.mark.full) for preset in GGUF_PRESETS if preset != "q4_k_m"],
)
def test_it_is_that_of_llama_quantize(name: str, preset: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_of(name)
    floats = GgufFile.open(model / "f32.gguf")
    importance = {t.name: np.ones(t.shape[-1], np.float32) for t in floats.tensors.values() if len(t.shape) > 1}
    llama_quantize.quantize(floats.path, tmp_path / "theirs.gguf", preset.upper(), importance)
    ours = export(make_run(model, tmp_path / "run", f"gguf:{preset}"), tmp_path / "ours.gguf")
    theirs = read_metadata(tmp_path / "theirs.gguf")["general.file_type"]
    assert read_metadata(ours)["general.file_type"] == theirs == llama_quantize.FTYPES[preset.upper()]


def test_the_number_of_every_preset_is_llama_quantizes() -> None:
    assert {preset: FILE_TYPES[preset] for preset in GGUF_PRESETS} == {
        preset: llama_quantize.FTYPES[preset.upper()] for preset in GGUF_PRESETS
    }


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_floats_are_called_floats(dtype: str, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(MODELS["llama"], "gguf:q4_k_m")
    metadata = read_metadata(export(run, tmp_path / "a.gguf", dtype=dtype))
    assert metadata["general.file_type"] == FILE_TYPES[dtype]


@pytest.mark.parametrize(
    ("scheme", "preset"),
    [
        ("onnx:w4g32", "q4_0"),
        ("onnx:w8g32", "q8_0"),
        ("onnx:w4g32,gguf:q4_0", "q4_0"),
        ("gguf:q4_k", "q4_k_m"),
        ("gguf:q3_k", "q3_k_m"),
    ],
)
def test_schemes_that_name_no_preset_in_full(scheme: str, preset: str, run_of: RunOf, tmp_path: Path) -> None:
    metadata = read_metadata(export(run_of(MODELS["llama"], scheme), tmp_path / "a.gguf"))
    assert metadata["general.file_type"] == FILE_TYPES[preset]


@pytest.mark.parametrize(
    ("overrides", "embedding", "preset"),
    [
        (("attn_v=Q6_K",), None, "q4_k_s"),  # most weights are still the preset's
        (("blk=Q6_K",), None, "q6_k"),
        (("blk=Q5_K",), None, "q5_k_m"),
        (("ffn=IQ4_NL",), None, "iq4_nl"),
        ((), "Q8_0", "q4_k_s"),
    ],
)
def test_types_given_one_by_one(
    overrides: tuple[str, ...],
    embedding: str | None,
    preset: str,
    model_of: Callable[[str], Path],
    tmp_path: Path,
    calibration_text: Path,
) -> None:
    scheme = parse_scheme("gguf:q4_k_s").with_overrides(overrides).with_outside_types(embedding, None)
    run = quantize(model_of("llama"), scheme, tmp_path / "run", str(calibration_text), NEAREST)
    metadata = read_metadata(export(run, tmp_path / "a.gguf"))
    assert metadata["general.file_type"] == FILE_TYPES[preset]


def test_every_block_type_has_a_file_type_of_its_name() -> None:
    assert {PRESET_ALIASES.get(name.lower(), name.lower()) for name in LAYOUTS} <= set(FILE_TYPES)
