"""The files that transformers.js reads beside the graph: config.json, generation_config.json and the tokenizer's.

Read in @huggingface/transformers 4.3.2: src/configs.js (which caches a model_type has), src/models/registry.js (the
classes it knows), src/tokenization_utils.js (chat templates stand in tokenizer_config.json).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporters.onnx.artifact.card import adds_special_tokens
from exporters.onnx.artifact.layouts import Layout
from exporters.onnx.builder_classes import GENAI_CONFIG
from signround_edge.errors import UserError
from signround_edge.model.config import CONFIG_FILE
from signround_edge.run_directory import RunDirectory

MOST_DATA_FILES = 100  # MAX_EXTERNAL_DATA_CHUNKS of src/utils/hub/constants.js
# Decoders of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, src/models/registry.js.
_MODEL_TYPES = """
bloom gpt2 gpt_oss jais gptj gpt_bigcode gpt_neo gpt_neox codegen llama nanochat apertus llama4_text arcee afmoe lfm2
lfm2_moe lfm3 smollm3 exaone olmo olmo2 olmo3 olmo_hybrid mobilellm granite granitemoehybrid cohere cohere2 gemma gemma2
vaultgemma gemma3_text helium glm glm_moe_dsa openelm qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5_text phi phi3
mpt opt mistral mistral4 ministral ministral3 ernie4_5 starcoder2 deepseek_v3 deepseek_v4 falcon falcon_h1 nemotron_h
solar_open stablelm modernbert-decoder hunyuan_v1_dense youtu zaya hrm_text
"""
MODEL_TYPES = frozenset(_MODEL_TYPES.split())
# What a plain decoder with a cache is to it: it asks the graph for shapes, and the config for the number of layers.
_PLAIN = "llama"
_KEY = re.compile(r"past_key_values\.(\d+)\.key")
_GENERATION_CONFIG = "generation_config.json"
_CHAT_TEMPLATE, _TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


def check_cache(graph: ir.Graph) -> None:
    """UserError for a graph that transformers.js cannot feed: it generates with a cache only."""
    names = [str(value.name) for value in graph.inputs]
    if not any(_KEY.fullmatch(name) for name in names):
        raise UserError(
            f"--layout transformers.js: the graph has no key-value cache (inputs {', '.join(names)}), and "
            "transformers.js generates with one only; export it with its cache, or in the other layout"
        )


def write_companions(
    run: RunDirectory, folder: Path, graph: ir.Graph, layout: Layout, log: Callable[[str], None]
) -> None:
    """Make config.json, generation_config.json and tokenizer_config.json of an export what transformers.js wants.

    Args:
        run: where they come from.
        folder: the export, with graph and data files; edited in place.
        graph: what was written.
        layout: of transformers.js.
        log: says what is changed.
    Raises:
        UserError: more data files than transformers.js reads.
    """
    data = sorted((folder / layout.model).parent.glob(f"{layout.model.name}{layout.data}*"))
    if len(data) > MOST_DATA_FILES:
        raise UserError(
            f"--layout transformers.js: {len(data)} data files, and transformers.js reads {MOST_DATA_FILES} at most; "
            "give a larger --max-shard-size"
        )
    config = dict(run.config)
    if config.get("model_type") not in MODEL_TYPES:
        log(
            f"config.json says model_type {_PLAIN}, since transformers.js does not know {config.get('model_type')}: "
            "the graph computes what it is, and the name only tells how many layers have a cache"
        )
        layers = {int(match[1]) for value in graph.inputs if (match := _KEY.fullmatch(str(value.name)))}
        config |= {"model_type": _PLAIN, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": max(layers) + 1}
    config.pop("quantization_config", None)
    config["transformers.js_config"] = {
        "dtype": layout.dtype,
        "use_external_data_format": {layout.model.name: len(data)},
    }
    _write(folder / CONFIG_FILE, config)
    if (run.config_dir / _GENERATION_CONFIG).is_file():
        shutil.copyfile(run.config_dir / _GENERATION_CONFIG, folder / _GENERATION_CONFIG)
    _prepare_tokenizer(folder)
    _name_model(folder / GENAI_CONFIG, layout)


def _prepare_tokenizer(folder: Path) -> None:
    """Say in tokenizer_config.json what transformers.js looks for there.

    That is the chat template, whose own file stays for others, and whether its pipeline puts special tokens around a
    text: it asks `add_bos_token`, where transformers asks tokenizer.json.
    """
    template, file = folder / _CHAT_TEMPLATE, folder / _TOKENIZER_CONFIG
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if adds_special_tokens(folder):
        config.setdefault("add_bos_token", True)
    _write(file, config)


def _name_model(genai_config: Path, layout: Layout) -> None:
    """onnxruntime-genai takes a path within the folder as the name of the model."""
    if genai_config.is_file():
        config = json.loads(genai_config.read_text(encoding="utf-8"))
        config["model"]["decoder"]["filename"] = layout.model.as_posix()
        _write(genai_config, config)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
