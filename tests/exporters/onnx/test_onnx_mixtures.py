"""Mixtures of experts as one QMoE a layer: the run's integers, the model's logits, and what is no QMoE."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from exporters.onnx import export as export_module
from exporters.onnx.artifact.check import check_bindings
from exporters.onnx.artifact.reader import Artifact, open_artifact, read_sidecar, read_tensors
from exporters.onnx.bindings import bits_attribute
from exporters.onnx.packing import pack_bits
from exporters.onnx.routes.traced_mixtures import SwiGlu, mixture_of, swiglu_of
from exporters.onnx.run_weights import RunWeights
from runtime_tests.runtimes.onnx_experts import dequantize_experts
from runtime_tests.worker.onnx_dequantize import run_node_model
from signround_edge.errors import CheckFailed
from signround_edge.model.experts import Expert, Experts
from tests.exporters.onnx.conftest import Exported, export
from tests.exporters.onnx.test_onnx_export import assert_weights_equal, expected_tokens, generated, mean_kl
from tests.exporters.onnx.test_onnx_tracing import COMMON, TOKENS, MakeRun, logits_in_parts, logits_of, reference_logits

full = pytest.mark.full
SIZES = {
    **COMMON, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3 = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=96, num_experts=4)
# Router: of the chosen ones; of all, not made one again; sigmoid with a bias for the choice and groups.
FAMILIES = {
    "gpt_oss": (
        transformers.GptOssConfig(**SIZES, num_local_experts=4, layer_types=["full_attention"]),
        "onnx:w4g16-asym",
    ),
    "qwen3_moe": (QWEN3, "onnx:w4g32"),
    "glm4_moe": (
        transformers.Glm4MoeConfig(
            **SIZES, moe_intermediate_size=64, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=0,
            routed_scaling_factor=1.5,
        ),
        "gguf:q4_0,onnx:w4g32",
    ),
}  # fmt: skip
BY_DEFAULT = ("gpt_oss",)  # biases, a limit, zero points


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in BY_DEFAULT else full) for name in FAMILIES]
)
def mixture(
    request: pytest.FixtureRequest, make_random_run: MakeRun, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    run = make_random_run(*FAMILIES[request.param])
    return Exported(run, export(run, tmp_path_factory.mktemp("mixture") / "out", scale_dtype="f16"))


def test_a_layer_is_one_node_with_every_experts_integers(mixture: Exported) -> None:
    artifact = open_artifact(mixture.folder)
    nodes = [node for node in artifact.graph if node.op_type == "QMoE"]
    assert len(nodes) == mixture.run.config["num_hidden_layers"]
    held = {p for b in read_sidecar(mixture.folder).bindings if b.op == "QMoE" for p in b.parameters}
    assert held == {name for name in mixture.run.names() if ".experts." in name}
    assert_weights_equal(mixture.run, mixture.folder)
    assert {kind.partition("-")[0] for _, kind, shape, _ in read_tensors(mixture.folder) if len(shape) == 3} == {"QMoE"}


def test_logits_and_greedy_tokens_are_those_of_torch(mixture: Exported) -> None:
    tokens = TOKENS[:2]
    reference = reference_logits(mixture.run, tokens)
    assert reference.std() > 0.1
    assert mean_kl(reference, logits_of(mixture.folder, tokens)) <= 1e-9
    assert mean_kl(reference, logits_in_parts(mixture.folder, tokens, [9, 8, *[1] * 20])) <= 1e-9
    assert generated(mixture.folder, [5, 6, 7, 8], 12) == expected_tokens(mixture.run, [5, 6, 7, 8], 12)


@pytest.mark.parametrize(("part", "parameter"), [("fc1", r"experts\.2\.gate_proj"), ("fc2", r"experts\.2\.down_proj")])
@pytest.mark.parametrize("role", ["weight", "scales", "zero_points"])
def test_one_changed_value_of_one_expert_is_found_and_the_expert_named(
    mixture: Exported, part: str, parameter: str, role: str
) -> None:
    bindings = [b for b in read_sidecar(mixture.folder).bindings if b.part == part]
    graph = open_artifact(mixture.folder).graph
    check_bindings(graph, bindings, RunWeights(mixture.run, half_scales=True))
    value = graph.initializers[bindings[2].initializers[role]]
    array = value.const_value.numpy().copy()
    array[2, 3, -1] = array[2, 3, -1] ^ 0x10 if role != "scales" else array[2, 3, -1] * 2
    value.const_value = ir.Tensor(array, name=value.name)
    with pytest.raises(CheckFailed, match=parameter):
        check_bindings(graph, bindings, RunWeights(mixture.run, half_scales=True))


@full
def test_a_graph_that_computes_something_else_gives_way_to_all_experts(
    make_random_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(export_module, "LIMIT", -1.0)
    run = make_random_run(QWEN3, "onnx:w4g32")
    out = export(run, tmp_path / "out", log=lines.append)
    assert any("experts as QMoE are not kept (its logits differ" in line for line in lines)
    assert {node.op_type for node in open_artifact(out).quantized_nodes()} == {"MatMulNBits", "GatherBlockQuantized"}
    assert mean_kl(reference_logits(run, TOKENS), logits_of(out, TOKENS)) <= 1e-9


@full
def test_level_4_and_the_ort_format_hold_the_same_integers(make_random_run: MakeRun, tmp_path: Path) -> None:
    run = make_random_run(QWEN3, "onnx:w4g32")
    out = export(run, tmp_path / "out", accuracy_level=4, ort_format=True)
    node = next(node for node in open_artifact(out).graph if node.op_type == "QMoE")
    assert node.attributes["accuracy_level"].as_int() == 4
    assert_weights_equal(run, out)
    assert_weights_equal(run, out / "model.ort")
    kl = mean_kl(reference_logits(run, TOKENS), logits_of(out, TOKENS))
    assert 1e-8 < kl < 1e-2  # inputs in int8


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def clamped_silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (silu, SwiGlu(1.0, 0.0, math.inf)),
        (gpt_oss, SwiGlu(1.702, 1.0, 7.0)),
        (clamped_silu, SwiGlu(1.0, 0.0, 10.0)),
        (lambda gate, up: F.gelu(gate) * up, None),
        (lambda gate, up: F.gelu(gate, approximate="tanh") * up, None),
        (lambda gate, up: F.silu(gate) * up.clamp(-3.0, 3.0), None),  # the gate has no limit
        (lambda gate, up: F.relu(gate) * up, None),
    ],
)
def test_an_activation_is_recognised_by_what_it_computes(combine: Any, expected: SwiGlu | None) -> None:
    assert swiglu_of(Expert(32, 32, combine, gated=True, bias=False)) == expected


def test_experts_that_are_no_qmoe_say_why(make_random_run: MakeRun) -> None:
    def reason(scheme: str, combine: Any = silu) -> str:
        experts = Experts(Expert(64, 96, combine, gated=True, bias=False) for _ in range(4))
        found = mixture_of("model.layers.0.mlp.experts", experts, RunWeights(make_random_run(QWEN3, scheme)))
        assert isinstance(found, str)
        return found

    assert "with 4 bits only" in reason("onnx:w8g32")
    assert "activation" in reason("onnx:w4g32", lambda gate, up: F.gelu(gate) * up)
    assert "one block size, and theirs are 64 and 32" in reason("onnx:w4g64")  # rows of 96 values


@pytest.mark.parametrize(("rows", "cols", "block_size"), [(192, 32, 32), (32, 96, 32), (64, 64, 16), (128, 48, 16)])
@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_the_runtimes_qmoe_gives_each_experts_weights_bit_for_bit(
    part: str, rows: int, cols: int, block_size: int
) -> None:
    """Against the schema's formula, (code − zero point)·scale."""
    random, experts, blocks = np.random.default_rng(rows), 2, cols // block_size
    codes = random.integers(0, 16, (experts, rows, cols), dtype=np.uint8)
    zeros = random.integers(0, 16, (experts, rows, blocks), dtype=np.uint8)
    scales = random.standard_normal((experts, rows, blocks)).astype(np.float16).astype(np.float32)
    expected = (codes.astype(np.float32) - zeros.repeat(block_size, -1)) * scales.repeat(block_size, -1)
    operands = {
        "weight": np.stack([pack_bits(c, 4) for c in codes]),
        "scales": scales,
        "zero_points": np.stack([pack_bits(z, 4) for z in zeros]),
    }
    places = (2, 3, 11) if part == "fc1" else (5, 6, 12)
    inputs: list[ir.Value | None] = [None] * 15
    for (role, array), place in zip(operands.items(), places, strict=True):
        inputs[place] = ir.Value(name=role, const_value=ir.Tensor(array, name=role))
    attributes = {bits_attribute("QMoE"): 4, "block_size": block_size}
    node = ir.node("QMoE", inputs, attributes, domain="com.microsoft", name="experts")
    held = [value for value in inputs if value is not None]
    artifact = Artifact(Path("in memory"), ir.Graph([], node.outputs, nodes=[node], initializers=held))
    found = dict(dequantize_experts(artifact, node, part, run_node_model))
    assert list(found) == [f"experts/{part}/0", f"experts/{part}/1"]
    for weights, right in zip(found.values(), expected, strict=True):
        assert np.array_equal(weights, right)
