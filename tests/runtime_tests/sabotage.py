"""Ways to break a sound artifact of the small model of `conftest`, each small enough to be made by a real mistake.

A sabotage changes a GGUF file (as `Document`) or an ONNX graph (as `onnx.ModelProto` with its data), and says what the
report must name: a tensor or node, a metadata key, or the first layer that is off.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from exporters.onnx.artifact.sidecar import SIDECAR, hash_files
from tests.fuzz.gguf_document import STRING, Document, Entry, Tensor, number, text

FLOAT32, UINT32 = 6, 4
Q4_0_BYTES = 18
HEADS, KV_HEADS = 4, 2  # of the small model


@dataclass(frozen=True)
class Sabotage:
    """A change, and what must be named.

    Attributes:
        change: takes the parsed artifact and changes it.
        names: each must stand in the report's reasons.
        weights_exact: whether the stored weights are still the run's.
    """

    change: Callable[[Any], None]
    names: tuple[str, ...]
    weights_exact: bool = False


def damage_gguf(path: Path, change: Callable[[Document], None]) -> None:
    """Change a GGUF file in place."""
    document = Document.parse(path.read_bytes())
    change(document)
    path.write_bytes(document.write()[0])


def damage_onnx(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change an ONNX folder in place, its hashes too, so that only the deeper checks are left."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    change(model)
    (folder / "model.onnx.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    rehash(folder)


def rehash(folder: Path) -> None:
    """Make the sidecar's hashes those of the changed files."""
    file = folder / SIDECAR
    data: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "files": hash_files(folder)}))


# GGUF


def tensor(document: Document, name: str) -> Tensor:
    return next(t for t in document.tensors if t.name == name.encode())


def rows_of(found: Tensor) -> NDArray[np.uint8]:
    """u8 [rows, bytes a row], writable."""
    return np.frombuffer(found.data, dtype=np.uint8).reshape(found.dims[-1] if len(found.dims) > 1 else 1, -1).copy()


def on_rows(name: str, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Callable[[Document], None]:
    def apply(document: Document) -> None:
        found = tensor(document, name)
        found.data = change(rows_of(found)).tobytes()

    return apply


def set_key(key: str, value: float, kind: int | None = None) -> Callable[[Document], None]:
    """Give a scalar another value, or add it."""

    def apply(document: Document) -> None:
        entry = document.entry(key.encode())
        if entry is None:
            assert kind is not None, key
            entry = Entry(key.encode(), kind, b"")
            document.entries.append(entry)
        entry.payload = number(entry.kind, value)

    return apply


def exchange_tensors(one: str, other: str) -> Callable[[Document], None]:
    def apply(document: Document) -> None:
        first, second = tensor(document, one), tensor(document, other)
        first.data, second.data = second.data, first.data

    return apply


def wrong_scale(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The scale of one block is the next fp16 value."""
    rows[7, :2].view("<u2")[0] += 1
    return rows


def swapped_nibbles(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """In one block."""
    rows[7, 2:Q4_0_BYTES] = rows[7, 2:Q4_0_BYTES] >> 4 | (rows[7, 2:Q4_0_BYTES] & 15) << 4
    return rows


def codes_off_by_one(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One block as if Q4_0's zero point were 7: every code below 15 one higher."""
    codes = rows[7, 2:Q4_0_BYTES]
    low, high = np.minimum((codes & 15) + 1, 15), np.minimum((codes >> 4) + 1, 15)
    rows[7, 2:Q4_0_BYTES] = low | high << 4
    return rows


def minimum_off_by_one_step(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Q4_1: the minimum of one block is one step (its scale) too high."""
    scale, minimum = rows[7, :4].view("<f2")
    rows[7, 2:4].view("<f2")[0] = minimum + scale
    return rows


def exchange_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows[[3, 4]] = rows[[4, 3]]
    return rows


def undo_rope_order(heads: int) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Hugging Face's order of rows instead of llama.cpp's, which interleaves the halves of each head."""
    return lambda rows: rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def ones(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An F32 vector of ones."""
    return np.ones_like(rows.view("<f4")).view(np.uint8)


def untied_head(document: Document) -> None:
    """An output head that is nearly the embedding it should be tied to."""
    embedding = tensor(document, "token_embd.weight")
    rows = rows_of(embedding)
    document.tensors.append(Tensor(b"output.weight", embedding.dims, embedding.kind, np.roll(rows, 1, 0).tobytes()))


def exchange_tokens(document: Document) -> None:
    entry = document.entry(b"tokenizer.ggml.tokens")
    assert entry is not None
    entry.items[40], entry.items[41] = entry.items[41], entry.items[40]


def rope_scaling(document: Document) -> None:
    document.entries.append(Entry(b"llama.rope.scaling.type", STRING, text(b"linear")))
    set_key("llama.rope.scaling.factor", 2.0, FLOAT32)(document)


GGUF_WEIGHTS = {
    "one wrong scale in one block": Sabotage(
        on_rows("blk.0.ffn_down.weight", wrong_scale), ("tensor blk.0.ffn_down.weight (Q4_0)", "row 7, column")
    ),
    "swapped nibbles": Sabotage(on_rows("blk.1.attn_k.weight", swapped_nibbles), ("tensor blk.1.attn_k.weight",)),
    "zero point off by one": Sabotage(
        on_rows("blk.1.ffn_up.weight", codes_off_by_one), ("tensor blk.1.ffn_up.weight",)
    ),
    "two rows exchanged": Sabotage(on_rows("blk.0.attn_v.weight", exchange_rows), ("tensor blk.0.attn_v.weight",)),
    "query rows not in llama.cpp's order": Sabotage(
        on_rows("blk.0.attn_q.weight", undo_rope_order(HEADS)), ("tensor blk.0.attn_q.weight",)
    ),
    "key rows not in llama.cpp's order": Sabotage(
        on_rows("blk.1.attn_k.weight", undo_rope_order(KV_HEADS)), ("tensor blk.1.attn_k.weight",)
    ),
    "norm weights of ones": Sabotage(on_rows("blk.1.ffn_norm.weight", ones), ("tensor blk.1.ffn_norm.weight (F32)",)),
    "matrices of two layers exchanged": Sabotage(
        exchange_tensors("blk.0.ffn_down.weight", "blk.1.ffn_down.weight"), ("tensor blk.0.ffn_down.weight", "1 more")
    ),
    "an untied head": Sabotage(untied_head, ("output.weight is not of this run",)),
}

GGUF_METADATA = {
    "wrong RoPE base": Sabotage(
        set_key("llama.rope.freq_base", 5000.0),
        ("llama.rope.freq_base is 5000.0, not 10000.0", "model.layers.0 "),
        True,
    ),
    "wrong epsilon": Sabotage(
        set_key("llama.attention.layer_norm_rms_epsilon", 1e-4),
        ("llama.attention.layer_norm_rms_epsilon", "model.layers.0 "),
        True,
    ),
    "RoPE scaling": Sabotage(rope_scaling, ("llama.rope.scaling.type should not be there", "model.layers.0 "), True),
    "wrong head count": Sabotage(
        set_key("llama.attention.head_count", 8), ("llama.attention.head_count is 8, not 4",), True
    ),
    "wrong key-value head count": Sabotage(
        set_key("llama.attention.head_count_kv", 4), ("llama.attention.head_count_kv is 4, not 2",), True
    ),
    "BOS flag": Sabotage(
        set_key("tokenizer.ggml.add_bos_token", 0), ("tokenizer.ggml.add_bos_token is False, not True",), True
    ),
    "two tokens exchanged": Sabotage(exchange_tokens, ("tokenizer.ggml.tokens [40] is",), True),
}
# In a file of the template route the metadata is the template's, so that only the control can tell.
GGUF_CONTROL = ("wrong RoPE base", "wrong epsilon", "RoPE scaling")


# ONNX


def nodes(model: onnx.ModelProto, kind: str, layer: int | None = None) -> list[onnx.NodeProto]:
    found = [n for n in model.graph.node if n.op_type == kind]
    return [n for n in found if layer is None or f"layers.{layer}/" in n.name]


def weights(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def on_weights(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        found = weights(model, name)
        array = np.ascontiguousarray(change(onnx.numpy_helper.to_array(found).copy()))
        found.CopyFrom(onnx.numpy_helper.from_array(array, name))

    return apply


def set_attribute(kind: str, name: str, value: Any, layer: int) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        (node, *_) = nodes(model, kind, layer)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return apply


def one_scale(array: NDArray[Any]) -> NDArray[Any]:
    array.reshape(-1)[11] *= np.float32(1 + 2**-10)  # one step of fp16
    return array


def one_nibble_pair(array: NDArray[Any]) -> NDArray[Any]:
    block = array.reshape(-1, 16)[5]
    block[:] = block >> 4 | (block & 15) << 4
    return array


def one_zero_point(array: NDArray[Any]) -> NDArray[Any]:
    array.reshape(-1)[3] += 1
    return array


def exchange_matrix_rows(model: onnx.ModelProto) -> None:
    stem = "model.layers.0.mlp.up_proj.MatMulNBits"
    for part in ("qweight", "scales"):
        found = weights(model, f"{stem}.{part}")
        array = onnx.numpy_helper.to_array(found).copy()
        if array.ndim == 1:
            array = array.reshape(256, -1)
        array[[3, 4]] = array[[4, 3]]
        found.CopyFrom(onnx.numpy_helper.from_array(array.reshape(tuple(found.dims)), found.name))


def exchange_inputs(kind: str, part: str, position: int) -> Callable[[onnx.ModelProto], None]:
    """Two layers' nodes read each other's operand."""

    def apply(model: onnx.ModelProto) -> None:
        first, second = (next(n for n in nodes(model, kind, layer) if part in n.name) for layer in (0, 1))
        first.input[position], second.input[position] = second.input[position], first.input[position]

    return apply


def untied_table(model: onnx.ModelProto) -> None:
    """The embedding reads a table that is nearly the head's."""
    (gather,) = nodes(model, "GatherBlockQuantized")
    found = weights(model, gather.input[0])
    array = np.roll(onnx.numpy_helper.to_array(found), 1, axis=0)
    found.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), found.name))


def exchange_rope_tables(model: onnx.ModelProto) -> None:
    for node in nodes(model, "GroupQueryAttention"):
        node.input[7], node.input[8] = node.input[8], node.input[7]


def another_rope_base(model: onnx.ModelProto) -> None:
    """The tables that a base of 5000 would give."""
    size = weights(model, "cos_cache").dims[1]
    angles = np.arange(weights(model, "cos_cache").dims[0])[:, None] * 5000.0 ** (-np.arange(size) / size)
    on_weights("cos_cache", lambda old: np.cos(angles).astype(old.dtype))(model)
    on_weights("sin_cache", lambda old: np.sin(angles).astype(old.dtype))(model)


def another_activation(model: onnx.ModelProto) -> None:
    (node,) = nodes(model, "Sigmoid", 1)
    node.op_type = "Tanh"


def lost_residual(model: onnx.ModelProto) -> None:
    """The second norm of layer 1 adds the attention's output to itself instead of the residual stream."""
    node = next(n for n in nodes(model, "SkipSimplifiedLayerNormalization", 1) if "post_attention" in n.name)
    node.input[0] = node.input[1]


ATTENTION = "GroupQueryAttention"
ONNX_WEIGHTS = {
    "one wrong scale in one block": Sabotage(
        on_weights("model.layers.1.mlp.down_proj.MatMulNBits.scales", one_scale),
        ("tensor /model/layers.1/mlp/down_proj/MatMulNBits",),
    ),
    "swapped nibbles": Sabotage(
        on_weights("model.layers.0.attn.o_proj.MatMulNBits.qweight", one_nibble_pair),
        ("tensor /model/layers.0/attn/o_proj/MatMulNBits",),
    ),
    "zero point off by one": Sabotage(
        on_weights("model.layers.1.mlp.up_proj.MatMulNBits.qzeros", one_zero_point),
        ("tensor /model/layers.1/mlp/up_proj/MatMulNBits",),
    ),
    "two rows exchanged": Sabotage(exchange_matrix_rows, ("tensor /model/layers.0/mlp/up_proj/MatMulNBits",)),
    "matrices of two layers exchanged": Sabotage(
        exchange_inputs("MatMulNBits", "down_proj", 1), ("tensor /model/layers.0/mlp/down_proj/MatMulNBits",)
    ),
    "an untied embedding": Sabotage(untied_table, ("embed_tokens",)),
}
ONNX_GRAPH = {
    "norms of two layers exchanged": Sabotage(
        exchange_inputs("SkipSimplifiedLayerNormalization", "post_attention", 2),
        ("model.layers.0 is the first layer that is off", "model.layers.0.self_attn"),
        True,
    ),
    "wrong RoPE base": Sabotage(
        another_rope_base, ("model.layers.0 is the first layer that is off", "model.layers.0.input_layernorm"), True
    ),
    "sine and cosine exchanged": Sabotage(exchange_rope_tables, ("model.layers.0 is the first layer",), True),
    "wrong epsilon": Sabotage(
        set_attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e-3, 1),
        ("model.layers.1 is the first layer that is off",),
        True,
    ),
    "interleaved RoPE": Sabotage(
        set_attribute(ATTENTION, "rotary_interleaved", 1, 1), ("model.layers.1 is the first layer",), True
    ),
    "no RoPE": Sabotage(set_attribute(ATTENTION, "do_rotary", 0, 1), ("model.layers.1 is the first layer",), True),
    "wrong attention scale": Sabotage(
        set_attribute(ATTENTION, "scale", 0.12, 0), ("model.layers.0 is the first layer",), True
    ),
    "sliding window": Sabotage(
        set_attribute(ATTENTION, "local_window_size", 8, 1), ("model.layers.1 is the first layer",), True
    ),
    "soft cap": Sabotage(set_attribute(ATTENTION, "softcap", 5.0, 0), ("model.layers.0 is the first layer",), True),
    "wrong key-value head count": Sabotage(
        set_attribute(ATTENTION, "kv_num_heads", 1, 1), ("GroupQueryAttention",), True
    ),
    "another activation": Sabotage(
        another_activation, ("model.layers.1 is the first layer", "model.layers.1.post_attention_layernorm"), True
    ),
    "a lost residual": Sabotage(lost_residual, ("model.layers.1 is the first layer",), True),
}
