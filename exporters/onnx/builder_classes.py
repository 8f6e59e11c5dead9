"""What the exporter knows about onnxruntime-genai's model builder: a row for each architecture of transformers.

Source: `create_model` of onnxruntime_genai/models/builder.py and the classes of models/builders/, version 0.18.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

GENAI_CONFIG = "genai_config.json"

Config = dict[str, Any]
Change = Callable[[Any], None]


@dataclass(frozen=True)
class BuilderClass:
    """How the builder is told about an architecture.

    Attributes:
        architecture: what it calls that one, where that is not transformers' name: its language models of models that
            read more than text are text models of their own here.
        config: changes of transformers' config object, from what transformers implies to what the builder reads.
        model: changes of the builder's own model (`builders/base.py`), before it makes the graph.
    """

    architecture: str | None = None
    config: tuple[Change, ...] = ()
    model: tuple[Change, ...] = ()


def _window_of_every_layer(config: Any) -> None:
    """Mistral's and Phi-3's sliding window applies to every layer, but the builder reads it from `layer_types`.

    Without it 0.18.0 attends to everything (KL 0.013 on a random model with a window of 16).
    """
    if config.sliding_window:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def _epsilon(name: str) -> Change:
    """The builder reads `rms_norm_eps` and takes 1e-6 where there is none (KL 1e-6 on a random model)."""

    def change(config: Any) -> None:
        config.rms_norm_eps = getattr(config, name)

    return change


def _olmo(config: Any) -> None:
    """OLMo's norms have 1e-5 in transformers' code (`OlmoLayerNorm`), and the builder knows no clipping."""
    if config.clip_qkv is not None:
        raise NotImplementedError("it leaves out clip_qkv")
    config.rms_norm_eps = 1e-5


def _two_ropes(config: Any) -> None:
    """Gemma 3's two bases of RoPE are read from where transformers 4 had them."""
    ropes = config.rope_parameters
    config.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
    config.rope_parameters = dict(ropes["full_attention"])


def _long_rope(config: Any) -> None:
    """Phi-3's long RoPE is read from `type`, which transformers 5 does not write any more.

    Whether there is one the builder tells by two lengths, which differ by their defaults in transformers.
    """
    kind = config.rope_parameters["rope_type"]
    config.rope_parameters = {**config.rope_parameters, "type": kind}
    if kind != "longrope":
        config.original_max_position_embeddings = config.max_position_embeddings


def _geometry_by_layer(config: Any) -> None:
    """Gemma 4's builder reads the heads of global layers where checkpoints have them; transformers by layer."""
    config.allow_global_per_layer_attribute_access = True
    layer = config.per_layer_config[config.layer_types.index("full_attention")]
    config.global_head_dim, config.num_global_key_value_heads = layer.head_dim, layer.num_key_value_heads


def _sections(config: Any) -> None:
    """The three position numbers of a token are one in text, so any division of the frequencies among them is right."""
    rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    sections = config.rope_parameters.get("mrope_section") or (rotated - 2 * (rotated // 3), rotated // 3, rotated // 3)
    config.rope_parameters = {**config.rope_parameters, "mrope_section": list(sections)}


def _unrounded_embedding_scale(model: Any) -> None:
    """The builder rounds the square root of the hidden size to two decimals (KL 1e-7 on a random model)."""
    model.embed_attrs["scale"] = math.sqrt(model.hidden_size)


def _norms_with_mean(model: Any) -> None:
    """OLMo's norms subtract the mean; the builder's do not (KL 3e-2 on a random model)."""
    model.layernorm_attrs["simple"] = False


def _no_rope_by_layer(model: Any) -> None:
    """SmolLM3's class leaves RoPE out of attention for some layers, but puts nodes of it before attention there."""
    make_attention = model.make_attention

    def make(layer_id: int, attention: Any, root_input: str, **others: Any) -> None:
        model.attention_attrs["rope"] = bool(model.no_rope_layers[layer_id])
        make_attention(layer_id, attention, root_input, **others)

    model.make_attention = make


def _norm_with_epsilon(model: Any) -> None:
    """Linear attention's queries and keys have the length of 1 but for an epsilon, which the builder leaves out.

    transformers (`l2norm` of modeling_qwen3_5.py): x / sqrt(sum(x²) + 1e-6). That is the root mean square norm of d
    values with a weight of 1/√d and an epsilon of 1e-6 / d.
    """

    def make_norm(name: str, root_input: str, dtype: Any, shape: list[Any], axis: int = -1, p: int = 2) -> None:
        assert (axis, p) == (-1, 2)
        size, weight = shape[-1], f"{name.strip('/').replace('/', '.')}.weight"
        model.make_initializer(np.full(size, 1 / math.sqrt(size), dtype=np.float32), weight)
        output = f"{name}/output_0"
        attributes = {"epsilon": 1e-6 / size, "axis": -1, "stash_type": 1}
        model.make_node("SimplifiedLayerNormalization", [root_input, weight], [output], name=name, **attributes)
        model.make_value(output, dtype, shape=shape)

    model.make_lp_normalization = make_norm


_QWEN3_5 = "Qwen3_5ForConditionalGeneration"

BUILDER_CLASSES: dict[str, BuilderClass] = {
    "Ernie4_5ForCausalLM": BuilderClass(),
    "Gemma2ForCausalLM": BuilderClass(model=(_unrounded_embedding_scale,)),
    "Gemma3ForCausalLM": BuilderClass(config=(_two_ropes,), model=(_unrounded_embedding_scale,)),
    "Gemma4ForCausalLM": BuilderClass(
        "Gemma4UnifiedForConditionalGeneration", config=(_geometry_by_layer,), model=(_unrounded_embedding_scale,)
    ),
    "GemmaForCausalLM": BuilderClass(model=(_unrounded_embedding_scale,)),
    "GraniteForCausalLM": BuilderClass(),
    "GraniteMoeHybridForCausalLM": BuilderClass(),
    "HunYuanDenseV1ForCausalLM": BuilderClass(),
    "Lfm2ForCausalLM": BuilderClass(),
    "LlamaForCausalLM": BuilderClass(),
    "MinistralForCausalLM": BuilderClass("MistralForCausalLM"),
    "MistralForCausalLM": BuilderClass(config=(_window_of_every_layer,)),
    "NemotronForCausalLM": BuilderClass(config=(_epsilon("norm_eps"),)),
    "OlmoForCausalLM": BuilderClass(config=(_olmo,), model=(_norms_with_mean,)),
    "Phi3ForCausalLM": BuilderClass(config=(_window_of_every_layer, _long_rope)),
    "PhiForCausalLM": BuilderClass(config=(_epsilon("layer_norm_eps"),)),
    "Qwen2ForCausalLM": BuilderClass(),
    "Qwen3ForCausalLM": BuilderClass(),
    "Qwen3_5ForCausalLM": BuilderClass(_QWEN3_5, config=(_sections,), model=(_norm_with_epsilon,)),
    "SmolLM3ForCausalLM": BuilderClass(model=(_no_rope_by_layer,)),
}


def architecture_of(config: Config) -> str:
    """The first one that config.json names; where it names none, transformers' language model of its model_type."""
    named = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"), "none")]
    return str(next(iter(named)))


def builder_class(config: Config, parameters: Sequence[str]) -> BuilderClass | None:
    """The row of this config.json's architecture; None where the builder does not know it.

    None also for mixtures of experts: traced, they have a QMoE for any router (`routes.traced_mixtures`), and the
    builder's QMoE knows but its own classes' ones.
    """
    if any(".experts." in name for name in parameters):
        return None
    return BUILDER_CLASSES.get(architecture_of(config))
