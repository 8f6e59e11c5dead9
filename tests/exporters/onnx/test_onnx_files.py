"""Forms of the files: data in shards for the web, and ONNX Runtime's own format (.ort)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from exporters.onnx import OnnxExporter
from exporters.onnx.artifact import ort_format
from exporters.onnx.artifact.reader import changed_files, open_artifact, read_tensors
from runtime_tests.verify import verify
from runtime_tests.worker.onnxruntime_engine import OnnxEngine
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import Exported, export
from tests.exporters.onnx.test_onnx_export import (
    TOKENS,
    assert_weights_equal,
    expected_tokens,
    generated,
    mean_kl,
    onnx_logits,
    torch_logits,
)

SHARD = 200_000


@pytest.fixture(scope="module")
def sharded(llama_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(llama_run, export(llama_run, tmp_path_factory.mktemp("sharded") / "out", split_max_bytes=SHARD))


def test_shards_stay_below_the_limit_and_hold_all_of_the_data(sharded: Exported, llama_export: Exported) -> None:
    names = sorted(f.name for f in sharded.folder.glob("model.onnx.data*"))
    sizes = [(sharded.folder / name).stat().st_size for name in names]
    assert names[:2] == ["model.onnx.data", "model.onnx.data_1"]
    assert len(names) >= 3
    assert max(sizes) <= SHARD
    assert abs(sum(sizes) - (llama_export.folder / "model.onnx.data").stat().st_size) < 8192 * len(names)
    assert set(names) < set(json.loads((sharded.folder / "signround_edge.json").read_text())["files"])


def test_shards_hold_the_run_and_run_as_one_file_does(sharded: Exported, llama_export: Exported) -> None:
    assert_weights_equal(sharded.run, sharded.folder)
    assert torch.equal(onnx_logits(sharded.folder, TOKENS), onnx_logits(llama_export.folder, TOKENS))
    assert generated(sharded.folder, [5, 6, 7], 10) == expected_tokens(sharded.run, [5, 6, 7], 10)
    graph = open_artifact(sharded.folder).graph
    embedding, head = (
        graph.initializers[f"{n}.MatMulNBits.qweight"].const_value for n in ("model.embed_tokens", "lm_head")
    )
    assert (embedding.location, embedding.offset) == (head.location, head.offset)


def test_a_tensor_above_the_limit_has_a_file_of_its_own(llama_run: RunDirectory, tmp_path: Path) -> None:
    out = export(llama_run, tmp_path / "out", split_max_bytes=20_000)
    sizes = [f.stat().st_size for f in out.glob("model.onnx.data*")]
    assert sum(size > 20_000 for size in sizes) >= 5
    assert_weights_equal(llama_run, out)


def test_a_missing_shard_is_one_sentence(sharded: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded.folder, tmp_path / "out")
    (folder / "model.onnx.data_1").unlink()
    with pytest.raises(UserError, match=r"model\.onnx\.data_1 is missing"):
        read_tensors(folder)


@pytest.fixture(scope="module")
def with_ort(llama_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """At accuracy level 4 and with scales in f16: both are different in the .ort file or need care there."""
    out = tmp_path_factory.mktemp("ort") / "out"
    options = {"ort_format": True, "accuracy_level": 4, "scale_dtype": "f16"}
    return Exported(llama_run, export(llama_run, out, **options))


def test_the_ort_file_is_an_artifact_with_every_weight_of_the_run(with_ort: Exported) -> None:
    file = with_ort.folder / "model.ort"
    assert OnnxExporter().recognises(file)
    assert_weights_equal(with_ort.run, file)
    kinds = [kind for _, kind, _, _ in read_tensors(file)]
    assert {"MatMulNBits-4x32", "MatMulNBits-8x16", "GatherBlockQuantized-8x16"} <= set(kinds)
    assert {"model.ort", "model.required_operators.config"} <= set(
        json.loads((with_ort.folder / "signround_edge.json").read_text())["files"]
    )
    assert changed_files(with_ort.folder) == []


def test_the_ort_file_computes_what_the_onnx_file_computes(with_ort: Exported) -> None:
    tokens = TOKENS[0].numpy().astype(np.int32)
    logits = OnnxEngine(with_ort.folder / "model.ort").logits(tokens)
    # Not equal: on loading model.onnx, but not model.ort, ONNX Runtime fuses SiLU, and int8 rounding magnifies that.
    assert mean_kl(*(torch.from_numpy(x) for x in (OnnxEngine(with_ort.folder).logits(tokens), logits))) <= 1e-3
    in_floats = OnnxEngine(with_ort.folder / "model.ort", accuracy_level=0).logits(tokens)
    assert not np.array_equal(in_floats, logits)
    assert mean_kl(torch_logits(with_ort.run, TOKENS), torch.from_numpy(in_floats)) <= 1e-9


def test_the_operator_list_names_what_the_graph_runs(with_ort: Exported) -> None:
    lines = (with_ort.folder / "model.required_operators.config").read_text().splitlines()
    assert lines[1] == "# - model.ort"
    ours = next(line for line in lines if line.startswith("com.microsoft;1;"))
    for operator in ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention"):
        assert operator in ours
    assert not any("Cast" in line and "float16" in line for line in lines)  # folded


def test_verify_judges_the_ort_file_by_itself(with_ort: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(with_ort.folder, tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("the people of the world have told the world of the people " * 60)
    report = verify(with_ort.run, [folder, folder / "model.ort"], text, n_ctx=64, max_windows=2, log=str)
    assert report.passed
    assert [a.status for a in report.artifacts] == ["pass", "pass"]
    ort = report.runtimes[1]
    assert ort.artifact.endswith("model.ort")
    assert ort.control is not None
    assert (ort.control.kld_mean or 1) <= 1e-6
    # One flipped bit of a code, with honest hashes.
    file = folder / "model.ort"
    data = bytearray(file.read_bytes())
    codes = open_artifact(file).array("model.layers.1.mlp.up_proj.MatMulNBits.qweight").tobytes()
    data[data.index(codes) + 100] ^= 1
    file.write_bytes(data)
    report = verify(with_ort.run, [file], text, n_ctx=64, max_windows=1, log=str)
    assert not report.passed
    assert "/model/layers.1/mlp/up_proj/MatMulNBits" in str(report.artifacts[0].reason)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1000])
def test_a_damaged_ort_file_is_one_sentence(keep: int, with_ort: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(with_ort.folder, tmp_path / "out")
    file = folder / "model.ort"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.ort") as caught:
        read_tensors(file)
    assert "\n" not in str(caught.value)


def test_a_model_too_large_for_the_format_is_one_sentence(
    llama_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_format, "_MOST_BYTES", 100_000)
    with pytest.raises(UserError, match=r"--ort-format: the model has [\d,]+ bytes.*less than 2 GB"):
        export(llama_run, tmp_path / "out", ort_format=True)
    assert list(tmp_path.iterdir()) == []


def test_reading_the_format_leaves_no_trace(with_ort: Exported) -> None:
    code = (
        "import logging, sys; from pathlib import Path; "
        "from exporters.onnx.artifact.ort_format import read_ort_format; "
        f"read_ort_format(Path({str(with_ort.folder / 'model.ort')!r})); "
        "sys.exit(len(logging.getLogger().handlers))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_writing_the_format_says_nothing_by_itself(llama_export: Exported, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(llama_export.folder / name, tmp_path)
    code = (
        "from pathlib import Path; from exporters.onnx.artifact.ort_format import write_ort_format; "
        f"write_ort_format(Path({str(tmp_path / 'model.onnx')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_plain_onnx_runtime_loads_the_file(with_ort: Exported) -> None:
    session = onnxruntime.InferenceSession(str(with_ort.folder / "model.ort"), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].name == "logits"


def test_the_working_folder_can_be_exported_to_again_and_again(
    llama_run: RunDirectory, llama_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.open(llama_run.path.absolute())
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert export(run, Path()) == Path()
        assert OnnxExporter().recognises(Path())
        assert changed_files(Path()) == []
        assert {file.name for file in tmp_path.iterdir()} == {file.name for file in llama_export.folder.iterdir()}
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()
