"""Whole files or none when writing; one sentence for anything damaged when reading."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from benchmarks.synthetic_run import Shape, write_synthetic_run
from exporters.gguf import GgufExporter
from exporters.gguf.blocks.ggml_types import F32
from exporters.gguf.container import reader as container_reader
from exporters.gguf.container import writer as container_writer
from exporters.gguf.container.reader import GgufFile
from exporters.gguf.container.writer import PlannedTensor, write_file
from exporters.gguf.reader import read_metadata, read_tensors
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge.errors import UserError
from signround_edge.files import sha256_of
from signround_edge.inspection import TensorInfo
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.conftest import BASE, export

RunOf = Callable[..., RunDirectory]


def matrix(name: str, rows: int, cols: int, pieces: int = 1) -> PlannedTensor:
    data = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols)
    return PlannedTensor(name, F32, data.shape, data.nbytes, lambda: iter(np.array_split(data, pieces)))


def small_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_string("a.text", "naïve \N{ROCKET}")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.words", ["x", "", "zz"])
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    vector = np.array([1, 2, 3], dtype=np.float32)
    tensors = [
        matrix("m", 5, 7, pieces=3),
        PlannedTensor("v", F32, (3,), 12, lambda: iter([vector])),
        matrix("n", 2, 32),
    ]
    return write_file(path, writer, tensors)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_file(tmp_path_factory.mktemp("small") / "a.gguf").read_bytes()


def test_written_files_read_back_with_gguf_and_with_our_reader(tmp_path: Path) -> None:
    path = small_file(tmp_path / "deep" / "er" / "a.gguf")
    theirs, ours = gguf.GGUFReader(path), GgufFile.open(path)
    assert [(t.name, tuple(t.shape[::-1]), t.data_offset, t.n_bytes) for t in theirs.tensors] == [
        (t.name, t.shape, t.offset, t.nbytes) for t in ours.tensors.values()
    ]
    assert all(offset % 32 == 0 for offset in (t.data_offset for t in theirs.tensors))
    assert np.array_equal(theirs.tensors[0].data, np.arange(35, dtype=np.float32).reshape(5, 7))
    assert np.array_equal(ours.raw("m").view(np.float32), np.arange(35, dtype=np.float32).reshape(5, 7))
    expected = {
        "a.text": "naïve 🚀",
        "a.numbers": [1, 2, 3],
        "a.words": ["x", "", "zz"],
        "a.float": 0.5,
        "a.flag": True,
    }
    assert {key: read_metadata(path)[key] for key in expected} == expected
    assert read_tensors(path)[1] == ("v", "F32", (3,), 12)
    assert list(path.parent.iterdir()) == [path]


def test_every_truncation_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    # The last tensor ends at the last byte, so any shorter file lacks something.
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            read_tensors(path)


@given(position=st.integers(0, 2000), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_byte_brings_the_reader_down(content: bytes, tmp_path: Path, position: int, value: int) -> None:
    damaged = bytearray(content)
    damaged[position % len(damaged)] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        file = GgufFile.open(path)
        for name in file.tensors:
            file.raw(name).sum()
    except UserError as error:
        assert "damaged.gguf" in str(error)  # noqa: PT017


@given(data=st.binary(max_size=400))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_behind_the_magic_bring_the_reader_down(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + data)
    try:
        GgufFile.open(path)
    except UserError as error:
        assert "random.gguf" in str(error)  # noqa: PT017


def head(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def described(name: bytes, dims: list[int], offset: int = 0) -> bytes:
    """The description of an F32 tensor."""
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", 0, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (head(version=99) + bytes(60), "version 99"),
        (head(tensors=1 << 60) + bytes(60), "announces"),
        (head(entries=1 << 60) + bytes(60), "announces"),
        (head(entries=1) + struct.pack("<Q", 1 << 62) + bytes(60), "announces"),
        (head(entries=1) + struct.pack("<Q1sI", 1, b"k", 77) + bytes(60), "unknown type 77"),
        (head(entries=1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 1 << 61) + bytes(60), "announces"),
        (head(tensors=1) + struct.pack("<Q1sI", 1, b"t", 9) + bytes(60), "9 dimensions"),
        (head(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 1 << 62, 0, 0) + bytes(60), "lies beyond its end"),
        (head(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 5, 2, 0) + bytes(60), "no multiple of 32"),
        (head(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 5, 9999, 0) + bytes(60), "type 9999, unknown"),
        (head(tensors=1) + described(b"t", [0, 1 << 60]) + bytes(60), "tensor 't' has no values"),
        (head(tensors=1) + described(b"t", [1 << 32, 1 << 32]) + bytes(60), "lies beyond its end"),
        (head(tensors=1) + described(b"", [1]) + bytes(60), "a tensor is called ''"),
        (head(tensors=1) + described(b"a\x1b[31m\nb", [1]) + bytes(60), r"a tensor is called 'a\\x1b\[31m\\nb'"),
        (head(tensors=1) + described(b"\xff", [1]) + bytes(60), r"a tensor is called '\\udcff'"),
        (head(tensors=1) + described(b"t" * 64, [1]) + bytes(60), "longer than 63 bytes"),
        (head(tensors=2) + described(b"t", [8]) + described(b"u", [8]) + bytes(99), "'u' does not follow"),
        (head(tensors=1) + described(b"t", [8]) + bytes(150), r"\d+ bytes follow its last tensor"),
        (head(entries=1) + struct.pack("<Q1sIB", 1, b"\n", 0, 0) + bytes(60), "a metadata entry is called"),
        (head(entries=1) + struct.pack("<Q11sIi", 11, b"split.count", 5, -4), "split.count is -4"),
        (head(entries=1) + struct.pack("<Q11sIQ", 11, b"split.count", 8, 100) + b"y" * 100, "split.count is 'y{56}…"),
        (head(entries=1) + struct.pack("<Q11sIf", 11, b"split.count", 6, 3.0), "split.count is 3.0"),
        (
            head(entries=1) + struct.pack("<Q19sIi", 19, b"split.tensors.count", 5, 7),
            "should hold 7 tensors",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"bad\.gguf.*{message}"):
        read_tensors(path)


def test_a_head_beyond_any_tokenizer_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of a gigabyte that really are in a damaged file would take eight as Python numbers."""
    monkeypatch.setattr(container_reader, "_MAX_HEAD", 1000)
    path = tmp_path / "a.gguf"
    path.write_bytes(head(entries=1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 2000) + bytes(2000))
    with pytest.raises(UserError, match="announces 2000 values"):
        GgufFile.open(path)


def test_the_exporter_recognises_and_inspects_its_files(tmp_path: Path) -> None:
    path, text, damaged = small_file(tmp_path / "a.bin"), tmp_path / "a.txt", tmp_path / "b.gguf"
    text.write_text("hello")
    damaged.write_bytes(b"")
    exporter = GgufExporter()
    assert [exporter.recognises(p) for p in (path, damaged, text, tmp_path)] == [True, True, False, False]
    assert exporter.inspect(path)[1] == TensorInfo("v", "F32", (3,), 12)


def test_inspecting_a_file_needs_no_torch(tmp_path: Path) -> None:
    """Which alone would take seconds."""
    path = small_file(tmp_path / "a.gguf")
    code = (
        "import sys; from pathlib import Path; from signround_edge.inspection import inspect; "
        "print(len(inspect(Path(sys.argv[1])).tensors), {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout == "3 set()\n", done.stderr


def test_missing_files_and_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="is a folder"):
        read_tensors(tmp_path)


def assert_nothing_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Iterator[np.ndarray]:
        yield np.zeros(8, dtype=np.float32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = gguf.GGUFWriter(None, "llama")
    with pytest.raises(UserError, match=r"a\.gguf was not written: the disk is full; free \d+ MB"):
        write_file(tmp_path / "a.gguf", writer, [PlannedTensor("t", F32, (16,), 64, full)])
    assert_nothing_left(tmp_path)


def test_a_disk_known_to_be_too_small_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = container_writer.shutil._ntuple_diskusage(100, 99, 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(container_writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="disk is full"):
        small_file(tmp_path / "a.gguf")
    assert_nothing_left(tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no room")
def test_room_that_cannot_be_reserved_for_lack_of_space_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="disk is full"):
        small_file(tmp_path / "a.gguf")
    assert_nothing_left(tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no room")
def test_a_file_system_that_reserves_no_room_gets_the_same_file(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(file: int, start: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unable)
    assert small_file(tmp_path / "a.gguf").read_bytes() == content


def test_a_really_full_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        usage = container_writer.shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # type: ignore[attr-defined]
        monkeypatch.setattr(container_writer.shutil, "disk_usage", lambda _: usage)
        writer = gguf.GGUFWriter(None, "llama")
        with pytest.raises(UserError, match="disk is full"):
            write_file(mount / "a.gguf", writer, [matrix("t", 512, 256)])
        assert_nothing_left(mount)
    finally:
        subprocess.run(["umount", mount], check=True)


def test_an_interrupted_export_leaves_the_old_file(tmp_path: Path) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        raise KeyboardInterrupt
        yield

    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF, old")
    writer = gguf.GGUFWriter(None, "llama")
    with pytest.raises(KeyboardInterrupt):
        write_file(path, writer, [PlannedTensor("t", F32, (16,), 64, interrupted)])
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    assert path.read_bytes() == b"GGUF, old"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="was not written"):
        small_file(tmp_path / "file" / "a.gguf")


def test_a_flipped_byte_of_data_shows_in_one_tensor(run_of: RunOf, tmp_path: Path) -> None:
    from exporters.gguf.reader import iter_expected

    run = run_of(LlamaConfig(**BASE))
    artifact = export(run, tmp_path / "a.gguf")
    info = GgufFile.open(artifact).tensors["blk.1.ffn_up.weight"]
    data = bytearray(artifact.read_bytes())
    data[info.offset + 40] ^= 0x10
    artifact.write_bytes(data)
    stored = {t.name: t.weights for t in LlamaCppRuntime().stored_tensors(artifact)}
    wrong = [t.gguf_name for t in iter_expected(run, artifact) if not np.array_equal(t.weights(), stored[t.gguf_name])]
    assert wrong == ["blk.1.ffn_up.weight"]


def test_codes_beyond_the_grid_are_refused_while_writing_and_leave_nothing(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", Shape(layers=1, hidden=256, intermediate=256, vocab=600))
    name = "model.layers.0.mlp.down_proj.weight"
    file = run.path / "blocks" / "0000.safetensors"
    tensors = load_file(file)
    tensors[f"{name}#codes"][-1, -1] = 16
    save_file(tensors, file)
    run.manifest.complete["0000"].sha256 = sha256_of(file)
    with pytest.raises(UserError, match=rf"tensor {name}: codes leave the range 0\.\.15"):
        export(run, tmp_path / "out" / "a.gguf")
    assert_nothing_left(tmp_path / "out")
