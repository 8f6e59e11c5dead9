"""The model families whose GGUF metadata is built in: one row says how a Hugging Face `model_type` appears in GGUF.

Source of the facts: llama.cpp's Hugging Face converter (conversion/<family>.py) and its graphs (src/models/<arch>.cpp).
What of a family llama.cpp does not compute is refused in `limits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf

from exporters.gguf.families.row_orders import Config, RowOrder, grouped_order, interleaved_order, same_order
from signround_edge.errors import UserError
from signround_edge.model.config import head_dim

_SILU = ("silu", "swish")
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: `model_type` of config.json.
        arch: llama.cpp's architecture.
        order: in which order the rows of a projection are stored.
        derived: entries of the config under the names that Llama uses, for configs that spell them otherwise.
        layer_norm: LayerNorm rather than RMSNorm.
        rotary: positions enter by rotation.
        partial_rotary: llama.cpp's graph can rotate the first part of a head only.
        windows: llama.cpp's graph has sliding windows.
        activations: names of the feed-forward activation that llama.cpp's graph computes.
        norm_added: what the file's norm weights hold on top of the model's (Gemma multiplies by 1 + weight).
        without: endings of parameters that have a GGUF name but no place in llama.cpp's graph.
    """

    model_type: str
    arch: gguf.MODEL_ARCH
    order: Callable[[Config, str, int], RowOrder | None] = same_order
    derived: Callable[[Config], Config] = lambda config: {}
    layer_norm: bool = False
    rotary: bool = True
    partial_rotary: bool = False
    windows: bool = False
    activations: tuple[str, ...] = _SILU
    norm_added: float = 0.0
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


def _gpt2(config: Config) -> Config:
    return {
        "intermediate_size": config.get("n_inner") or 4 * config["hidden_size"],
        "hidden_act": config["activation_function"],
        "norm_eps": config["layer_norm_epsilon"],
    }


def _gpt_neox(config: Config) -> Config:
    return {"norm_eps": config["layer_norm_eps"], "num_key_value_heads": config["num_attention_heads"]}


def _bloom(config: Config) -> Config:
    """ALiBi has no longest context; `seq_length` says what the published models were trained with."""
    return {
        "intermediate_size": 4 * config["hidden_size"],
        "hidden_act": "gelu_new",  # BloomGelu is the tanh approximation
        "norm_eps": config["layer_norm_epsilon"],
        "num_key_value_heads": config["num_attention_heads"],
        "max_position_embeddings": config.get("seq_length") or 2048,
    }


def _falcon(config: Config) -> Config:
    grouped = config["new_decoder_architecture"] or not config["multi_query"]
    return {
        "intermediate_size": config["ffn_hidden_size"],
        "hidden_act": config["activation"],
        "norm_eps": config["layer_norm_epsilon"],
        "num_key_value_heads": config["num_kv_heads"] if grouped else 1,
    }


def _gemma(config: Config) -> Config:
    return {"hidden_act": config["hidden_activation"]}


_NO_BIAS = (".q_proj.bias", ".k_proj.bias", ".v_proj.bias", ".o_proj.bias")
_NO_OUTPUT_BIAS = (".o_proj.bias", ".gate_proj.bias", ".up_proj.bias", ".down_proj.bias")
_ARCH = gguf.MODEL_ARCH

_ROWS = (
    Family("llama", _ARCH.LLAMA, interleaved_order),
    Family("mistral", _ARCH.LLAMA, interleaved_order),
    Family("mixtral", _ARCH.LLAMA, interleaved_order),
    Family("qwen2", _ARCH.QWEN2, without=_NO_OUTPUT_BIAS),
    Family("qwen3", _ARCH.QWEN3, without=_NO_OUTPUT_BIAS),
    Family("qwen3_moe", _ARCH.QWEN3MOE, without=_NO_OUTPUT_BIAS),
    Family("smollm3", _ARCH.SMOLLM3, interleaved_order, without=_NO_OUTPUT_BIAS),
    Family("gpt2", _ARCH.GPT2, derived=_gpt2, layer_norm=True, rotary=False, activations=_TANH_GELU),
    Family(
        "gpt_neox",
        _ARCH.GPTNEOX,
        grouped_order,
        _gpt_neox,
        layer_norm=True,
        partial_rotary=True,
        activations=(*_TANH_GELU, "gelu"),
    ),
    Family("bloom", _ARCH.BLOOM, grouped_order, _bloom, layer_norm=True, rotary=False, activations=_TANH_GELU),
    Family("falcon", _ARCH.FALCON, grouped_order, _falcon, layer_norm=True, activations=(*_TANH_GELU, "gelu")),
    Family("phi3", _ARCH.PHI3, partial_rotary=True),
    Family(
        "gemma2", _ARCH.GEMMA2, derived=_gemma, windows=True, activations=_TANH_GELU, norm_added=1.0, without=_NO_BIAS
    ),
    Family(
        "gemma3_text",
        _ARCH.GEMMA3,
        derived=_gemma,
        windows=True,
        activations=_TANH_GELU,
        norm_added=1.0,
        without=_NO_BIAS,
    ),
)

FAMILIES = {family.model_type: family for family in _ROWS}


def family_of(config: dict[str, Any]) -> Family:
    """The built-in family of a config. UserError for others, with the way out."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(
            f"no built-in GGUF metadata for architecture {config.get('model_type')!r} (there is for "
            f"{', '.join(FAMILIES)}); make an f16 GGUF with llama.cpp's convert_hf_to_gguf.py and give it as --template"
        )
    return family


def canonical_config(config: dict[str, Any]) -> Config:
    """A built-in family's config under one set of names: Llama's, and `norm_eps`, `head_dim`, `num_key_value_heads`.

    Missing entries and the older spellings of published configs are read as transformers reads them, since its model is
    what was tuned.

    Raises:
        UserError: a family that is not built in, or a config that transformers refuses.
    """
    from transformers import CONFIG_MAPPING  # late: it takes a second

    family = family_of(config)
    try:
        known = CONFIG_MAPPING[family.model_type].from_dict(dict(config))
    except Exception as error:  # its validation raises what it likes
        raise UserError(f"config.json of the run cannot be read ({error}); run `quantize` again") from error
    full: Config = {**config, **known.to_dict()}
    full |= {name: full[spelling] for name, spelling in known.attribute_map.items() if spelling in full}
    full |= family.derived(full)
    full["num_key_value_heads"] = int(full.get("num_key_value_heads") or full["num_attention_heads"])
    full["head_dim"] = head_dim(full)
    if "norm_eps" not in full:
        full["norm_eps"] = full["rms_norm_eps"]
    return full


def row_order(family: Family, config: Config, hf_name: str, rows: int) -> RowOrder | None:
    """The order in which llama.cpp stores a parameter's rows, or None when it is Hugging Face's."""
    projection = hf_name.rpartition(".")[0].rpartition(".")[2]
    return family.order(config, projection, rows)
