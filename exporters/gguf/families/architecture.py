"""Architecture metadata of the built-in families: what llama.cpp must know besides tensors and tokenizer.

Source of the keys: `set_gguf_parameters` of each model in llama.cpp's conversion/ folder, and `load_arch_hparams` in
its src/models/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf

from exporters.gguf.families.family import Family
from exporters.gguf.families.rope import add_rope
from exporters.gguf.families.row_orders import Config
from exporters.gguf.limits import refuse_what_differs, window_period


def add_architecture(
    writer: gguf.GGUFWriter, family: Family, config: Config, vocab_size: int, log: Callable[[str], None]
) -> None:
    """All `<arch>.*` keys. UserError for what llama.cpp's graph of the family cannot compute.

    Args:
        config: as `canonical_config` gives it.
    """
    refuse_what_differs(family, config)
    if config.get("hidden_act") == "gelu":
        log("llama.cpp computes GELU by its tanh approximation and this model exactly: logits differ in late digits")
    heads, dim = int(config["num_attention_heads"]), int(config["head_dim"])
    writer.add_vocab_size(vocab_size)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config["num_key_value_heads"]))
    if dim * heads != int(config["hidden_size"]):
        writer.add_key_length(dim)
        writer.add_value_length(dim)
    if family.layer_norm:
        writer.add_layer_norm_eps(float(config["norm_eps"]))
    else:
        writer.add_layer_norm_rms_eps(float(config["norm_eps"]))
    if family.rotary:
        add_rope(writer, family, config, log)
    if not family.windows:
        _add_ignored_window(writer, config, log)
    _OWN_KEYS.get(family.model_type, _no_keys)(writer, config)


def sliding_window(config: dict[str, Any]) -> int | None:
    """The attention window, where the model really uses one shorter than its context."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None
    if config.get("model_type") in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        return None
    return int(window) if int(window) < int(config["max_position_embeddings"]) else None


def _add_ignored_window(writer: gguf.GGUFWriter, config: Config, log: Callable[[str], None]) -> None:
    window = sliding_window(config)
    if window is not None:
        writer.add_sliding_window(window)
        log(
            f"the model attends within a sliding window of {window} tokens; llama.cpp ignores it for this "
            "architecture, so longer contexts differ from the original"
        )


def _no_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    pass


def _gpt_neox_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_parallel_residual(bool(config["use_parallel_residual"]))


def _falcon_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_tensor_data_layout("jploski")  # the converter's name for its order of rows


def _phi3_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    if sliding_window(config) is None:
        writer.add_sliding_window(0)  # older llama.cpp assumes a window of its own where the key is missing


def _gemma2_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
    writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    _add_windows(writer, config)


def _gemma3_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    if config["final_logit_softcapping"]:
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))
    _add_windows(writer, config)


def _add_windows(writer: gguf.GGUFWriter, config: Config) -> None:
    period = window_period(config)
    if period is not None and period > 1:
        writer.add_sliding_window(int(config["sliding_window"]))
        writer.add_sliding_window_pattern(period)


def _mixtral_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_expert_count(int(config["num_experts"]))
    writer.add_expert_used_count(int(config["num_experts_per_tok"]))


def _qwen3_moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _mixtral_keys(writer, config)
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))


_OWN_KEYS: dict[str, Callable[[gguf.GGUFWriter, Config], None]] = {
    "mixtral": _mixtral_keys,
    "qwen3_moe": _qwen3_moe_keys,
    "gpt_neox": _gpt_neox_keys,
    "falcon": _falcon_keys,
    "phi3": _phi3_keys,
    "gemma2": _gemma2_keys,
    "gemma3_text": _gemma3_keys,
}
