"""What the exporter knows about onnxruntime-genai's model builder: a row for each architecture of transformers.

Source: `create_model` of onnxruntime_genai/models/builder.py and the classes of models/builders/, version 0.18.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from signround_edge.errors import UserError

GENAI_CONFIG = "genai_config.json"

Config = dict[str, Any]


@dataclass(frozen=True)
class BuilderClass:
    """How the builder is told about an architecture.

    Attributes:
        architecture: what it calls that one, where that is not transformers' name: its language models of models that
            read more than text are text models of their own here.
        fixes: changes of config.json, from what Hugging Face implies to what the builder reads; each in place.
        ropes: RoPE types whose graph has been compared with transformers (by tests). What the builder makes of others
            is shown by the comparison after each export, which models too large to be held twice go without.
    """

    architecture: str | None = None
    fixes: tuple[Callable[[Config], None], ...] = ()
    ropes: tuple[str, ...] = ("default",)


def _window_of_every_layer(config: Config) -> None:
    """Mistral's sliding window applies to every layer, but the builder reads it from `layer_types`.

    Without it 0.18.0 attends to everything (KL 0.013 on a random model with a window of 16).
    """
    if config.get("sliding_window"):
        config.setdefault("layer_types", ["sliding_attention"] * config["num_hidden_layers"])


def _flat_ropes(config: Config) -> None:
    """Gemma 3's builder reads the two bases of RoPE from where transformers 4 had them."""
    ropes = config.get("rope_parameters") or {}
    if "sliding_attention" in ropes:
        config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        config["rope_parameters"] = dict(ropes["full_attention"])


BUILDER_CLASSES: dict[str, BuilderClass] = {
    "Ernie4_5ForCausalLM": BuilderClass(),
    "Gemma2ForCausalLM": BuilderClass(),
    "Gemma3ForCausalLM": BuilderClass(fixes=(_flat_ropes,)),
    "Gemma4ForCausalLM": BuilderClass("Gemma4UnifiedForConditionalGeneration"),
    "GemmaForCausalLM": BuilderClass(),
    "GraniteForCausalLM": BuilderClass(),
    "GraniteMoeHybridForCausalLM": BuilderClass(),
    "HunYuanDenseV1ForCausalLM": BuilderClass(),
    "Lfm2ForCausalLM": BuilderClass(),
    "LlamaForCausalLM": BuilderClass(ropes=("default", "llama3")),
    "MinistralForCausalLM": BuilderClass("MistralForCausalLM"),
    "Ministral3ForCausalLM": BuilderClass("MistralForCausalLM"),
    "MistralForCausalLM": BuilderClass(fixes=(_window_of_every_layer,), ropes=("default", "linear")),
    "NemotronForCausalLM": BuilderClass(),
    "OlmoForCausalLM": BuilderClass(),
    "Phi3ForCausalLM": BuilderClass(),
    "PhiForCausalLM": BuilderClass(),
    "Qwen2ForCausalLM": BuilderClass(ropes=("default", "linear")),
    "Qwen3ForCausalLM": BuilderClass(ropes=("default", "linear")),
    "Qwen3_5ForCausalLM": BuilderClass("Qwen3_5ForConditionalGeneration"),
    "SmolLM3ForCausalLM": BuilderClass(),
}


def architecture_of(config: Config) -> str:
    """The first one that config.json names."""
    return str(next(iter(config.get("architectures") or ["none"])))


def builder_class(config: Config) -> BuilderClass | None:
    """The row of this config.json's architecture; None where the builder does not know it."""
    return BUILDER_CLASSES.get(architecture_of(config))


def builder_config(config: Config, row: BuilderClass) -> Config:
    """config.json as the builder is to read it."""
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    result["architectures"] = [row.architecture or architecture_of(config)]
    for fix in row.fixes:
        fix(result)
    return result


def rope_types(config: Config) -> set[str]:
    """RoPE types that a config.json names, of all its kinds of layers."""
    ropes = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [r for r in ropes.values() if isinstance(r, dict)] or [ropes]
    return {str(rope.get("rope_type", rope.get("type", "default"))) for rope in kinds}


def check_traceable(config: Config, parameters: list[str], source: str, reason: str = "") -> None:
    """UserError for mixtures of experts: which rows an expert multiplies depends on data, and no trace holds that.

    Args:
        source: the config.json.
        reason: why the builder does not make the graph, where it knows the architecture.
    """
    if any(".experts." in name for name in parameters):
        raise UserError(
            f"--format onnx cannot export architecture {architecture_of(config)} ({source}), a mixture of experts"
            f"{f': {reason}' if reason else ''}; "
            "quantize with a gguf:… scheme and use --format gguf, or give your own graph with --template model.onnx"
        )
