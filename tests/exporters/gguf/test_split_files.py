"""Models split into several files: the same tensors, loaded by llama.cpp, and every broken set said in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from exporters.gguf.container.reader import GgufFile
from exporters.gguf.container.splits import model_files
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, export

RunOf = Callable[..., RunDirectory]


@pytest.fixture
def run(run_of: RunOf, byte_level_folder: Path) -> RunDirectory:
    return run_of(LlamaConfig(**BASE), "gguf:q4_0", byte_level_folder)


def test_split_files_hold_the_same_tensors_and_load(run: RunDirectory, tmp_path: Path) -> None:
    whole = export(run, tmp_path / "whole.gguf")
    first = export(run, tmp_path / "parts.gguf", split_max_bytes=200_000)
    parts = sorted(tmp_path.glob("parts-*"))
    assert first == parts[0] == tmp_path / f"parts-00001-of-{len(parts):05d}.gguf"
    assert len(parts) > 2
    assert not (tmp_path / "parts.gguf").exists()
    one, several = GgufFile.open(whole), GgufFile.open(first)
    assert several.metadata == one.metadata
    assert list(several.tensors) == list(one.tensors)
    assert all(np.array_equal(one.raw(name), several.raw(name)) for name in one.tensors)
    if (reason := LlamaCppRuntime().unavailable()) is not None:
        pytest.skip(reason)
    tokens = np.arange(3, 40, dtype=np.int64)
    with LlamaCppRuntime().open(whole) as a, LlamaCppRuntime().open(first) as b:
        assert np.array_equal(a.logits(tokens), b.logits(tokens))


def test_the_files_of_a_model_are_known_by_the_name_of_any_of_them(run: RunDirectory, tmp_path: Path) -> None:
    export(run, tmp_path / "a.b-00001.gguf", split_max_bytes=200_000)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    assert [model_files(part) for part in parts] == [parts] * len(parts)


@pytest.mark.parametrize("name", ["a.gguf", "a-00001-of-00003.bin", "a-00004-of-00003.gguf", "a-00000-of-00000.gguf"])
def test_other_names_are_of_models_in_one_file(name: str) -> None:
    assert model_files(Path(name)) == [Path(name)]


def test_broken_sets_are_one_sentence(run: RunDirectory, tmp_path: Path) -> None:
    first = export(run, tmp_path / "m.gguf", split_max_bytes=200_000)
    second, third = sorted(tmp_path.glob("m-*"))[1:3]
    with pytest.raises(UserError, match="give the first"):
        GgufFile.open(second)
    copied = tmp_path / "renamed.gguf"
    shutil.copy(first, copied)
    with pytest.raises(UserError, match="give the first"):
        GgufFile.open(copied)
    kept = third.read_bytes()
    third.unlink()
    with pytest.raises(UserError, match=rf"{third.name} is missing"):
        GgufFile.open(first)
    shutil.copy(second, third)
    with pytest.raises(UserError, match="is not part 3"):
        GgufFile.open(first)
    third.write_bytes(kept)
    assert GgufFile.open(first).tensors
