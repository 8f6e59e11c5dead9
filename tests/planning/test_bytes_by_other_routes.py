"""A budget is kept to the byte where a graph is traced, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from signround_edge import api
from signround_edge.errors import UserError
from signround_edge.planning.found_plan import FoundPlan
from signround_edge.run_directory import RunDirectory
from signround_edge.tuning.settings import TuningSettings
from tests.support import SIZES as SMALL
from tests.support import TOKENS, save_random_model

SETTINGS = TuningSettings(steps=0, samples=1, seqlen=16)
NOTES = ("README.md", "signround_edge.json")  # what no runtime reads
WORDS = {"vocab_size": 3072}
MOE = transformers.Qwen3MoeConfig(
    **{**SMALL, **WORDS}, **TOKENS, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2,
    decoder_sparse_step=1, norm_topk_prob=True,
)  # fmt: skip
OTHERS = {
    "gpt_neox": transformers.GPTNeoXConfig(
        **WORDS, **TOKENS, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2
    ),
    "gpt2": transformers.GPT2Config(**WORDS, **TOKENS, n_embd=64, n_head=4, n_layer=2),
    "mamba2": transformers.Mamba2Config(
        **WORDS, **TOKENS, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16, n_groups=1
    ),
    "lfm2_moe": transformers.Lfm2MoeConfig(
        **{**SMALL, **WORDS}, **TOKENS, layer_types=["conv", "full_attention"], num_dense_layers=1, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=64,
    ),
    "gemma3n": transformers.Gemma3nTextConfig(
        **{**SMALL, **WORDS}, **TOKENS, head_dim=16, vocab_size_per_layer_input=3072, hidden_size_per_layer_input=16,
        laurel_rank=16, num_kv_shared_layers=0, altup_num_inputs=2, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
    ),
}  # fmt: skip


def plan(model: Path, cache: Path, **options: Any) -> FoundPlan:
    return api.plan(model, **{"samples": 1, "seqlen": 16, "cache": cache, "context": 512, **options})


def quantized(model: Path, found: FoundPlan, out: Path) -> RunDirectory:
    found.planned.save(out / "plan.json")
    return api.quantize(model, None, out / "run", plan=out / "plan.json", settings=SETTINGS, source_check="off")


def written_folder(run: RunDirectory, out: Path, lines: list[str]) -> int:
    folder = api.export(run, "onnx", out, progress=lines.append).path
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name not in NOTES)


@pytest.mark.full
def test_a_traced_folder_has_the_planned_bytes_and_its_experts_stay_one_node(tiny_llama: Path, tmp_path: Path) -> None:
    model = save_random_model(MOE, tmp_path / "model", tokenizer_from=tiny_llama)
    options = {"format": "onnx", "cache": tmp_path / "cache"}
    found = plan(model, target_size="740k", pin="lm_head=w4g64-asym", **options)
    assert found.exact
    traces = list((tmp_path / "cache" / "graphs").rglob("graph.onnx"))
    assert len(traces) == 1
    before = traces[0].stat().st_mtime_ns
    of_layer = [
        {kind for name, kind in found.planned.types.items() if f"layers.{layer}.mlp.experts" in name}
        for layer in range(2)
    ]
    assert all(len(kinds) == 1 and next(iter(kinds)).startswith("w4") for kinds in of_layer)
    lines: list[str] = []
    assert written_folder(quantized(model, found, tmp_path), tmp_path / "out", lines) == found.planned.file_bytes
    assert any("2 layers of experts are a QMoE each" in line for line in lines)
    # A second budget reads what the first one has kept.
    more = plan(model, target_size="770k", **options)
    assert [path.stat().st_mtime_ns for path in traces] == [before]
    assert more.planned.file_bytes > found.planned.file_bytes


def test_a_traced_folder_has_the_planned_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    model = save_random_model(OTHERS["gpt2"], tmp_path / "model", tokenizer_from=tiny_llama)
    options = {"format": "onnx", "types": "w4g32-asym,w8g32-asym", "cache": tmp_path / "cache"}
    found = plan(model, target_size=860_000, **options)
    assert found.exact
    assert len(set(found.planned.types.values())) == 2
    assert written_folder(quantized(model, found, tmp_path), tmp_path / "out", []) == found.planned.file_bytes


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_traced_folders_of_other_models_have_the_planned_bytes(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = save_random_model(OTHERS[name], tmp_path / "model", tokenizer_from=tiny_llama)
    options = {"format": "onnx", "types": "w4g32-asym,w4g64-asym,w8g32-asym", "cache": tmp_path / "cache"}
    sizes = sorted(size for size, _ in plan(model, target_size="90M", **options).frontier)
    for number, share in enumerate((0.3, 0.7)):
        found = plan(model, target_size=int(sizes[0] + share * (sizes[-1] - sizes[0])), **options)
        assert found.exact
        (tmp_path / str(number)).mkdir()
        run = quantized(model, found, tmp_path / str(number))
        assert written_folder(run, tmp_path / str(number) / "out", []) == found.planned.file_bytes


@pytest.mark.full
def test_types_that_make_no_node_are_planned_where_they_are_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    """Then all experts compute for every token, and the graph is another one."""
    model = save_random_model(MOE, tmp_path / "model", tokenizer_from=tiny_llama)
    found = plan(model, tmp_path / "cache", format="onnx", target_size="9M", pin="experts.*down=w8g32-asym")
    kinds = {kind for name, kind in found.planned.types.items() if "experts" in name and "down" in name}
    assert kinds == {"w8g32-asym"}
    lines: list[str] = []
    assert written_folder(quantized(model, found, tmp_path), tmp_path / "out", lines) == found.planned.file_bytes
    assert any("all 4 experts of a layer for each token" in line for line in lines)


def test_a_template_for_a_graph_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--template is for --format gguf here"):
        plan(tiny_llama, tmp_path, format="onnx", target_size="3M", template=tmp_path / "model.onnx")
