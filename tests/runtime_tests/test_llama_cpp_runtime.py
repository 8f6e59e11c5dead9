"""llama.cpp through the prebuilt shared object: struct checks, logits, tokenizer, refusals, and crashes."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters.gguf import GgufExporter
from exporters.gguf.container.reader import GgufFile
from exporters.interface import ExportOptions
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime, dequantize
from runtime_tests.transports.local import WorkerFailure
from runtime_tests.worker import llama_cpp_bindings as bindings
from runtime_tests.worker.llama_cpp_engine import MICRO_BATCH
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import ScoreKeeper
from signround_edge.evaluation.perplexity import TorchSession
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.run_directory import RunDirectory


def own_workers() -> list[int]:
    """Worker processes whose parent is this process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if parent == os.getpid() and b"runtime_tests.worker" in command:
            found.append(int(stat.parent.name))
    return found


def random_tokens(count: int, vocab: int = 300) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, count).astype(np.int32)


@pytest.fixture(scope="module")
def f32_file(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ExportOptions(dtype="f32", log=str)
    return GgufExporter().export(run, tmp_path_factory.mktemp("f32") / "model.gguf", options)


def test_another_version_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "VERSION", "2026.1.1")
    assert "its C structs are only known for 2026.1.1" in str(LlamaCppRuntime().unavailable())
    with pytest.raises(UserError, match=r"llama\.cpp cannot run here"):
        bindings.load_library()


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert f"pip install xllamacpp=={bindings.VERSION}" in str(LlamaCppRuntime().unavailable())


@pytest.mark.parametrize("table", ["MODEL_DEFAULTS", "CONTEXT_DEFAULTS"])
def test_a_library_with_another_struct_layout_is_refused(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = next((k, v) for k, v in getattr(bindings, table).items() if isinstance(v, int))
    monkeypatch.setitem(getattr(bindings, table), name, value + 1)
    with pytest.raises(UserError, match="has another layout"):
        bindings.load_library()


def test_f32_logits_are_those_of_torch_at_every_position(f32_file: Path, run: RunDirectory) -> None:
    tokens = random_tokens(200)
    with LlamaCppRuntime().open(f32_file) as session:
        found = session.logits(tokens)
    expected = TorchSession(load_run_model(run)).logits(tokens)
    assert found.shape == expected.shape == (200, 300)
    assert float(np.abs(found - expected).max()) < 0.01  # keys and values are cached in f16


def test_a_window_starts_from_an_empty_cache(gguf_file: Path) -> None:
    tokens = random_tokens(100)
    with LlamaCppRuntime().open(gguf_file) as session:
        first = session.logits(tokens)
        session.logits(random_tokens(300))
        again = session.logits(tokens)
    np.testing.assert_array_equal(first, again)


def test_windows_longer_than_the_micro_batch_work(f32_file: Path, run: RunDirectory) -> None:
    tokens = random_tokens(MICRO_BATCH + 60)
    keeper = ScoreKeeper()
    with LlamaCppRuntime().open(f32_file) as session:
        found = session.logits(tokens)
    keeper.add(found[:-1], tokens[1:], TorchSession(load_run_model(run)).logits(tokens)[:-1])
    kld = keeper.scores().kld_mean
    assert kld is not None
    assert kld < 1e-6


def test_the_tokenizer_is_the_original_one(gguf_file: Path, small_model: Path) -> None:
    original = AutoTokenizer.from_pretrained(small_model)
    text = "The people's answer — plain words;\n\n  two  spaces 123, größer!"
    with LlamaCppRuntime().open(gguf_file) as session:
        assert session.bos == original.bos_token_id
        tokens = session.tokenize(text)
        assert tokens == original(text)["input_ids"]
        assert session.detokenize(tokens) == text


def test_greedy_text_is_that_of_transformers(f32_file: Path, run: RunDirectory, small_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model)
    model.load_state_dict(dict(run.state_dict()), strict=False)
    prompt = random_tokens(12).tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=1)[0, 12:]
    with LlamaCppRuntime().open(f32_file) as session:
        found = session.generate(prompt, 16)
    assert found == [t for t in expected.tolist() if t != 1]


def test_tokens_outside_the_vocabulary_are_bad_input(gguf_file: Path) -> None:
    with LlamaCppRuntime().open(gguf_file) as session, pytest.raises(UserError, match="token 300 is outside"):
        session.logits(np.array([1, 300], dtype=np.int32))


def test_stored_tensors_are_all_tensors_of_the_file(gguf_file: Path) -> None:
    stored = {t.name: t for t in LlamaCppRuntime().stored_tensors(gguf_file)}
    infos = GgufFile.open(gguf_file).tensors
    assert list(stored) == list(infos)
    for name, info in infos.items():
        assert stored[name].weights.size == int(np.prod(info.shape))
        assert stored[name].stored_type == info.ggml_type.name


def test_blocks_of_an_unknown_type_or_a_wrong_length_are_bad_input() -> None:
    with pytest.raises(UserError, match="no tensor type 99"):
        dequantize(99, bytes(18), 1, 32)
    with pytest.raises(UserError, match="17 bytes are not 32 values"):
        dequantize(2, bytes(17), 1, 32)


def test_a_file_that_llama_cpp_refuses_is_one_sentence_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UserError, match=r"llama\.cpp refuses .*bad\.gguf: "):
        LlamaCppRuntime().open(tmp_path / "bad.gguf")
    with pytest.raises(UserError, match="is not a file"):
        LlamaCppRuntime().open(tmp_path)


def test_a_file_that_aborts_llama_cpp_is_one_sentence_and_leaves_nothing_behind(
    gguf_file: Path, tmp_path: Path
) -> None:
    """Two tokens of the same text: llama.cpp's vocabulary asserts, which ends the process."""
    broken = Path(shutil.copy(gguf_file, tmp_path / "model.gguf"))
    content = broken.read_bytes()
    tokens = GgufFile.open(broken).get("tokenizer.ggml.tokens")
    twice = [t for t in tokens if len(t) == 1][:2]
    listed = content.index(b"tokenizer.ggml.tokens")
    first, second = (content.index((1).to_bytes(8, "little") + t.encode(), listed) + 8 for t in twice)
    broken.write_bytes(content[:second] + content[first : first + 1] + content[second + 1 :])
    with pytest.raises(WorkerFailure, match=r"SIGABRT.*GGML_ASSERT"):
        LlamaCppRuntime().open(broken)
    assert own_workers() == []
