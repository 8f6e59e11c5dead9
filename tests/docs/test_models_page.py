"""docs/models.md: the ways are those of the family tables, and the refusals read as they are quoted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    T5Config,
)

from exporters.gguf import GgufExporter
from exporters.gguf.mmproj.table import TOWERS
from exporters.interface import ExportOptions
from exporters.onnx import OnnxExporter
from exporters.onnx.builder_classes import BUILDER_CLASSES
from signround_edge.cli import main
from signround_edge.errors import UserError
from signround_edge.tuning import source_check
from tests.docs.documents import code_spans, parse, section, table_rows, text_of
from tests.exporters.gguf.family_table import FAMILIES, REFUSED
from tests.support import SIZES, TOKENS, make_run, save_random_model

PAGE = text_of("docs/models.md")
OPT = OPTConfig(hidden_size=64, ffn_dim=64, word_embed_proj_dim=64, num_hidden_layers=1, num_attention_heads=2)
FIRST = ("gpt2_activation", "falcon_alibi")  # of the refused, those that are always tried


def refusal(config: PretrainedConfig, exporter: GgufExporter | OnnxExporter, folder: Path, scheme: str) -> str:
    """What an exporter says of a small random model of that config."""
    run = make_run(save_random_model(config, folder / "model"), folder / "run", scheme)
    with pytest.raises(UserError) as refused:
        exporter.export(run, folder / "out", ExportOptions(log=lambda line: None))
    return str(refused.value)


def as_pattern(quoted: str) -> str:
    """A quoted sentence as a regular expression: … stands for anything."""
    return ".+".join(re.escape(part) for part in quoted.split("…"))


def quoted_blocks(heading: str) -> list[str]:
    """The sentences quoted in the fenced blocks of a section, each in one line."""
    return [" ".join(block.text.split()) for block in parse(section(PAGE, heading))]


def test_the_models_with_images_are_those_of_the_table() -> None:
    rows = table_rows(section(PAGE, "## Images in llama.cpp"))
    assert {name for row in rows for name in code_spans(row[0]) if name != "model_type"} == set(TOWERS)


def test_the_built_in_families_are_those_that_the_refusal_lists(tmp_path: Path) -> None:
    said = refusal(OPTConfig(**{**OPT.to_dict(), "vocab_size": 128, **TOKENS}), GgufExporter(), tmp_path, "gguf:q4_0")
    (quoted,) = quoted_blocks("## What GGUF refuses")
    assert re.fullmatch(as_pattern(quoted), said)
    ways = {code_spans(row[0])[0]: row[2] for row in table_rows(section(PAGE, "## Which way it goes")) if "`" in row[0]}
    listed = re.search(r"there is for ([^)]*)\)", said)
    assert listed is not None
    assert ways == dict.fromkeys(listed[1].split(", "), "built in")


def test_the_ways_into_onnx() -> None:
    configs = {row.config.model_type: row.config for row in FAMILIES.values()}
    rows = [row for row in table_rows(section(PAGE, "## Which way it goes")) if "`" in row[0]]
    assert {code_spans(row[0])[0] for row in rows} == set(configs)
    for name, _, _, way in rows:
        config = configs[code_spans(name)[0]]
        known = class_of(config) in BUILDER_CLASSES and not hasattr(config, "num_experts_per_tok")
        assert way == ("builder" if known else "traced"), name


def class_of(config: PretrainedConfig) -> str:
    """The entry `architectures` that transformers writes for a causal language model of that config."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.full) for n in REFUSED])
def test_what_llama_cpp_does_not_compute_reads_as_quoted(name: str, tmp_path: Path) -> None:
    config = REFUSED[name][0]
    rows = table_rows(section(PAGE, "## What GGUF refuses"))
    quoted = {text: [config.model_type] if types == "all" else code_spans(types) for types, text in rows}
    said = refusal(config, GgufExporter(), tmp_path, "gguf:q4_0")
    fits = [sentence for sentence in quoted if re.fullmatch(as_pattern(sentence), said.partition("; ")[0])]
    assert len(fits) == 1, said
    assert config.model_type in quoted[fits[0]]
    assert said.endswith("as --template")


def test_what_quantize_refuses_reads_as_quoted(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quoted = [row[1] for row in table_rows(section(PAGE, "## What `quantize` takes"))]
    gptq = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    odd = LlamaConfig(**{**SIZES, "hidden_size": 40, "vocab_size": 3072}, head_dim=32, **TOKENS)
    weights = load_file(tiny_llama / "model.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    fp8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    in_fp8 = {**weights, up: weights[up].to(torch.float8_e4m3fn), f"{up}_scale": torch.ones(1)}
    head = {"tie_word_embeddings": False, "architectures": ["LlamaForSequenceClassification"]}
    own = {"model_type": "unknown", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    folders = [
        config_only(T5Config(), tmp_path / "t5", tiny_llama),
        config_only(gptq, tmp_path / "gptq", tiny_llama),
        changed(tiny_llama, tmp_path / "int8", {**weights, up: weights[up].to(torch.int8)}),
        changed(tiny_llama, tmp_path / "fp8", in_fp8, quantization_config=fp8),
        changed(tiny_llama, tmp_path / "own", weights, **own),
        changed(tiny_llama, tmp_path / "compiled", {f"_orig_mod.{name}": t for name, t in weights.items()}),
        shutil.copytree(tiny_llama, tmp_path / "adapter"),
        changed(
            tiny_llama, tmp_path / "lora", {n.replace("q_proj.", "q_proj.base_layer."): t for n, t in weights.items()}
        ),
        changed(tiny_llama, tmp_path / "reward", weights, **head),
        changed(tiny_llama, tmp_path / "twice", {**weights, up.removeprefix("model."): weights[up] * 2}),
        tiny_llama,
    ]
    (tmp_path / "adapter/model.safetensors").rename(tmp_path / "adapter/adapter_model.safetensors")
    pickle = config_only(LlamaConfig(), tmp_path / "pickle", tiny_llama)
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    folders += [pickle, save_random_model(odd, tmp_path / "odd", tokenizer_from=tiny_llama)]
    monkeypatch.setattr(source_check, "LIMIT", 1e-9)  # below the noise of f32: tiny-llama fails the source check
    for sentence, folder in zip(quoted, folders, strict=True):
        arguments = ["--scheme", "gguf:q4_0", "-o", tmp_path / "run", "--steps", 0, "--samples", 1, "--seqlen", 8]
        result = CliRunner().invoke(main, ["quantize", str(folder), *map(str, arguments)])
        assert result.exit_code == 2
        assert re.search(as_pattern(sentence), result.stderr), result.stderr


def changed(model: Path, folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """A copy of a model folder with other weights, and other settings in its config."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_only(config: PretrainedConfig, folder: Path, tiny_llama: Path) -> Path:
    """A model folder with that config, and weights and tokenizer of another model."""
    shutil.copytree(tiny_llama, folder)
    config.save_pretrained(folder)
    return folder
