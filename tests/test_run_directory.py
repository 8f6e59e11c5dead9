"""Rows of a run's parameters are the parameter's, in any order and however they are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from signround_edge import run_directory
from signround_edge.formats import QuantizedTensor
from signround_edge.run_directory import RunDirectory
from tests.support import make_run, save_random_model

TRANSPOSED = "transformer.h.0.mlp.c_fc.weight"  # stored [in, out] by transformers
FLOATS = "transformer.wpe.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128, n_positions=32, bos_token_id=0, eos_token_id=1)
    return make_run(save_random_model(config, folder / "model"), folder / "run", "gguf:q4_1")


@pytest.mark.parametrize("values_at_once", [1, 500, 1 << 22])
@pytest.mark.parametrize("ordered", [False, True])
def test_rows_come_in_the_order_asked_for(
    run: RunDirectory, values_at_once: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "_VALUES_AT_ONCE", values_at_once)
    for name in run.names():
        shape, whole = run.entry(name).out_in_shape, run.dequantized(name)
        if run.entry(name).transposed:
            whole = whole.T
        order = np.random.default_rng(0).permutation(shape[0]) if ordered else None
        expected = whole if order is None else whole[torch.from_numpy(order)]
        pieces = list(run.dequantized_rows(name, order))
        assert torch.equal(torch.cat(pieces), expected), name
        assert len(pieces) == 1 or all(piece.numel() <= max(values_at_once, shape[-1]) for piece in pieces)


def test_quantized_rows_are_the_codes_as_stored(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "_VALUES_AT_ONCE", 500)
    assert run.entry(TRANSPOSED).transposed
    order = np.arange(256)[::-1].copy()
    pieces: list[QuantizedTensor] = list(run.quantized_rows(TRANSPOSED, order))
    assert len(pieces) > 1
    stored = run.quantized(TRANSPOSED)
    assert torch.equal(torch.cat([piece.codes for piece in pieces]), stored.codes.flip(0))
    for field, values in stored.fields.items():
        assert torch.equal(torch.cat([piece.fields[field] for piece in pieces]), values.flip(0))


def test_a_vector_is_one_piece(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "_VALUES_AT_ONCE", 1)
    (vector,) = run.dequantized_rows("transformer.ln_f.weight")
    assert vector.shape == (64,)
    assert len(list(run.dequantized_rows(FLOATS))) == 32
