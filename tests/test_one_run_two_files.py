"""One tuning run feeds GGUF and ONNX: the same integers and scales in both, and both generate what torch generates.

The files are read with the formats' own packages (gguf, onnx), not with our readers.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.numpy_helper import to_array

from exporters.interface import ExportOptions
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.plugins import exporters
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

PROMPTS = ["The state of the union is", "My fellow citizens, we", "In the year 1865, Congress"]
# Parameters whose rows llama.cpp does not permute, with their names in GGUF.
SAME_ORDER = {
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "self_attn.o_proj": "attn_output",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_text: Path) -> RunDirectory:
    settings = TuningSettings(steps=4, samples=8, seqlen=32)
    out = tmp_path_factory.mktemp("two") / "run"
    return quantize(tiny_llama, parse_scheme("gguf:q4_0,onnx:w4g32"), out, str(calibration_text), settings)


@pytest.fixture(scope="module")
def onnx_folder(run: RunDirectory) -> Path:
    return exporters()["onnx"].export(run, run.path.parent / "onnx", ExportOptions(log=lambda line: None))


def gguf_q4_0(raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """(codes [N, K], scales [N, K/32]) of block_q4_0: fp16 d, then 16 bytes, low nibbles first half, high second."""
    blocks = raw.reshape(raw.shape[0], -1, 18)
    nibbles = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return nibbles.reshape(raw.shape[0], -1), blocks[..., :2].copy().view(np.float16)[..., 0]


def onnx_operands(folder: Path) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]]:
    """Parameter → (codes [N, K], scales [N, K/g], packed zero points) of the 4-bit MatMulNBits that hold one alone."""
    model = onnx.load(folder / "model.onnx")
    initializers = {i.name: i for i in model.graph.initializer}
    found = {}
    for tensor in json.loads((folder / "signround_edge.json").read_text())["tensors"]:
        if tensor["op"] != "MatMulNBits" or len(tensor["parameters"]) > 1:
            continue
        packed, scales, zeros = (
            to_array(initializers[tensor["initializers"][role]]) for role in ("weight", "scales", "zero_points")
        )
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
        found[tensor["parameters"][0]] = (codes, scales.reshape(packed.shape[0], -1), zeros)
    return found


def test_both_files_hold_the_same_integers_and_scales(run: RunDirectory, onnx_folder: Path) -> None:
    path = exporters()["gguf"].export(run, run.path.parent / "model.gguf", ExportOptions(log=lambda line: None))
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    operands = onnx_operands(onnx_folder)
    compared = 0
    for layer in range(len([p for p in run.manifest.parts if p != "outside"])):
        for ours, theirs in SAME_ORDER.items():
            codes, scales = gguf_q4_0(tensors[f"blk.{layer}.{theirs}.weight"].data)
            onnx_codes, onnx_scales, zeros = operands[f"model.layers.{layer}.{ours}.weight"]
            assert np.array_equal(codes, onnx_codes)
            assert np.array_equal(scales.astype(np.float32), onnx_scales)
            assert np.all(zeros == 0x88)
            compared += codes.size
    assert compared > 1_000_000


def assert_greedy(run: RunDirectory, prompt: list[int], generated: list[int]) -> None:
    """Every generated token is the one that transformers, with the run's weights, would choose after those before it.

    A runtime's rounding may decide between two tokens that are all but equally likely.
    """
    assert len(generated) >= 4
    with torch.no_grad():
        logits = load_run_model(run)(input_ids=torch.tensor([prompt + generated])).logits[0]
    choices = logits[len(prompt) - 1 : -1]
    chosen = choices.gather(-1, torch.tensor(generated).unsqueeze(-1)).squeeze(-1)
    assert float((choices.amax(-1) - chosen).max()) < 0.02


@pytest.mark.parametrize("prompt", PROMPTS)
def test_llama_cpp_generates_what_transformers_generates(prompt: str, run: RunDirectory) -> None:
    path = run.path.parent / "model-f16.gguf"
    if not path.exists():
        exporters()["gguf"].export(run, path, ExportOptions(dtype="f16", log=lambda line: None))
    expected_tokens = list(load_tokenizer(run.config_dir)(prompt)["input_ids"])
    session = LlamaCppRuntime().open(path)
    try:
        tokens = session.tokenize(prompt)
        assert tokens == expected_tokens
        assert_greedy(run, tokens, list(map(int, session.generate(tokens, 24))))
    finally:
        session.close()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_onnxruntime_genai_generates_what_transformers_generates(
    prompt: str, run: RunDirectory, onnx_folder: Path
) -> None:
    import onnxruntime_genai as og

    model = og.Model(str(onnx_folder))
    tokens = list(load_tokenizer(run.config_dir)(prompt)["input_ids"])
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + 24, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    assert_greedy(run, tokens, list(map(int, generator.get_sequence(0)))[len(tokens) :])
