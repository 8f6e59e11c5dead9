"""A small model and its exports, made once for all tests of `verify`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from exporters.onnx import OnnxExporter
from exporters.onnx.options import OnnxOptions
from runtime_tests.report.report import VerifyReport
from runtime_tests.verify import verify
from signround_edge.demo.train_tiny_llama import save_tokenizer, train_tokenizer
from signround_edge.run_directory import RunDirectory
from tests.support import make_run, save_random_model

WORDS = "the people of this country have asked what their government may do for them and we answer in plain words. "


def quiet(_line: str) -> None:
    """Tests need no progress."""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 4,000 words in random order."""
    words = WORDS.split(" ")[:-1]
    order = torch.randint(len(words), (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in order) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Llama with random weights, large enough that its predictions are sharp; grouped-query attention, tied head."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(train_tokenizer(text.read_text(encoding="utf-8"), 300), folder)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return save_random_model(config, folder)


@pytest.fixture(scope="session")
def run(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Q4_0 matrices and a Q6_K head: one run for both formats."""
    return make_run(small_model, tmp_path_factory.mktemp("run") / "run", "gguf:q4_0,onnx:w4g32")


@pytest.fixture(scope="session")
def gguf_file(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GgufExporter().export(run, tmp_path_factory.mktemp("gguf") / "model.gguf", ExportOptions(log=quiet))


@pytest.fixture(scope="session")
def onnx_folder(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OnnxExporter().export(run, tmp_path_factory.mktemp("onnx") / "model", ExportOptions(log=quiet))


@pytest.fixture(scope="session")
def onnx_int8_folder(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with activations rounded to int8 at run time."""
    options = OnnxOptions(accuracy_level=4, log=quiet)
    return OnnxExporter().export(run, tmp_path_factory.mktemp("onnx4") / "model", options)


def copy_of(artifact: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    target = folder / artifact.name
    if artifact.is_dir():
        shutil.copytree(artifact, target)
    else:
        shutil.copy(artifact, target)
    return target


@pytest.fixture
def check(run: RunDirectory, text: Path) -> Callable[[Path], VerifyReport]:
    """`verify` at a size that still shows every sabotage."""
    return lambda artifact: verify(run, [artifact], text, n_ctx=64, max_windows=2, log=str)


@pytest.fixture
def gguf(gguf_file: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copy(gguf_file, tmp_path / "model.gguf"))


@pytest.fixture
def onnx_copy(onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(onnx_folder, tmp_path / "onnx")
