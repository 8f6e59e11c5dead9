"""mmproj files: what llama.cpp's own converter writes, and in llama.cpp the embeddings that transformers makes.

The converter's file is compared value by value. llama.cpp loads the text file and the mmproj file together, in a
process of its own, and encodes an image.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from benchmarks.llama_converter import Converter
from benchmarks.llama_converter import why_unavailable as no_converter
from benchmarks.models.small_models import build
from exporters.gguf.container.reader import GgufFile
from exporters.gguf.mmproj.table import TOWERS
from runtime_tests.worker.llama_cpp_bindings import why_unavailable as no_llama_cpp
from signround_edge import api
from signround_edge.cli import main
from signround_edge.demo import evaluation_text_path
from signround_edge.errors import UserError
from signround_edge.manifest import Manifest
from signround_edge.tuning.settings import TuningSettings
from tests.exporters.gguf.multimodal import ALIKE, BREAK, SMALL, publish, random_image, reference_embeddings

ROUND = TuningSettings(steps=0, samples=2, seqlen=32)

ALWAYS = {
    "general.name": "the converter makes a title of the folder's name",
    "general.size_label": "for lists of models on Hugging Face; the converter counts parameters, llama.cpp never reads",
    "signround_edge.version": "where the weights come from",
    "signround_edge.scheme": "where the weights come from",
    "signround_edge.manifest_sha256": "where the weights come from",
}
_BREAKS = {
    "v.token_embd.img_break": "the converter leaves the language model's tensors out before it looks for this one, and "
    "llama.cpp then puts no [IMG_BREAK] behind the rows of an image, as these models' processor does"
}
# Keys and tensors that differ, by family.
DIFFERENT: dict[str, dict[str, str]] = {
    "qwen2_vl": {"clip.vision.feed_forward_length": "the converter writes the width of the language model"},
    "mistral3": _BREAKS,
    "llava": _BREAKS,
    "gemma4": {
        "clip.use_gelu": "without it llama.cpp computes x·sigmoid(1.702·x), transformers the tanh approximation: the "
        "embeddings differ by 0.0085, with it by 0.0015"
    },
}
# Worst found: 0.0015 (Gemma 4; matrices in f16, and llama.cpp's activations as well).
LARGEST_ERROR = 0.003


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    reason = no_converter()
    if reason is not None:
        pytest.skip(reason)
    with Converter() as running:
        yield running


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with `model` and `run` of a family, made once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = folder = tmp_path_factory.mktemp(name)
            publish(name, folder / "model")
            api.quantize(folder / "model", "gguf:q8_0", folder / "run", settings=ROUND, source_check="off")
        return folders[name]

    return make


def write_mmproj(folder: Path, out: Path) -> Path:
    """The mmproj file alone."""
    from exporters.gguf.mmproj.export import Mmproj
    from signround_edge.run_directory import RunDirectory

    return Mmproj(RunDirectory.open(folder / "run"), out, str(folder / "model")).write()


def test_every_tower_has_a_case() -> None:
    assert set(TOWERS) - {"qwen3_5_moe"} == {*SMALL, *ALIKE}  # whose tower is Qwen3.5's


# Positions in one dimension and in three, tiles, and rows that end with a token.
QUICK = ("gemma3", "smolvlm", "qwen3_vl", "mistral3")


def often(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: those not in `QUICK` run with the full tests only."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", often([*SMALL, *ALIKE]))
def test_the_file_is_the_converters(
    name: str, made: Callable[[str], Path], converter: Converter, tmp_path: Path
) -> None:
    ours = GgufFile.open(write_mmproj(made(name), tmp_path / "ours.gguf"))
    theirs = GgufFile.open(converter.convert(made(name) / "model", tmp_path / "theirs.gguf", "f16", ["--mmproj"]))
    keys = {key for key in {*ours.metadata, *theirs.metadata} if ours.metadata.get(key) != theirs.metadata.get(key)}
    tensors = {
        tensor for tensor in {*ours.tensors, *theirs.tensors} if contents(ours, tensor) != contents(theirs, tensor)
    }
    assert keys - {*ALWAYS} | tensors == {*DIFFERENT.get(name, {})}


def contents(file: GgufFile, name: str) -> tuple[tuple[int, ...], str, bytes] | None:
    """Shape, type and bytes of a tensor; None where there is none."""
    info = file.tensors.get(name)
    return None if info is None else (info.shape, info.ggml_type.name, file.raw(name).tobytes())


@pytest.mark.parametrize("name", often(SMALL))
def test_llama_cpp_reads_images_as_transformers_does(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    reason = no_llama_cpp()
    if reason is not None:
        pytest.skip(reason)
    folder, text, image = made(name), tmp_path / "text.gguf", random_image(name)
    api.export(folder / "run", "gguf", text, mmproj=tmp_path / "mmproj.gguf", mmproj_from=folder / "model")
    found, three_positions = encode(text, tmp_path / "mmproj.gguf", image, tmp_path)
    assert three_positions == name.startswith("qwen")
    if name == "smolvlm":
        found = found[:-4]  # the whole image comes last, scaled; the tiles are as they are
    if name == "mistral3":
        found = without_breaks(found, folder / "model")
    expected = reference_embeddings(name, folder / "model", image)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < LARGEST_ERROR


def encode(text: Path, mmproj: Path, image: NDArray[np.uint8], folder: Path) -> tuple[NDArray[np.float32], bool]:
    """What llama.cpp gives the language model for an image, and whether a token of it has a place in each dimension."""
    np.save(folder / "image.npy", image)
    command = [sys.executable, "-m", "tests.exporters.gguf.mtmd_process", text, mmproj, "image.npy", "embeddings.npy"]
    paths = [folder / part if str(part).endswith(".npy") else part for part in command]
    done = subprocess.run(list(map(str, paths)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: NDArray[np.float32] = np.load(folder / "embeddings.npy")
    return found, "M-RoPE" in done.stdout


def without_breaks(found: NDArray[np.float32], model: Path) -> NDArray[np.float32]:
    """Of embeddings [14, width] of an image of three rows and four columns: each row but the last ends in a break."""
    table = load_file(model / "model.safetensors")["language_model.model.embed_tokens.weight"].numpy()
    tokens = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    number = next(token["id"] for token in tokens if token["content"] == BREAK)
    assert len(found) == 14
    for place in (4, 9):
        np.testing.assert_array_equal(found[place], table[number])
    return np.delete(found, (4, 9), axis=0)


def test_the_command_writes_both_files_or_says_how(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("gemma3")
    arguments = ["export", str(folder / "run"), "--format", "gguf", "-o", str(tmp_path / "text.gguf")]
    alone = CliRunner().invoke(main, arguments)
    assert alone.exit_code == 0
    assert "text.gguf is for text only; for images, --mmproj FILE --mmproj-from MODEL writes the file" in alone.output
    text = (tmp_path / "text.gguf").read_bytes()
    mmproj = tmp_path / "mmproj.gguf"
    both = CliRunner().invoke(main, [*arguments, "--mmproj", str(mmproj), "--mmproj-from", str(folder / "model")])
    assert both.exit_code == 0
    assert "for text only" not in both.output
    assert (tmp_path / "text.gguf").read_bytes() == text
    assert mmproj.read_bytes() == write_mmproj(folder, tmp_path / "alone.gguf").read_bytes()


def test_a_tower_without_a_table_is_the_converters_to_make(made: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(made("gemma3") / "run", tmp_path / "run")
    manifest = Manifest.from_json((tmp_path / "run" / "manifest.json").read_text())
    manifest.source["inside"] = "internvl"
    (tmp_path / "run" / "manifest.json").write_text(manifest.to_json())
    lines: list[str] = []
    api.export(tmp_path / "run", "gguf", tmp_path / "text.gguf", progress=lines.append)
    assert "`convert_hf_to_gguf.py MODEL --mmproj --outtype f16`" in lines[-1]


def refusal(folder: Path, out: Path, model: Path | None, mmproj: str = "mmproj.gguf") -> str:
    """What `export --mmproj` says; nothing is written."""
    with pytest.raises(UserError) as caught:
        api.export(folder / "run", "gguf", out / "text.gguf", mmproj=out / mmproj, mmproj_from=model)
    assert list(out.glob("*.gguf")) == []
    return str(caught.value)


def test_verify_says_what_an_mmproj_file_is(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("gemma3")
    file = write_mmproj(folder, tmp_path / "mmproj.gguf")
    report = api.verify(folder / "run", [file], evaluation_text_path(), windows=1, n_ctx=64)
    assert not report.passed
    assert "mmproj.gguf is an mmproj file" in str(report.artifacts[0].reason)


def test_what_no_mmproj_file_can_be_made_of_is_said(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = made("gemma3"), tmp_path / "out"
    out.mkdir()
    assert "(model), of which the run holds the language model only; give its folder with --mmproj-from" in refusal(
        folder, out, None
    )
    assert "gone does not exist; give a model folder or a Hugging Face name" in refusal(folder, out, tmp_path / "gone")
    other = shutil.copytree(folder / "model", tmp_path / "other")
    (other / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json with image_mean and image_std" in refusal(folder, out, other)
    other = shutil.copytree(folder / "model", tmp_path / "changed")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    assert "is not the model that the run was made from (model.safetensors differs)" in refusal(folder, out, other)
    text_only = build("gemma3_text", tmp_path / "text_only")
    assert "reads text only, so it has no towers; leave --mmproj out" in refusal(folder, out, text_only)
    assert "--mmproj and -o are the same file" in refusal(folder, out, folder / "model", "text.gguf")
    with pytest.raises(UserError, match="--mmproj-from says where the towers are; add --mmproj FILE"):
        api.export(folder / "run", "gguf", out / "text.gguf", mmproj_from=folder / "model")
    with pytest.raises(UserError, match="--mmproj is for --format gguf; leave it out for ONNX"):
        api.export(folder / "run", "onnx", out / "onnx", mmproj=out / "mmproj.gguf")


@pytest.mark.parametrize(
    ("name", "entry", "value", "said"),
    [
        (
            "gemma3",
            "hidden_act",
            "relu",
            "hidden_act of vision_config is 'relu', and llama.cpp computes this tower with",
        ),
        ("qwen2_5_vl", "window_size", 56, "window_size of vision_config is 56"),
        ("qwen2_5_vl", "fullatt_block_indexes", [0, 3], "llama.cpp knows full attention in every nth layer only"),
        (
            "qwen3_vl",
            "hidden_act",
            "silu",
            "llama.cpp computes this tower with 'gelu_pytorch_tanh'; leave --mmproj out",
        ),
    ],
)
def test_a_tower_that_llama_cpp_computes_otherwise_is_refused(
    name: str, entry: str, value: object, said: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    other, out = shutil.copytree(made(name) / "model", tmp_path / "other"), tmp_path / "out"
    out.mkdir()
    config = json.loads((other / "config.json").read_text())
    config["vision_config"][entry] = value
    (other / "config.json").write_text(json.dumps(config))
    assert said in refusal(made(name), out, other)
