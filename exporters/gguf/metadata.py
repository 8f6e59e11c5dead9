"""Architecture metadata of the built-in families: what llama.cpp must know besides tensors and tokenizer.

Source of the keys: `TextModel.set_gguf_parameters` and `LlamaModel.generate_extra_tensors` in llama.cpp's
conversion/ folder, and `llama_model::load_hparams`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from exporters.gguf.families import Family, head_dim
from signround_edge import __version__
from signround_edge.errors import UserError
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
_TEMPLATE_HINT = "make an f16 GGUF with llama.cpp's convert_hf_to_gguf.py and give it as --template"


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


def model_name(run: RunDirectory, config: dict[str, Any]) -> str:
    """A name for people: the last component of the source model's path or name."""
    source = str(run.manifest.source.get("model") or config.get("_name_or_path") or "model")
    return source.rstrip("/").rpartition("/")[2] or "model"


def add_architecture(
    writer: gguf.GGUFWriter, family: Family, config: dict[str, Any], vocab_size: int, log: Callable[[str], None]
) -> None:
    """All `<arch>.*` keys. UserError for what llama.cpp's graph of the family cannot compute."""
    _check(family, config)
    writer.add_vocab_size(vocab_size)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    heads = int(config["num_attention_heads"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    dim = head_dim(config)
    if dim * heads != int(config["hidden_size"]):
        writer.add_key_length(dim)
        writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    _add_rope(writer, config, log)
    window = sliding_window(config)
    if window is not None:
        writer.add_sliding_window(window)
        log(
            f"the model attends within a sliding window of {window} tokens; llama.cpp ignores it for this "
            "architecture, so longer contexts differ from the original"
        )


def sliding_window(config: dict[str, Any]) -> int | None:
    """The attention window, where the model really uses one shorter than its context."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None
    if config.get("model_type") in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        return None
    return int(window) if int(window) < int(config["max_position_embeddings"]) else None


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings in one shape: transformers 5 has `rope_parameters`, before it `rope_theta` and `rope_scaling`."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    parameters["rope_type"] = str(kind).lower()
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return parameters


def rope_frequency_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """The divisors of Llama 3's scaled frequencies, f32 [head_dim/2] (tensor rope_freqs), or None without them.

    Source: `_compute_llama3_parameters` in transformers' modeling_rope_utils.py; llama.cpp divides each frequency by
    its factor.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = head_dim(config)
    frequencies = 1.0 / float(rope["rope_theta"]) ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    wavelengths = 2 * math.pi / frequencies
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    smooth = (original / wavelengths - low) / (high - low)
    blended = 1.0 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, blended))
    return factors.astype(np.float32)


def _add_rope(writer: gguf.GGUFWriter, config: dict[str, Any], log: Callable[[str], None]) -> None:
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in ("default", "llama3"):
        return
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return
    if kind == "dynamic":
        log("dynamic RoPE scaling is exported without scaling: the same up to the original context length")
        return
    if kind != "yarn":
        raise UserError(f"RoPE scaling {kind!r} has no built-in GGUF metadata; {_TEMPLATE_HINT}")
    factor = float(rope["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(int(original))
    attention = _yarn_attention_factor(rope, factor)
    if attention is not None:
        writer.add_rope_scaling_attn_factors(attention)
    beta_fast, beta_slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    if (beta_fast, beta_slow) != (32, 1):
        writer.add_rope_scaling_yarn_beta_fast(beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(beta_slow)
        log(
            f"YaRN with beta_fast {beta_fast:g} and beta_slow {beta_slow:g}: llama.cpp computes 32 and 1 for this "
            "architecture, so results differ from the original"
        )


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float | None:
    """llama.cpp's multiplier on top of its own 1 + 0.1·ln(factor), or None where transformers uses the same.

    Source: `rope_yarn` in ggml's ops.cpp and `llama_context::llama_context` (`rope_attn_factor`, the one key of this
    kind that all architectures read) against `_compute_yarn_parameters` in transformers.
    """
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise UserError(f"YaRN with mscale has no built-in GGUF metadata; {_TEMPLATE_HINT}")
    explicit = rope.get("attention_factor")
    if explicit is None:
        return None
    return float(explicit) / (1.0 + 0.1 * math.log(factor))


def _check(family: Family, config: dict[str, Any]) -> None:
    name = family.model_type
    for key in ("num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size"):
        if not isinstance(config.get(key), int):
            raise UserError(f"config.json of the run has no {key}; run `quantize` again")
    if not isinstance(config.get("num_attention_heads"), int):
        raise UserError("config.json of the run has no num_attention_heads; run `quantize` again")
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UserError(f"llama.cpp's {name} computes SiLU, this model uses {act!r}; {_TEMPLATE_HINT}")
    if float(config.get("partial_rotary_factor") or rope_parameters(config).get("partial_rotary_factor") or 1) != 1:
        raise UserError(f"partial rotary embeddings are not built in for {name}; {_TEMPLATE_HINT}")
