"""A file that is not what the run says fails, and the report names what is off."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters.gguf import GgufExporter
from exporters.gguf.container.reader import GgufFile
from exporters.interface import ExportOptions
from exporters.onnx.artifact.sidecar import SIDECAR, hash_files
from runtime_tests.report.report import VerifyReport
from runtime_tests.transports.local import LocalWorker
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory

Q4_0_BYTES = 18


def edit(path: Path, offset: int, change: Callable[[bytes], bytes], size: int = 1) -> None:
    """Replace `size` bytes at `offset`."""
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(size)
        file.seek(offset)
        file.write(change(old))


def next_fp16(raw: bytes) -> bytes:
    """The neighbouring fp16 value: the smallest error that a scale can have."""
    return int.to_bytes(int.from_bytes(raw, "little") + 1, 2, "little")


def swap_nibbles(raw: bytes) -> bytes:
    return bytes((b >> 4) | (b & 15) << 4 for b in raw)


def flip_bit(raw: bytes) -> bytes:
    return bytes([raw[0] ^ 0x10])


def reasons(report: VerifyReport) -> str:
    return " ".join(filter(None, [a.reason for a in report.artifacts] + [r.reason for r in report.runtimes]))


GGUF_SABOTAGE: dict[str, tuple[str, int, int, Callable[[bytes], bytes]]] = {
    "one wrong scale": ("blk.1.ffn_down.weight", 5 * Q4_0_BYTES, 2, next_fp16),
    "swapped nibbles in one block": ("blk.0.attn_v.weight", 7 * Q4_0_BYTES + 2, 16, swap_nibbles),
    "one flipped bit in a code": ("blk.0.attn_q.weight", 1000 * Q4_0_BYTES + 9, 1, flip_bit),
    "one flipped bit in the embedding": ("token_embd.weight", 4321, 1, flip_bit),
    "one flipped bit in a norm": ("blk.1.attn_norm.weight", 2, 1, flip_bit),
}


# Nibbles are swapped in test_verify_names_what_is_off.py too; a norm is kept in floats, as nothing else here is.
OFTEN = ("one wrong scale", "one flipped bit in a code", "one flipped bit in a norm")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in OFTEN else pytest.mark.full) for what in GGUF_SABOTAGE]
)
def test_gguf_with_a_wrong_weight_fails_and_names_the_tensor(
    what: str, gguf: Path, check: Callable[[Path], VerifyReport]
) -> None:
    tensor, offset, size, change = GGUF_SABOTAGE[what]
    edit(gguf, GgufFile.open(gguf).tensors[tensor].offset + offset, change, size)
    report = check(gguf)
    assert not report.passed
    assert not report.weights_exact
    differences = report.artifacts[0].exactness.differences  # type: ignore[union-attr]
    assert [d.tensor for d in differences] == [tensor]
    assert f"tensor {tensor} " in reasons(report)


def test_gguf_with_two_tensors_exchanged_names_both(gguf: Path, check: Callable[[Path], VerifyReport]) -> None:
    file = GgufFile.open(gguf)
    gate, up = file.tensors["blk.0.ffn_gate.weight"], file.tensors["blk.0.ffn_up.weight"]
    first, second = file.raw(gate.name).tobytes(), file.raw(up.name).tobytes()
    edit(gguf, gate.offset, lambda _: second, gate.nbytes)
    edit(gguf, up.offset, lambda _: first, up.nbytes)
    differences = check(gguf).artifacts[0].exactness.differences  # type: ignore[union-attr]
    assert {d.tensor for d in differences} == {gate.name, up.name}


def set_f32(path: Path, key: str, value: float) -> None:
    """Overwrite an f32 metadata value in place."""
    content = path.read_bytes()
    start = content.index(len(key).to_bytes(8, "little") + key.encode()) + 8 + len(key) + 4
    edit(path, start, lambda _: np.float32(value).tobytes(), 4)


@pytest.mark.parametrize(
    ("key", "value"), [("llama.rope.freq_base", 5000.0), ("llama.attention.layer_norm_rms_epsilon", 1e-3)]
)
def test_gguf_with_wrong_graph_metadata_fails_and_names_the_key(
    key: str, value: float, gguf: Path, check: Callable[[Path], VerifyReport]
) -> None:
    set_f32(gguf, key, value)
    report = check(gguf)
    assert report.weights_exact
    assert report.status == "fail"
    assert key in reasons(report)


def test_gguf_of_a_template_with_a_wrong_rope_base_fails_by_its_control(
    run: RunDirectory, gguf_file: Path, tmp_path: Path, check: Callable[[Path], VerifyReport]
) -> None:
    options = ExportOptions(template=gguf_file, log=str)
    artifact = GgufExporter().export(run, tmp_path / "model.gguf", options)
    assert check(artifact).passed
    set_f32(artifact, "llama.rope.freq_base", 5000.0)
    report = check(artifact)
    assert report.weights_exact
    assert report.status == "fail"
    assert "the control, which computes in floats, shows that the graph differs" in reasons(report)


def test_gguf_with_a_tensor_renamed_fails(gguf: Path, check: Callable[[Path], VerifyReport]) -> None:
    edit(gguf, gguf.read_bytes().index(b"blk.0.attn_k.weight"), lambda _: b"blk.0.attn_x.weight", 19)
    report = check(gguf)
    assert report.status == "fail"
    assert "layers.0.self_attn.k_proj.weight" in reasons(report)


@pytest.mark.parametrize("share", [pytest.param(0.001, marks=pytest.mark.full), 0.05, 0.6, 0.999])
def test_a_truncated_gguf_fails(share: float, gguf: Path, check: Callable[[Path], VerifyReport]) -> None:
    content = gguf.read_bytes()
    gguf.write_bytes(content[: int(share * len(content))])
    report = check(gguf)
    assert report.status == "fail"
    assert str(gguf) in reasons(report)


def test_artifacts_of_another_run_fail(
    small_model: Path, tmp_path: Path, gguf_file: Path, onnx_folder: Path, text: Path
) -> None:
    from tests.support import make_run

    other = make_run(small_model, tmp_path / "other", "gguf:q4_1")
    report = verify(other, [gguf_file, onnx_folder], text, n_ctx=64, max_windows=1, log=str)
    assert report.status == "fail"
    assert [a.status for a in report.artifacts] == ["fail", "fail"]


def test_what_is_no_artifact_is_bad_input(tmp_path: Path, check: Callable[[Path], VerifyReport]) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    for path in (tmp_path / "notes.txt", tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(UserError, match=path.name):
            check(path)


def test_a_text_file_named_gguf_fails(tmp_path: Path, check: Callable[[Path], VerifyReport]) -> None:
    (tmp_path / "notes.gguf").write_text("no model")
    assert check(tmp_path / "notes.gguf").status == "fail"


def operand(folder: Path, node_part: str, position: int) -> tuple[Path, int, str]:
    """(file, offset, node) of a stored operand of the first MatMulNBits whose name holds `node_part`."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits" and node_part in n.name)
    tensor = next(t for t in model.graph.initializer if t.name == node.input[position])
    entries = {e.key: e.value for e in tensor.external_data}
    if entries:
        return folder / entries["location"], int(entries["offset"]), node.name
    content = (folder / "model.onnx").read_bytes()
    return folder / "model.onnx", content.index(tensor.raw_data), node.name


def rehash(folder: Path) -> None:
    """Make the sidecar's hashes those of the changed files, so that only the deeper checks are left."""
    file = folder / SIDECAR
    data: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "files": hash_files(folder)}))


ONNX_SABOTAGE: dict[str, tuple[int, int, Callable[[bytes], bytes]]] = {
    "one wrong scale": (2, 4, lambda raw: np.float32(np.frombuffer(raw, "<f4")[0] * 1.5).tobytes()),
    "swapped nibbles in one block": (1, 16, swap_nibbles),
    "zero point off by one": (3, 1, lambda raw: bytes([raw[0] ^ 1])),
    "one flipped bit in a code": (1, 1, flip_bit),
}


@pytest.mark.parametrize(
    ("what", "hashes_fit"),
    [
        pytest.param(what, fit, marks=() if fit == (number % 2 == 0) else pytest.mark.full)
        for number, what in enumerate(ONNX_SABOTAGE)
        for fit in (True, False)
    ],
)
def test_onnx_with_a_wrong_weight_fails_and_names_the_node(
    what: str, hashes_fit: bool, onnx_copy: Path, check: Callable[[Path], VerifyReport]
) -> None:
    position, size, change = ONNX_SABOTAGE[what]
    file, offset, node = operand(onnx_copy, "layers.1/mlp/down", position)
    edit(file, offset, change, size)
    if hashes_fit:
        rehash(onnx_copy)
    report = check(onnx_copy)
    assert not report.weights_exact
    assert f"tensor {node} " in reasons(report)
    assert ("changed after export" in reasons(report)) is not hashes_fit


def test_onnx_with_a_wrong_rope_table_fails(onnx_copy: Path, check: Callable[[Path], VerifyReport]) -> None:
    path = onnx_copy / "model.onnx"
    model = onnx.load(path)
    table = next(t for t in model.graph.initializer if "cos_cache" in t.name)
    values = onnx.numpy_helper.to_array(table)
    table.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, axis=0), table.name))
    (onnx_copy / "model.onnx.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    rehash(onnx_copy)
    report = check(onnx_copy)
    assert report.weights_exact
    assert report.status == "fail"
    assert "KL divergence" in reasons(report)


def test_onnx_with_another_tokenizer_fails(onnx_copy: Path, check: Callable[[Path], VerifyReport]) -> None:
    edit(onnx_copy / "tokenizer.json", 500, flip_bit)
    report = check(onnx_copy)
    assert report.status == "fail"
    assert "tokenizer.json" in reasons(report)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json", SIDECAR])
def test_a_truncated_onnx_folder_fails(name: str, onnx_copy: Path, check: Callable[[Path], VerifyReport]) -> None:
    content = (onnx_copy / name).read_bytes()
    (onnx_copy / name).write_bytes(content[: len(content) // 2])
    report = check(onnx_copy)
    assert report.status == "fail"
    assert name in reasons(report)


@pytest.mark.parametrize("damage", [0.5, 1.0])
def test_nothing_is_left_behind(
    damage: float, gguf: Path, tmp_path: Path, check: Callable[[Path], VerifyReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = gguf.read_bytes()
    gguf.write_bytes(content[: int(damage * len(content))])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert check(gguf).passed is (damage == 1.0)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_interrupted_verify_leaves_nothing_behind(
    gguf: Path, run: RunDirectory, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("window 2"):
            raise KeyboardInterrupt

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    started: list[LocalWorker] = []
    start = LocalWorker.__init__

    def recorded(self: LocalWorker, *arguments: Any) -> None:
        start(self, *arguments)
        started.append(self)

    monkeypatch.setattr(LocalWorker, "__init__", recorded)
    with pytest.raises(KeyboardInterrupt):
        verify(run, [gguf], text, n_ctx=64, max_windows=2, log=interrupt)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert len(started) == 3  # stored weights, the artifact, its control
    for worker in started:
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)


SEEDS = [*range(2), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 60))]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_flipped_bit_in_the_head_of_a_gguf_fails(
    seed: int, gguf: Path, check: Callable[[Path], VerifyReport]
) -> None:
    """Magic, counts, keys, values, tensor descriptions; the padding before the data (up to 31 bytes) means nothing."""
    generator = random.Random(seed)
    end = min(t.offset for t in GgufFile.open(gguf).tensors.values()) - 31
    bit = 1 << generator.randrange(8)
    edit(gguf, generator.randrange(end), lambda raw: bytes([raw[0] ^ bit]))
    report = check(gguf)
    assert report.status == "fail"
    assert reasons(report)


@pytest.mark.parametrize("hashes_fit", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_flipped_bit_in_an_onnx_graph_fails_or_changes_nothing(
    seed: int, hashes_fit: bool, onnx_copy: Path, check: Callable[[Path], VerifyReport]
) -> None:
    """With hashes that fit it passes where only a name changed that nobody reads."""
    generator = random.Random(seed)
    path = onnx_copy / "model.onnx"
    bit = 1 << generator.randrange(8)
    edit(path, generator.randrange(path.stat().st_size), lambda raw: bytes([raw[0] ^ bit]))
    if hashes_fit:
        rehash(onnx_copy)
    report = check(onnx_copy)
    assert report.status in (("fail", "pass") if hashes_fit else ("fail",))
    if report.status == "pass":
        assert report.weights_exact
        assert report.to_json()["runtimes"][0]["kld_mean"] <= 1e-5
