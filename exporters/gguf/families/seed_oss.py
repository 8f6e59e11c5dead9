"""Seed-OSS: Llama with biases of queries, keys and values."""

from __future__ import annotations

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family

ROWS = (Family("seed_oss", gguf.MODEL_ARCH.SEED_OSS, without=NO_OUTPUT_BIAS),)
