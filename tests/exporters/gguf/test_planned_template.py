"""A model whose GGUF file needs a template is planned with it, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Starcoder2Config

from signround_edge import api
from signround_edge.errors import UserError
from signround_edge.tuning.settings import TuningSettings
from tests.exporters.gguf.test_gguf_template import HEADS, VOCAB, WIDTH, write_template
from tests.support import save_random_model

# Not among the built-in families.
STARCODER2 = Starcoder2Config(
    hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
    num_key_value_heads=HEADS, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, initializer_range=0.1,
)  # fmt: skip
OPTIONS: dict[str, Any] = {"types": "Q2_0,Q4_0,Q5_0,Q8_0", "samples": 1, "seqlen": 16, "context": 512}


def as_it_is(_name: str, data: np.ndarray) -> np.ndarray:
    return data


def test_a_file_after_a_template_has_the_planned_bytes(byte_level_folder: Path, tmp_path: Path) -> None:
    model = save_random_model(STARCODER2, tmp_path / "model", tokenizer_from=byte_level_folder)
    template = write_template(tmp_path / "t.gguf", "starcoder2", model, byte_level_folder, as_it_is)
    found = api.plan(model, target_size="300k", template=template, cache=tmp_path / "cache", **OPTIONS)
    found.planned.save(tmp_path / "plan.json")
    assert found.exact
    assert len(set(found.planned.types.values())) > 1
    run = api.quantize(
        model, None, tmp_path / "run", plan=tmp_path / "plan.json", source_check="off",
        settings=TuningSettings(steps=0, samples=1, seqlen=16),
    )  # fmt: skip
    file = api.export(run, "gguf", tmp_path / "out.gguf", template=template).path
    assert file.stat().st_size == found.planned.file_bytes <= 300_000


def test_without_one_it_is_refused_before_anything_is_measured(byte_level_folder: Path, tmp_path: Path) -> None:
    model = save_random_model(STARCODER2, tmp_path / "model", tokenizer_from=byte_level_folder)
    lines: list[str] = []
    with pytest.raises(UserError, match="--template"):
        api.plan(model, target_size="300k", cache=tmp_path / "cache", progress=lines.append, **OPTIONS)
    assert not lines
