"""What a traced graph keeps between calls, of architectures that keep more than keys and values of one size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from exporters.onnx.artifact.reader import open_artifact
from exporters.onnx.routes.traced_cache import WithStates, check_states, find_states
from runtime_tests.verify import verify
from signround_edge.demo import evaluation_text_path
from signround_edge.errors import UserError
from tests.exporters.onnx.conftest import Exported, export
from tests.exporters.onnx.test_onnx_export import assert_weights_equal, expected_tokens, generated, mean_kl
from tests.exporters.onnx.test_onnx_tracing import COMMON, TOKENS, MakeRun, logits_in_parts, logits_of, reference_logits

full = pytest.mark.full
ATTENTION = {**COMMON, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TWO = {**ATTENTION, "num_hidden_layers": 2}
MAMBA = {"state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1, "conv_kernel": 4, "chunk_size": 16}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
MLA = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXED = ["linear_attention", "full_attention"]

FAMILIES = {
    "lfm2_moe": transformers.Lfm2MoeConfig(
        **TWO, **EXPERTS, layer_types=["conv", "full_attention"], conv_L_cache=3, num_experts=4, num_dense_layers=1,
    ),
    "mamba2": transformers.Mamba2Config(**COMMON, **MAMBA, hidden_size=64, num_hidden_layers=1, expand=2),
    "qwen3_next": transformers.Qwen3NextConfig(
        **TWO, **DELTA, **EXPERTS, head_dim=32, layer_types=MIXED, num_experts=4, shared_expert_intermediate_size=64,
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**{**ATTENTION, **EXPERTS}, num_hidden_layers=1, num_experts=4),
    "deepseek_v2": transformers.DeepseekV2Config(
        **{**ATTENTION, **MLA, **EXPERTS, "num_key_value_heads": 4}, num_hidden_layers=2, n_routed_experts=4,
        first_k_dense_replace=1, n_shared_experts=1,
    ),
    "olmo3-window": transformers.Olmo3Config(**TWO, sliding_window=8, layer_types=["sliding_attention"] * 2),
    "llama4": transformers.Llama4TextConfig(
        **TWO, head_dim=16, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=64,
    ),
}  # fmt: skip
BY_DEFAULT = ("lfm2_moe",)  # convolutions, keys and values, experts
KINDS = {
    "lfm2_moe": {"conv", "key", "value"},
    "mamba2": {"conv", "recurrent"},
    "qwen3_next": {"conv", "recurrent", "key", "value"},
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in BY_DEFAULT else full) for name in FAMILIES]
)
def named(
    request: pytest.FixtureRequest, make_random_run: MakeRun, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Exported]:
    run = make_random_run(FAMILIES[request.param], "onnx:w4g32")
    return request.param, Exported(run, export(run, tmp_path_factory.mktemp("traced") / "out", ort_format=True))


def test_a_text_gives_the_same_logits_as_in_torch_whole_and_in_parts(named: tuple[str, Exported]) -> None:
    _, traced = named
    tokens = TOKENS[:2]
    reference = reference_logits(traced.run, tokens)
    assert reference.std() > 0.1
    assert mean_kl(reference, logits_of(traced.folder, tokens)) <= 1e-9
    assert mean_kl(reference, logits_in_parts(traced.folder, tokens, [9, 8, *[1] * 20])) <= 1e-9
    one = tokens[:1, :5]
    assert mean_kl(reference_logits(traced.run, one), logits_in_parts(traced.folder, one, [1] * 5)) <= 1e-9


def test_states_have_the_names_of_onnxruntime_genai_which_generates_what_torch_generates(
    named: tuple[str, Exported],
) -> None:
    name, traced = named
    inputs = [str(value.name) for value in open_artifact(traced.folder).graph.inputs][2:]
    assert {i.rpartition(".")[2] for i in inputs} == KINDS.get(name, {"key", "value"})
    assert generated(traced.folder, [5, 6, 7, 8], 12) == expected_tokens(traced.run, [5, 6, 7, 8], 12)


def test_every_weight_is_the_runs_also_filters_of_convolutions_and_experts(named: tuple[str, Exported]) -> None:
    family, traced = named
    assert_weights_equal(traced.run, traced.folder)
    stored = {str(n.name) for n in open_artifact(traced.folder).quantized_nodes()}
    for name in traced.run.names():
        if traced.run.is_quantized(name):
            path = f"/{name.removesuffix('.weight').replace('.', '/')}/"
            if "/experts/" in path and family != "llama4":  # whose experts are no QMoE
                path = f"{path.partition('/experts/')[0]}/experts/QMoE"
            assert any(node.startswith(path) for node in stored), name


def test_the_ort_file_holds_every_weight_too_and_keeps_states(named: tuple[str, Exported]) -> None:
    """ONNX Runtime folds the filters of convolutions into another shape unless it is told not to."""
    _, traced = named
    file = traced.folder / "model.ort"
    assert_weights_equal(traced.run, file)
    report = verify(traced.run, [file], evaluation_text_path(), n_ctx=64, max_windows=1, log=str)
    assert [(r.status, r.gate, r.reason) for r in report.runtimes] == [("pass", "exact", None)]


def test_a_model_that_forgets_its_states_is_refused_with_the_way_out() -> None:
    """transformers' scan of Mamba starts at zero, whatever the state."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=1, state_size=8)
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(UserError, match=r"MambaForCausalLM .* export with --no-cache"):
        check_states(WithStates(model, find_states(model)).eval())


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        ("onnx:w8g32", {}, "QMoE computes exactly with 4 bits only, and they have 8 and 8"),
        ("onnx:w4g32", {"layout": "transformers.js"}, "QMoE on WebGPU has no zero points"),
        ("onnx:w4g32", {"operators": "qdq"}, "--operators qdq writes the standard operators"),
    ],
)
def test_cost_of_experts_that_are_no_qmoe_is_said(
    make_random_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    options: dict[str, str],
    reason: str,
) -> None:
    lines: list[str] = []
    run = make_random_run(FAMILIES["qwen3_moe"], scheme)

    def stop(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("far enough")

    monkeypatch.setattr(torch.onnx, "export", stop)
    with pytest.raises(UserError, match="far enough"):
        export(run, tmp_path / "out", log=lines.append, **options)
    line = next(line for line in lines if "computes all 4 experts of a layer for each token" in line)
    assert line.endswith(f"({reason})")
