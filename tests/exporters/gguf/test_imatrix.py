"""llama.cpp's importance matrices: what is written is read back, by gguf-py too; damage is one sentence."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gguf.imatrix.file import read_imatrix, write_imatrix
from signround_edge.errors import UserError
from signround_edge.schemes.gguf_names import gguf_name

VECTORS = {
    "blk.0.attn_q.weight": np.array([0.25, 3.0, 1e-7, 0.0], dtype=np.float32),
    "blk.0.ffn_down_exps.weight": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=np.float32),
    "output.weight": np.array([7.5], dtype=np.float32),
}


def written(folder: Path) -> Path:
    return write_imatrix(folder / "m.gguf", VECTORS, tokens=1000, chunk_size=512, datasets=["speeches.txt"])


def dat(*entries: tuple[bytes, int, list[float]], trailer: bytes = b"") -> bytes:
    """The binary form, byte by byte: entries are (name, calls, sums)."""
    data = struct.pack("<i", len(entries))
    for name, calls, sums in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(sums))
        data += struct.pack(f"<{len(sums)}f", *sums)
    return data + trailer


ENTRIES = ((b"blk.0.attn_q.weight", 4, [4.0, 8.0, 0.0]), (b"output.weight", 0, [1.0, 2.5]))
TRAILER = struct.pack("<ii", 4, 9) + b"wiki.text"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    found = read_imatrix(written(tmp_path))
    assert set(found) == set(VECTORS)
    for name, vector in VECTORS.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], vector, rtol=2**-23)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(0, 2.0**80, width=32), min_size=1, max_size=40),
    tokens=st.integers(1, 1 << 24),
)
def test_any_mean_of_squares_survives(
    values: list[float], tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    vector = np.array(values, dtype=np.float32)
    file = write_imatrix(tmp_path_factory.mktemp("m") / "m.gguf", {"x": vector}, tokens, 512, ["text"])
    np.testing.assert_allclose(read_imatrix(file)["x"], vector, rtol=2**-22, atol=1e-44)


def test_gguf_py_finds_what_llama_quantize_asks_for(tmp_path: Path) -> None:
    """The rules of `load_imatrix` (tools/quantize/quantize.cpp) and of `common_imatrix_load`."""
    reader = gguf.GGUFReader(written(tmp_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert "general.architecture" not in fields
    assert fields["imatrix.datasets"] == ["speeches.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (2, 512)
    tensors = {t.name: t for t in reader.tensors}
    assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert all(len(name) < 64 for name in tensors)  # GGML_MAX_NAME
    for name, vector in VECTORS.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        experts = np.atleast_2d(vector).shape[0]
        assert sums.shape.tolist() == [vector.shape[-1], experts]
        assert counts.shape.tolist() == [1, experts]
        np.testing.assert_array_equal(counts.data.reshape(-1), np.full(experts, 1000.0))
        np.testing.assert_allclose(sums.data / counts.data.reshape(-1, 1), np.atleast_2d(vector), rtol=2**-22)


def test_experts_that_no_token_reached_are_as_in_llama_quantize(tmp_path: Path) -> None:
    """An expert without tokens weighs every channel 1; a tensor without tokens is left out."""
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "none")
    writer.add_type("imatrix")
    writer.add_tensor("experts.in_sum2", np.array([[4.0, 8.0], [0.0, 0.0]], dtype=np.float32))
    writer.add_tensor("experts.counts", np.array([[4.0], [0.0]], dtype=np.float32))
    writer.add_tensor("unused.in_sum2", np.zeros((1, 2), dtype=np.float32))
    writer.add_tensor("unused.counts", np.zeros((1, 1), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = read_imatrix(file)
    assert list(found) == ["experts"]
    assert found["experts"].tolist() == [[1.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize("trailer", [b"", struct.pack("<i", 4), TRAILER], ids=["oldest", "calls", "calls and name"])
def test_the_older_binary_form(trailer: bytes, tmp_path: Path) -> None:
    file = tmp_path / "imatrix.dat"
    file.write_bytes(dat(*ENTRIES, trailer=trailer))
    found = read_imatrix(file)
    assert {name: vector.tolist() for name, vector in found.items()} == {
        "blk.0.attn_q.weight": [1.0, 2.0, 0.0],
        "output.weight": [1.0, 2.5],
    }


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_imatrix(file)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_every_truncation_is_refused(form: str, tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes() if form == "gguf" else dat(*ENTRIES, trailer=TRAILER)
    file = tmp_path / "cut"
    whole_without_trailer = {len(dat(*ENTRIES)), len(dat(*ENTRIES)) + 4}
    padding = 31 if form == "gguf" else 0  # behind the last tensor
    for length in range(len(data) - padding):
        file.write_bytes(data[:length])
        if form == "gguf" or length not in whole_without_trailer:
            refusal(file)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_damaged_bytes_never_do_worse_than_a_sentence(form: str, tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes() if form == "gguf" else dat(*ENTRIES, trailer=TRAILER)
    rng = random.Random(0)
    file = tmp_path / "damaged"
    refused = 0
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        file.write_bytes(damaged)
        try:
            read_imatrix(file)
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has 0 bytes"),
        (b"hello, this is a text and no importance matrix", "neither GGUF nor"),
        (b"\x03\x00\x00\x00" + b"\xff" * 60, "is no importance matrix"),
        (b"PK\x03\x04" + bytes(1000), "neither GGUF nor"),
        (dat((b"a", 1, [float("nan")])), "holds NaN, infinite or negative values"),
        (dat((b"a", 1, [-1.0])), "holds NaN, infinite or negative values"),
        (dat((b"a", 1, [1.0]), (b"a", 1, [1.0])), "tensor a twice"),
        (dat((b"\xff\xfe", 1, [1.0])), "is no text"),
        (dat(*ENTRIES, trailer=TRAILER + b"!"), "1 bytes follow its end"),
    ],
)
def test_foreign_files_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert words in refusal(file)


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 2), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert "is no importance matrix (it is a GGUF file of type model" in refusal(file)


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_what_is_no_file_is_refused(what: str, tmp_path: Path) -> None:
    refusal(tmp_path if what == "folder" else tmp_path / "none.gguf")


def test_sizes_that_a_damaged_file_announces_are_not_allocated(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1) + bytes(64))
    assert "it ends within the values of entry 1" in refusal(file)
    file.write_bytes(struct.pack("<ii", 1, 2**31 - 1) + bytes(64))
    assert "the name of entry 1 cannot be read" in refusal(file)


@pytest.mark.parametrize(
    ("model_type", "parameter", "name"),
    [
        ("llama", "model.layers.31.self_attn.o_proj.weight", "blk.31.attn_output.weight"),
        ("qwen3", "model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("gpt2", "transformer.h.7.attn.c_attn.weight", "blk.7.attn_qkv.weight"),
        ("gpt_neox", "gpt_neox.layers.3.mlp.dense_4h_to_h.weight", "blk.3.ffn_down.weight"),
        ("bloom", "transformer.h.1.self_attention.query_key_value.weight", "blk.1.attn_qkv.weight"),
        ("olmo2", "model.layers.2.mlp.up_proj.weight", "blk.2.ffn_up.weight"),
        ("a-new-one", "model.layers.2.self_attn.v_proj.weight", "blk.2.attn_v.weight"),
        ("llama", "lm_head.weight", "output.weight"),
        ("llama", "model.embed_tokens.weight", "token_embd.weight"),
        ("opt", "model.decoder.layers.0.fc1.weight", None),
    ],
)
def test_parameters_have_llama_cpps_names(model_type: str, parameter: str, name: str | None) -> None:
    assert gguf_name(parameter, model_type) == name
