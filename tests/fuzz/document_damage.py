"""Damage to a well-formed GGUF file that is then written as a well-formed file again: metadata and tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from random import Random

from tests.fuzz.gguf_document import ARRAY, CODES, FLOATS, STRING, Document, Entry, Tensor, number, text

_NUMBERS = (0, 1, 2, 3, 7, 64, 255, 1023, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, -1)
_REALS = (0.0, -1.0, math.nan, math.inf, -math.inf, 1e-38, 1e38, 1.0, 0.5)
_ARCHITECTURES = (b"qwen2", b"gpt2", b"mamba", b"bert", b"falcon", b"gemma3", b"deepseek2", b"nothing", b"clip", b"")
_STRINGS = (b"", b"\xff\xfe\x80", b"a\nb\x1b[31mc", b"\x00", b"x" * 70, b"y" * 100_000, "ﷺ🚀".encode(), b"%s%n{0}")
# fp16: NaN, both infinities, largest, smallest, −0
_HALVES = (0x7E00, 0x7C00, 0xFC00, 0x7BFF, 0x0001, 0x8000)
_ADDED: tuple[tuple[bytes, int, float], ...] = (
    (b"split.count", 2, 2), (b"split.count", 2, 0), (b"split.count", 2, 65535), (b"split.count", 6, 3.0),
    (b"split.count", 11, -4), (b"split.no", 2, 1), (b"split.tensors.count", 5, 7), (b"general.alignment", 4, 0),
    (b"general.alignment", 4, 1), (b"general.alignment", 4, 3), (b"general.alignment", 4, 64),
    (b"general.alignment", 4, 1 << 31), (b"general.alignment", 10, 1 << 62), (b"general.alignment", 6, 32),
    (b"general.alignment", 7, 1), (b"llama.expert_count", 4, 8), (b"llama.expert_count", 4, (1 << 32) - 1),
    (b"llama.expert_used_count", 4, 9), (b"llama.attention.key_length", 4, 0),
    (b"llama.attention.key_length", 4, 1 << 20), (b"llama.attention.sliding_window", 4, 1),
    (b"llama.rope.scaling.factor", 6, 0), (b"llama.attention.clamp_kqv", 6, math.nan), (b"llama.logit_scale", 6, 0),
    (b"llama.nextn_predict_layers", 4, 99),
    (b"llama.full_attention_interval", 4, 0), (b"llama.leading_dense_block_count", 4, 1 << 31),
    (b"tokenizer.ggml.add_eos_token", 7, 1), (b"tokenizer.ggml.padding_token_id", 4, 1 << 31),
    (b"tokenizer.ggml.bos_token_id", 4, 1 << 31), (b"tokenizer.ggml.token_type_count", 4, 1 << 31),
)  # fmt: skip
_ADDED_TEXT = ((b"llama.rope.scaling.type", b"yarn"), (b"signround_edge.template", b"a"), (b"llama.pooling_type", b"x"))


# Metadata


def _pick(document: Document, rng: Random, wanted: Callable[[Entry], bool]) -> Entry:
    """A matching entry, or any (parts of a split model have few)."""
    found = [e for e in document.entries if wanted(e)] or document.entries
    return rng.choice(found)


def _is_number(entry: Entry) -> bool:
    return entry.payload is not None and entry.kind in CODES


def change_value(document: Document, rng: Random) -> str:
    entry = _pick(document, rng, _is_number)
    if not _is_number(entry):
        return change_text(document, rng)
    old = entry.number()
    if entry.kind in FLOATS:
        value = rng.choice((*_REALS, old * 2, old / 2, -old))
    else:
        value = rng.choice((*_NUMBERS, old + 1, old - 1, old * 2, old // 2, rng.getrandbits(32)))
    entry.payload = number(entry.kind, value)
    return f"{entry.key!r} {old} → {value}"


def change_value_type(document: Document, rng: Random) -> str:
    """Another type: with the old bytes, converted, or as something else altogether."""
    entry = _pick(document, rng, _is_number)
    kind = rng.choice([k for k in (*CODES, STRING, ARRAY, 13, 255, 1 << 31) if k != entry.kind])
    old, how = entry.kind, rng.choice(("same bytes", "converted"))
    if how == "converted" and _is_number(entry) and kind in CODES:
        entry.payload = number(kind, entry.number())
    elif how == "converted" and kind == STRING:
        entry.payload = text(b"32")
    elif how == "converted" and kind == ARRAY:
        item = old if old in CODES else 4
        payload = entry.payload if _is_number(entry) else number(4, 1)
        entry.item_kind, entry.items, entry.payload = item, [payload or b""] * rng.choice((0, 1, 2, 5)), None
    entry.kind = kind
    return f"{entry.key!r} of type {old} → {kind}, {how}"


def change_text(document: Document, rng: Random) -> str:
    entry = _pick(document, rng, lambda e: e.kind == STRING)
    if entry.kind != STRING:
        return change_key(document, rng)
    old = (entry.payload or b"")[8:]
    new = rng.choice((*_STRINGS, old[:-1], old + b" ", old.upper(), b"llama", b"gpt2", b"bert", b"default"))
    entry.payload = text(new)
    return f"{entry.key!r} {old[:20]!r} → {new[:20]!r}"


def change_architecture(document: Document, rng: Random) -> str:
    """Another architecture, with its hyper-parameters under the new name or without any."""
    new, renamed = rng.choice(_ARCHITECTURES), rng.random() < 0.7
    for entry in document.entries:
        if entry.key == b"general.architecture":
            entry.payload = text(new)
        elif renamed and entry.key.startswith(b"llama."):
            entry.key = new + entry.key.removeprefix(b"llama")
    return f"{new!r}{', hyper-parameters renamed' if renamed else ''}"


def change_key(document: Document, rng: Random) -> str:
    """A key dropped, doubled, renamed, or an entry moved."""
    entry = rng.choice(document.entries)
    how = rng.choice(("dropped", "dropped", "twice", "renamed", "moved"))
    old = entry.key
    if how == "dropped":
        document.entries.remove(entry)
    elif how == "twice":
        document.entries.append(Entry(entry.key, entry.kind, entry.payload, entry.item_kind, list(entry.items)))
    elif how == "moved":
        document.entries.remove(entry)
        document.entries.insert(rng.randrange(len(document.entries) + 1), entry)
    else:
        entry.key = rng.choice((*_STRINGS, entry.key + b"x", rng.choice(document.entries).key))
    return f"{old!r} {how}" + (f" {entry.key[:20]!r}" if how == "renamed" else "")


def add_entry(document: Document, rng: Random) -> str:
    if rng.random() < 0.2:
        key, words = rng.choice(_ADDED_TEXT)
        entry = Entry(key, STRING, text(words))
    elif rng.random() < 0.2:  # arrays of arrays, shallow and deep
        key, depth = b"nested", rng.choice((1, 3, 6, 2000))
        entry = Entry(key, ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", 4, 0))
    else:
        key, kind, value = rng.choice(_ADDED)
        entry = Entry(key, kind, number(kind, value))
    document.entries.insert(rng.randrange(len(document.entries) + 1), entry)
    return f"{key!r} {(entry.payload or b'')[:12].hex()}"


def change_alignment(document: Document, rng: Random) -> str:
    """A file truly written with another alignment, which is as good as before where it is a power of two."""
    document.alignment = rng.choice((8, 16, 48, 64, 4096))
    document.entries.append(Entry(b"general.alignment", 4, number(4, document.alignment)))
    return str(document.alignment)


def change_array(document: Document, rng: Random) -> str:
    """An array shortened, lengthened, emptied, of another type, or with other items."""
    entry = _pick(document, rng, lambda e: e.payload is None)
    if entry.payload is not None or not entry.items:
        return change_key(document, rng)
    items = entry.items
    how = rng.choice(
        ("shorter", "shorter", "longer", "empty", "item type", "item", "item", "swap", "reversed", "all same")
    )
    at = rng.randrange(len(items))
    if how == "shorter":
        del items[rng.choice((-1, at, 1)) :]
    elif how == "longer":
        items += items[: rng.choice((1, at, len(items)))]
    elif how == "empty":
        items.clear()
    elif how == "item type":
        entry.item_kind = rng.choice([k for k in (*CODES, STRING, ARRAY, 99) if k != entry.item_kind])
    elif how == "item":
        if entry.item_kind == STRING:
            items[at] = text(rng.choice((*_STRINGS, b"a", b"a b c", items[0][8:])))
        else:
            items[at] = number(entry.item_kind, rng.choice(_REALS if entry.item_kind in FLOATS else _NUMBERS))
    elif how == "swap":
        other = rng.randrange(len(items))
        items[at], items[other] = items[other], items[at]
    elif how == "reversed":
        items.reverse()
    else:
        items[:] = [items[at]] * len(items)
    return f"{entry.key!r} {how}, now {len(items)} items"


# Tensors


def change_dims(document: Document, rng: Random) -> str:
    tensor = rng.choice(document.tensors)
    old = list(tensor.dims)
    how = rng.choice(
        ("zero", "double", "plus one", "overflow", "more", "many", "none", "fewer", "reversed", "ones", "regrouped")
    )
    at = rng.randrange(len(old))
    if how == "zero":
        tensor.dims[at] = 0
        if rng.random() < 0.5:
            tensor.dims.append(1 << 60)
    elif how == "double":
        tensor.dims[at] *= 2
    elif how == "plus one":
        tensor.dims[at] += 1
    elif how == "overflow":
        tensor.dims[:] = rng.choice(([1 << 32, 1 << 32], [1 << 62, 4], [1 << 63, 2], [32, 1 << 59], [(1 << 64) - 1]))
    elif how == "more":
        tensor.dims.append(rng.choice((0, 2, 1 << 40)))
    elif how == "many":
        tensor.dims += [1] * rng.choice((3, 4, 1000))
    elif how == "none":
        tensor.dims.clear()
    elif how == "fewer":
        tensor.dims.pop()
    elif how == "reversed":
        tensor.dims.reverse()
    elif how == "ones":
        tensor.dims.append(1)
    else:
        tensor.dims[:] = [old[0], *([old[1] // 2, 2] if len(old) > 1 else [1, 1])]
    return f"{tensor.name!r} {old} → {tensor.dims[:5]}"


def change_tensor_type(document: Document, rng: Random) -> str:
    tensor, other = rng.choice(document.tensors), rng.choice(document.tensors)
    old = tensor.kind
    if rng.random() < 0.3:
        tensor.kind, other.kind = other.kind, tensor.kind
        return f"{tensor.name!r} {old} ↔ {other.name!r} {tensor.kind}"
    # 2 and 20 (Q4_0, IQ4_NL) and others have blocks of the same bytes
    tensor.kind = rng.choice((*range(45), 20, 20, 2, 2, 99, (1 << 31) - 1, (1 << 32) - 1))
    return f"{tensor.name!r} {old} → {tensor.kind}"


def change_tensor_name(document: Document, rng: Random) -> str:
    tensor, other = rng.choice(document.tensors), rng.choice(document.tensors)
    old = tensor.name
    how = rng.choice(("new", "exchanged", "same as another", "letter"))
    if how == "new":
        tensor.name = rng.choice((*_STRINGS, b"blk.99.ffn_up.weight", b"output.weight", old + b".bias"))
    elif how == "exchanged":
        tensor.name, other.name = other.name, tensor.name
    elif how == "same as another":
        tensor.name = other.name
    else:
        at = rng.randrange(len(old))
        tensor.name = old[:at] + bytes([old[at] ^ (1 << rng.randrange(8))]) + old[at + 1 :]
    return f"{old!r} {how} {tensor.name[:30]!r}"


def change_offset(document: Document, rng: Random) -> str:
    """A wrong place for the data: shifted, misaligned, overlapping, exchanged with another's, far outside."""
    places, position = [], 0
    for tensor in document.tensors:
        places.append(position)
        position += len(tensor.data) + -len(tensor.data) % document.alignment
    at, other = rng.randrange(len(places)), rng.randrange(len(places))
    tensor, true = document.tensors[at], places[at]
    if rng.random() < 0.25:
        tensor.offset, document.tensors[other].offset = places[other], true
        return f"{tensor.name!r} ↔ {document.tensors[other].name!r}"
    tensor.offset = rng.choice((true + 32, true - 32, true + 1, 0, places[other], position, 1 << 40, (1 << 64) - 32))
    return f"{tensor.name!r} {true} → {tensor.offset}"


def change_tensor_list(document: Document, rng: Random) -> str:
    """A tensor dropped, added, doubled, without data; or descriptions in another order."""
    how = rng.choice(("dropped", "added", "without data", "shuffled", "all dropped", "data exchanged"))
    tensor, other = rng.choice(document.tensors), rng.choice(document.tensors)
    if how == "dropped":
        document.tensors.remove(tensor)
    elif how == "added":
        values, rows = rng.choice((1, 32, 4096)), rng.choice((1, 3))
        name = rng.choice((b"rope_freqs.weight", b"output.weight", b"blk.0.attn_q.bias", b"foreign"))
        document.tensors.insert(
            rng.randrange(len(document.tensors) + 1), Tensor(name, [values, rows], 0, bytes(4 * values * rows))
        )
        return f"{name!r}"
    elif how == "without data":
        tensor.data = b""
    elif how == "shuffled":
        rng.shuffle(document.tensors)
    elif how == "all dropped":
        document.tensors.clear()
        return how
    else:
        tensor.data, other.data = other.data, tensor.data
    return f"{tensor.name!r} {how}"


def change_block_scale(document: Document, rng: Random) -> str:
    """NaN, infinity or an extreme value where a block may keep its fp16 scale: at its beginning or its end."""
    tensor = rng.choice(document.tensors)
    data, value = bytearray(tensor.data), rng.choice(_HALVES)
    size = {2: 18, 8: 34, 10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 20: 18, 23: 136}.get(tensor.kind, 4)
    count = rng.choice((1, 1, 5, len(data) // size))
    for _ in range(min(count, 2000)):
        at = rng.randrange(len(data) // size) * size + rng.choice((0, size - 2))
        struct.pack_into("<H", data, at, value)
    tensor.data = bytes(data)
    return f"{tensor.name!r} {count} × {value:#06x}"


def change_block_data(document: Document, rng: Random) -> str:
    tensor = rng.choice(document.tensors)
    data, count = bytearray(tensor.data), rng.choice((1, 1, 8, 1000))
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    tensor.data = bytes(data)
    return f"{tensor.name!r} {count} bits"
