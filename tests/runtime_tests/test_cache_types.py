"""llama.cpp's cache of keys and values in fewer bits: its logits are off by more, and it is said what was used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.verify import verify
from signround_edge.cli import main
from signround_edge.errors import UserError
from signround_edge.evaluation.cache_types import CacheTypes
from signround_edge.run_directory import RunDirectory

EIGHT, FOUR = CacheTypes("q8_0", "q8_0"), CacheTypes("q4_0", "q4_0")


def test_logits_move_more_with_fewer_bits(gguf_file: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 64).astype(np.int32)

    def logits(types: CacheTypes | None) -> np.ndarray:
        runtime = LlamaCppRuntime() if types is None else LlamaCppRuntime().with_cache(types)
        with runtime.open(gguf_file) as session:
            return session.logits(tokens)

    own, f16, eight, four = (logits(types) for types in (None, CacheTypes(), EIGHT, FOUR))
    assert np.array_equal(own, f16)
    assert 0 < np.abs(eight - own).mean() < np.abs(four - own).mean()


def test_verify_takes_the_types_for_the_file_and_not_for_its_control(
    run: RunDirectory, gguf_file: Path, text: Path
) -> None:
    def report(types: CacheTypes | None) -> tuple[float, float, str]:
        found = verify(run, [gguf_file], text, n_ctx=64, max_windows=2, cache_types=types, log=str).runtimes[0]
        assert found.parity is not None
        assert found.control is not None
        return found.parity.kld_mean, found.control.kld_mean, " ".join(found.notes)

    own, four = report(None), report(FOUR)
    assert four[0] > own[0]
    assert four[1] == own[1]
    assert FOUR.text in four[2]
    assert "KV cache" not in own[2]


def test_evaluate_says_what_it_used(gguf_file: Path, small_model: Path, text: Path) -> None:
    arguments = ["evaluate", str(gguf_file), "--text", str(text), "--reference", str(small_model), "--n-ctx", "64"]
    options = ["--windows", "1", "--cache-type-v", "q4_0", "--json"]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert "kld_mean" in json.loads(result.stdout)
    assert "K in f16, V in q4_0, with flash attention" in result.stderr


def test_types_that_are_not_offered_and_other_runtimes_are_refused(
    onnx_folder: Path, run: RunDirectory, text: Path, small_model: Path
) -> None:
    with pytest.raises(UserError, match="--cache-type-k q5_1 is not offered; give f16, q8_0 or q4_0"):
        CacheTypes.of("q5_1", None)
    with pytest.raises(UserError, match=r"llama\.cpp's; give a GGUF file"):
        verify(run, [onnx_folder], text, cache_types=EIGHT, log=str)
    for path in (onnx_folder, run.path):
        arguments = ["evaluate", str(path), "--text", str(text), "--reference", str(small_model)]
        result = CliRunner().invoke(main, [*arguments, "--cache-type-k", "q8_0"])
        assert result.exit_code == 2
        assert "give a GGUF file" in result.stderr
