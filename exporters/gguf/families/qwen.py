"""Qwen 2 (also 2.5), Qwen 3 and the mixtures of experts of both; the language models of Qwen-VL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family, add_expert_counts, add_shared_expert
from exporters.gguf.families.rope import rotary_dims
from exporters.gguf.families.row_orders import Config


def _moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    add_expert_counts(writer, config)
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))


def _moe_problems(config: Config) -> Iterator[str]:
    if not config["norm_topk_prob"]:
        yield "lets the weights of the chosen experts add up to 1, this model does not (norm_topk_prob)"


def _qwen2_moe_problems(config: Config) -> Iterator[str]:
    if config["norm_topk_prob"]:
        yield "takes the weights of the chosen experts as they are, this model lets them add up to 1 (norm_topk_prob)"
    if config["tie_word_embeddings"]:
        yield "needs an output head of its own, this model ties it to the embedding"


def _vl_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    sections = [int(values) for values in config["mrope_section"]]
    writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])


def _vl_notes(config: Config) -> Iterator[str]:
    """Source: `load_arch_hparams` in src/models/qwen2vl.cpp of build 11549, which lost the line that reads it."""
    yield (
        f"llama.cpp's qwen2vl (build 11549) does not read the epsilon of norms ({config['norm_eps']}) and adds none: "
        "logits differ in late digits"
    )


def _vl_computes(config: Config) -> Config:
    return {"rms_norm_eps": 0.0}


def _vl3_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _vl_keys(writer, config)
    writer.add_num_deepstack_layers(int(config["num_deepstack_layers"]))


def _vl3_moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _vl3_keys(writer, config)
    _moe_keys(writer, config)


def _vl3_notes(config: Config) -> Iterator[str]:
    """Source: `ggml_mrope_cache_init` in ggml's ops.cpp, where a fourth position, 0 in texts, is used for what the
    three sections, taken in turn, leave over; `apply_interleaved_mrope` in transformers has the first one there."""
    pairs = rotary_dims(config) // 2
    left = [pair for pair in range(pairs) if pair >= 3 * int(config["mrope_section"][pair % 3])]
    if left:
        yield (
            f"llama.cpp leaves {len(left)} of the {pairs} pairs of a head unrotated (mrope_section "
            f"{config['mrope_section']}), which turn slowest: logits differ in late digits, more so in long texts"
        )


_QWEN2 = Family("qwen2", gguf.MODEL_ARCH.QWEN2, without=NO_OUTPUT_BIAS)
_QWEN3 = Family("qwen3", gguf.MODEL_ARCH.QWEN3, without=NO_OUTPUT_BIAS)
_QWEN3_MOE = Family(
    "qwen3_moe", gguf.MODEL_ARCH.QWEN3MOE, keys=_moe_keys, problems=_moe_problems, without=NO_OUTPUT_BIAS
)


def _with_images(text: Family, inside: Family) -> Family:
    """The row of a text model, and of one inside a model that reads images, whose config has an `mrope_section`.

    As long as there is only text both compute the same, but only the latter runs with images.
    """
    return replace(text, elsewhere=lambda config: inside if config.get("mrope_section") else None)


ROWS = (
    _with_images(
        _QWEN2, replace(_QWEN2, arch=gguf.MODEL_ARCH.QWEN2VL, keys=_vl_keys, notes=_vl_notes, computes=_vl_computes)
    ),
    Family(
        "qwen2_moe",
        gguf.MODEL_ARCH.QWEN2MOE,
        keys=add_shared_expert,
        problems=_qwen2_moe_problems,
        without=NO_OUTPUT_BIAS,
    ),
    _with_images(_QWEN3, replace(_QWEN3, arch=gguf.MODEL_ARCH.QWEN3VL, keys=_vl3_keys, notes=_vl3_notes)),
    _with_images(
        _QWEN3_MOE,
        replace(_QWEN3_MOE, arch=gguf.MODEL_ARCH.QWEN3VLMOE, keys=_vl3_moe_keys, notes=_vl3_notes),
    ),
)
