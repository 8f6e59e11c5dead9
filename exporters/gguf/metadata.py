"""Architecture metadata of the built-in families: what llama.cpp must know besides tensors and tokenizer.

Source of the keys: `set_gguf_parameters` of each model in llama.cpp's conversion/ folder, and `load_arch_hparams` in
its src/models/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import gguf

from exporters.gguf.families import Family
from exporters.gguf.limits import refuse_what_differs, window_period
from exporters.gguf.rope import add_rope
from exporters.gguf.row_orders import Config
from signround_edge import __version__
from signround_edge.run_directory import OUTSIDE, RunDirectory, sha256_of

PROVENANCE = "signround_edge"
_FILE_TYPES = {
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": gguf.LlamaFileType.MOSTLY_Q6_K,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "F32": gguf.LlamaFileType.ALL_F32,
}


def file_type(run: RunDirectory, dtype: str | None) -> gguf.LlamaFileType:
    """general.file_type: the type that most weights of the decoder blocks have. It is for display only."""
    if dtype is not None:
        return _FILE_TYPES[dtype.upper()]
    weights: dict[str, int] = {}
    for entry in run.manifest.tensors:
        if entry.format is not None and entry.part != OUTSIDE:
            weights[entry.format] = weights.get(entry.format, 0) + math.prod(entry.shape)
    most = max(weights, key=lambda name: weights[name]) if weights else "F32"
    return _FILE_TYPES.get(most, gguf.LlamaFileType.GUESSED)


def add_provenance(writer: gguf.GGUFWriter, run: RunDirectory) -> None:
    """Say which program, scheme and run directory the weights come from."""
    writer.add_string(f"{PROVENANCE}.version", __version__)
    writer.add_string(f"{PROVENANCE}.scheme", run.manifest.scheme)
    writer.add_string(f"{PROVENANCE}.manifest_sha256", sha256_of(run.path / "manifest.json"))


def model_name(run: RunDirectory, config: dict[str, Any], tokens: list[str]) -> str:
    """A name for people: the last component of the source model's path or name.

    llama.cpp takes special tokens of a "phi-3" for those of Microsoft's models, and dies where `tokens` lack them
    (`llama_vocab::impl::load`): then the name is written with a space.
    """
    source = str(run.manifest.source.get("model") or config.get("_name_or_path") or "model")
    name = source.rstrip("/").rpartition("/")[2] or "model"
    if {"</s>", "<s>", "<unk>", "<|endoftext|>"} <= set(tokens):
        return name
    return re.sub("(?i)(phi)-?3", r"\1 3", name)


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
