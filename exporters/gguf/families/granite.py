"""Granite: Llama with factors on embedding, attention, residuals and logits."""

from __future__ import annotations

import gguf

from exporters.gguf.families.family import Family
from exporters.gguf.families.llama import interleaved_order
from exporters.gguf.families.row_orders import Config


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_embedding_scale(float(config["embedding_multiplier"]))
    writer.add_attention_scale(float(config["attention_multiplier"]))
    writer.add_residual_scale(float(config["residual_multiplier"]))
    writer.add_logit_scale(float(config["logits_scaling"]))


ROWS = (Family("granite", gguf.MODEL_ARCH.GRANITE, interleaved_order, keys=_keys, rope_scalings=("llama3",)),)
