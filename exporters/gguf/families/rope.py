"""Rotary embeddings in GGUF: metadata keys, and the tensors of frequency factors that go with them.

Source of the keys: `TextModel.set_gguf_parameters`, `LlamaModel.generate_extra_tensors` and
`Phi3MiniModel.generate_extra_tensors` in llama.cpp's conversion/ folder, and `llama_model::load_hparams`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import gguf
import numpy as np
from numpy.typing import NDArray

from exporters.gguf.families.family import TEMPLATE_HINT, Family
from exporters.gguf.families.row_orders import Config
from signround_edge.errors import UserError
from signround_edge.model.config import head_dim

Vector = NDArray[np.float32]


def rope_parameters(config: Config) -> Config:
    """RoPE settings in one shape: transformers 5 has `rope_parameters`, before it `rope_theta` and `rope_scaling`.

    Where layers differ (Gemma 3), those of the layers with full attention.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters = dict(parameters.get("full_attention", parameters))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    parameters["rope_type"] = str(kind).lower()
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return parameters


def rotary_dims(config: Config) -> int:
    """How many values of a head are rotated (all of them where the kind is proportional: some by no angle)."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "proportional":
        return head_dim(config)
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return int(head_dim(config) * float(share))


def factor_tensors(family: Family, config: Config) -> dict[str, Vector]:
    """Tensors that divide the rotary frequencies, f32 [rotated values / 2] by name: empty for most models."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "longrope" and "longrope" in family.rope_scalings:
        long, short = gguf.MODEL_TENSOR.ROPE_FACTORS_LONG, gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT
        return {_name(long): _vector(rope["long_factor"]), _name(short): _vector(rope["short_factor"])}
    if rope["rope_type"] == "proportional" and "proportional" in family.rope_scalings:
        return {_name(gguf.MODEL_TENSOR.ROPE_FREQS): _proportional_factors(config, rope)}
    factors = rope_frequency_factors(config)
    return {} if factors is None else {_name(gguf.MODEL_TENSOR.ROPE_FREQS): factors}


def rope_frequency_factors(config: Config) -> Vector | None:
    """The divisors of Llama 3's scaled frequencies, f32 [head_dim/2] (tensor rope_freqs), or None without them.

    Source: `_compute_llama3_parameters` in transformers' modeling_rope_utils.py; llama.cpp divides each frequency by
    its factor. Computed here in 64 bits and rounded once: frequencies divided by those that transformers' function
    returns, which are 32-bit, are up to four units off in the last place, and so are the converter's factors.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = head_dim(config)
    frequencies = 1.0 / float(rope["rope_theta"]) ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    wavelengths = 2 * math.pi / frequencies
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    with np.errstate(divide="ignore", invalid="ignore"):  # Llama 4 has both factors 1 and blends nothing
        smooth = (original / wavelengths - low) / (high - low)
        blended = 1.0 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, blended))
    return factors.astype(np.float32)


def _proportional_factors(config: Config, rope: Config) -> Vector:
    """The divisors of Gemma 4's frequencies, f32 [head_dim/2]: pairs that are not rotated have an endless wavelength.

    Source: `Gemma4Model.generate_extra_tensors`; `_compute_proportional_rope_parameters` in transformers.
    """
    pairs = head_dim(config) // 2
    rotated = int(float(rope.get("partial_rotary_factor", 1.0)) * head_dim(config) // 2)
    return _vector([float(rope.get("factor", 1.0))] * rotated + [1e30] * (pairs - rotated))


def add_rope(writer: gguf.GGUFWriter, family: Family, config: Config, log: Callable[[str], None]) -> None:
    """All `<arch>.rope.*` keys. UserError for scalings that llama.cpp's graph does not compute.

    Linear scaling and YaRN every graph computes. Llama 3's frequencies and LongRoPE need tensors of factors, which few
    graphs read.
    """
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    writer.add_rope_dimension_count(rotary_dims(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "default":
        return
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "dynamic":
        log("dynamic RoPE scaling is exported without scaling: the same up to the original context length")
    elif kind == "yarn":
        _add_yarn(writer, family, config, rope, log)
    elif kind not in family.rope_scalings:
        raise UserError(f"RoPE scaling {kind!r} has no built-in GGUF metadata for {family.name}; {TEMPLATE_HINT}")
    elif kind == "longrope":
        _add_longrope(writer, config, rope, log)
    # Of llama3 and proportional all is in their tensor.


def say_unscaled(writer: gguf.GGUFWriter, config: Config) -> None:
    """What the converter writes for some families: that the rotation is not scaled."""
    if rope_parameters(config)["rope_type"] == "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _add_yarn(
    writer: gguf.GGUFWriter, family: Family, config: Config, rope: Config, log: Callable[[str], None]
) -> None:
    factor = float(rope["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(int(original))
    if "mscale" in family.rope_scalings:
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(rope["mscale_all_dim"]))
    elif "mscale_all_dim" in family.rope_scalings:
        writer.add_rope_scaling_yarn_log_mul(float(rope.get("mscale_all_dim") or 0))
    else:
        attention = _yarn_attention_factor(rope, factor)
        if attention is not None:
            writer.add_rope_scaling_attn_factors(attention)
    say_truncation(rope, log)
    beta_fast, beta_slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    if "betas" in family.rope_scalings:
        writer.add_rope_scaling_yarn_beta_fast(beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(beta_slow)
    elif (beta_fast, beta_slow) != (32, 1):
        writer.add_rope_scaling_yarn_beta_fast(beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(beta_slow)
        log(
            f"YaRN with beta_fast {beta_fast:g} and beta_slow {beta_slow:g}: llama.cpp computes 32 and 1 for this "
            "architecture, so results differ from the original"
        )


def say_truncation(rope: Config, log: Callable[[str], None]) -> None:
    """A line where llama.cpp blends other frequencies than transformers: it always rounds the range's ends outwards.

    Source: `ggml_rope_yarn_corr_dims` in ggml.c against `find_correction_range` in transformers.
    """
    if rope["rope_type"] == "yarn" and rope.get("truncate") is False:
        log(
            "YaRN with truncate false: llama.cpp rounds the range of frequencies that it blends to whole numbers, so "
            "results differ from the original"
        )


def truncated(config: Config) -> Config:
    """The rotation that llama.cpp computes where `say_truncation` speaks, as entries of config.json; else none."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "yarn" or rope.get("truncate") is not False:
        return {}
    return {"rope_parameters": {**rope, "truncate": True}, "rope_scaling": None}


def _yarn_attention_factor(rope: Config, factor: float) -> float | None:
    """llama.cpp's multiplier on top of its own 1 + 0.1·ln(factor), or None where transformers uses the same.

    Source: `rope_yarn` in ggml's ops.cpp and `llama_context::llama_context` (`rope_attn_factor`, the one key of this
    kind that all architectures read) against `_compute_yarn_parameters` in transformers.
    """
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise UserError(f"YaRN with mscale has no built-in GGUF metadata; {TEMPLATE_HINT}")
    explicit = rope.get("attention_factor")
    if explicit is None:
        return None
    return float(explicit) / (1.0 + 0.1 * math.log(factor))


def _add_longrope(writer: gguf.GGUFWriter, config: Config, rope: Config, log: Callable[[str], None]) -> None:
    """Phi-3's LongRoPE. Source of the attention factor: `_compute_longrope_parameters` in transformers."""
    original = int(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or config["max_position_embeddings"] / original)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(float(attention))
    log(
        f"LongRoPE: llama.cpp takes the long factors when its context is longer than {original} tokens, transformers "
        f"when the text is; run texts of up to {original} tokens with a context of at most that length"
    )


def _name(tensor: gguf.MODEL_TENSOR) -> str:
    return str(gguf.TENSOR_NAMES[tensor]) + ".weight"


def _vector(values: list[float]) -> Vector:
    return np.array(values, dtype=np.float32)
