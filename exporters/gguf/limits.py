"""What of a built-in family llama.cpp's graph does not compute: refused, each with one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from exporters.gguf.families.family import Family
from exporters.gguf.families.rope import TEMPLATE_HINT, rope_parameters, rotary_dims
from exporters.gguf.families.row_orders import Config
from signround_edge.errors import UserError

_WAY_OUT = "to take what llama.cpp makes of it, give an f16 GGUF made by its convert_hf_to_gguf.py as --template"


def refuse_what_differs(family: Family, config: Config) -> None:
    """UserError when llama.cpp would compute something else than the model of this config.

    Args:
        config: as `canonical_config` gives it.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in family.activations:
        raise UserError(
            f"llama.cpp's {family.name} computes {family.activations[0]}, this model uses {activation!r}; "
            f"{TEMPLATE_HINT}"
        )
    if family.rotary and not family.partial_rotary and rotary_dims(config) != config["head_dim"]:
        raise UserError(f"partial rotary embeddings are not built in for {family.model_type}; {TEMPLATE_HINT}")
    for problem in _PROBLEMS.get(family.model_type, _none)(config):
        raise UserError(f"llama.cpp's {family.name} {problem}; {_WAY_OUT}")


def window_period(config: Config) -> int | None:
    """p when layers p, 2p, … (counted from 1) have full attention and all others a sliding window, else None.

    1 means that no layer has a window.
    """
    kinds = config["layer_types"]
    for period in range(1, len(kinds) + 2):
        if kinds == ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(kinds))]:
            return period
    return None


def _none(config: Config) -> Iterator[str]:
    return iter(())


def _qwen3_moe(config: Config) -> Iterator[str]:
    if not config["norm_topk_prob"]:
        yield "lets the weights of the chosen experts add up to 1, this model does not (norm_topk_prob)"


def _smollm3(config: Config) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    if config["no_rope_layers"] != [int((i + 1) % 4 != 0) for i in range(layers)]:
        yield "leaves the rotation out of every fourth layer, this model has other no_rope_layers"


def _gpt2(config: Config) -> Iterator[str]:
    if not config["scale_attn_weights"] or config["scale_attn_by_inverse_layer_idx"]:
        yield "scales attention by the head size, this model's scale_attn settings say otherwise"


def _gpt_neox(config: Config) -> Iterator[str]:
    if config["tie_word_embeddings"]:
        yield "needs an output head of its own, this model ties it to the embedding"
    if not config["attention_bias"]:
        yield "needs biases of the attention projections, this model has none"


def _bloom(config: Config) -> Iterator[str]:
    if config["apply_residual_connection_post_layernorm"]:
        yield "adds the residual from before the norm, this model from behind it"


def _falcon(config: Config) -> Iterator[str]:
    if config["alibi"]:
        yield "has rotary positions, this model has ALiBi"
    if not config["parallel_attn"]:
        yield "computes attention and feed-forward side by side, this model one after the other"
    if config["bias"]:
        yield "has no biases, this model has some"


def _phi3(config: Config) -> Iterator[str]:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        yield "has heads that are together as wide as the model, this model's are not"


def _gemma2(config: Config) -> Iterator[str]:
    if not config["attn_logit_softcapping"] or not config["final_logit_softcapping"]:
        yield "always has soft caps, this model lacks one"
    if window_period(config) == 1:
        yield "has windows in some layers, this model in none"
    yield from _gemma(config, layers_of_27b=46)


def _gemma3(config: Config) -> Iterator[str]:
    if config["attn_logit_softcapping"]:
        yield "has no soft cap on attention, this model has one"
    if rope_parameters(config)["rope_type"] not in ("default", "linear"):
        yield "scales the rotation linearly or not at all, this model has another scaling"
    if config["rope_parameters"]["sliding_attention"].get("rope_type", "default") != "default":
        yield "has unscaled rotation in layers with a window, this model scales it"
    yield from _gemma(config, layers_of_27b=62)


def _gemma(config: Config, layers_of_27b: int) -> Iterator[str]:
    """llama.cpp tells the 27B model, whose attention is scaled otherwise, by its number of layers."""
    is_27b = config["num_hidden_layers"] == layers_of_27b
    scale = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    if config["query_pre_attn_scalar"] != scale:
        yield f"scales attention by {scale} to the power -1/2, this model by {config['query_pre_attn_scalar']}"
    if config["use_bidirectional_attention"]:
        yield "attends to the past only, this model to both sides"
    if window_period(config) is None:
        yield "has full attention in every p-th layer, this model has other layer_types"


_PROBLEMS: dict[str, Callable[[Config], Iterator[str]]] = {
    "qwen3_moe": _qwen3_moe,
    "smollm3": _smollm3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
