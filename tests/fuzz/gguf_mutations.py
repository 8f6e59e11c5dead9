"""Ways to damage a GGUF model. Everything random comes from the generator given, so that a seed names a case.

A model is its files by name, the one to load first. Mutations of the document rewrite a well-formed file with something
wrong in it; mutations of bytes damage the written file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from random import Random

from tests.fuzz.gguf_document import ARRAY, CODES, FLOATS, STRING, Document, Entry, Span, Tensor, number, text

Model = dict[str, bytes | None]  # None: a folder of that name
OnDocument = Callable[[Document, Random], str]
OnBytes = Callable[[bytearray, list[Span], Random], str]
OnModel = Callable[[Model, Random], str]

_WIDE = (0, 1, 2, 3, 5, 33, 255, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 60, 1 << 63)
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


def mutate(model: Model, others: list[Model], rng: Random) -> str:
    """Damage a model in place and say how: "kind: details"; now and then in two ways at once."""
    intact, kinds = list(model.items()), list(_KINDS)
    said: list[str] = []
    while list(model.items()) == intact:  # some damage is none, such as two equal types exchanged
        first = rng.choices(kinds, [_KINDS[kind][0] for kind in kinds])[0]
        said = [_apply(first, model, others, rng)]
    if rng.random() < 0.1:
        said.append(_apply(rng.choice(kinds), model, others, rng))
    return "; and ".join(said)


def _apply(kind: str, model: Model, others: list[Model], rng: Random) -> str:
    change = _KINDS[kind][1]
    if kind.startswith("split"):
        return f"{kind}: {change(model, rng)}"  # type: ignore[arg-type, call-arg]
    names = [name for name, content in model.items() if content]
    if not names:
        return f"{kind}: nothing left"
    name = rng.choice([names[0], *names])
    content = model[name]
    assert content is not None
    try:
        document = Document.parse(content)
    except Exception:  # damaged already
        return f"{kind}: not a second time"
    if kind.startswith(("bytes", "cut")):
        data, spans = document.write()
        damaged = bytearray(data)
        details = change(damaged, spans, rng)  # type: ignore[arg-type, call-arg]
        model[name] = bytes(damaged)
    elif kind == "graft":
        details = _graft(document, others, rng)
        model[name] = document.write()[0]
    else:
        details = change(document, rng)  # type: ignore[arg-type, call-arg]
        model[name] = document.write()[0]
    return f"{kind}: {details}" + (f" in {name}" if len(model) > 1 else "")


# Metadata


def _pick(document: Document, rng: Random, wanted: Callable[[Entry], bool]) -> Entry:
    """A matching entry, or any (parts of a split model have few)."""
    found = [e for e in document.entries if wanted(e)] or document.entries
    return rng.choice(found)


def _is_number(entry: Entry) -> bool:
    return entry.payload is not None and entry.kind in CODES


def _value(document: Document, rng: Random) -> str:
    entry = _pick(document, rng, _is_number)
    if not _is_number(entry):
        return _key_text(document, rng)
    old = entry.number()
    if entry.kind in FLOATS:
        value = rng.choice((*_REALS, old * 2, old / 2, -old))
    else:
        value = rng.choice((*_NUMBERS, old + 1, old - 1, old * 2, old // 2, rng.getrandbits(32)))
    entry.payload = number(entry.kind, value)
    return f"{entry.key!r} {old} → {value}"


def _value_type(document: Document, rng: Random) -> str:
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


def _key_text(document: Document, rng: Random) -> str:
    entry = _pick(document, rng, lambda e: e.kind == STRING)
    if entry.kind != STRING:
        return _key(document, rng)
    old = (entry.payload or b"")[8:]
    new = rng.choice((*_STRINGS, old[:-1], old + b" ", old.upper(), b"llama", b"gpt2", b"bert", b"default"))
    entry.payload = text(new)
    return f"{entry.key!r} {old[:20]!r} → {new[:20]!r}"


def _architecture(document: Document, rng: Random) -> str:
    """Another architecture, with its hyper-parameters under the new name or without any."""
    new, renamed = rng.choice(_ARCHITECTURES), rng.random() < 0.7
    for entry in document.entries:
        if entry.key == b"general.architecture":
            entry.payload = text(new)
        elif renamed and entry.key.startswith(b"llama."):
            entry.key = new + entry.key.removeprefix(b"llama")
    return f"{new!r}{', hyper-parameters renamed' if renamed else ''}"


def _key(document: Document, rng: Random) -> str:
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


def _added(document: Document, rng: Random) -> str:
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


def _alignment(document: Document, rng: Random) -> str:
    """A file truly written with another alignment, which is as good as before where it is a power of two."""
    document.alignment = rng.choice((8, 16, 48, 64, 4096))
    document.entries.append(Entry(b"general.alignment", 4, number(4, document.alignment)))
    return str(document.alignment)


def _array(document: Document, rng: Random) -> str:
    """An array shortened, lengthened, emptied, of another type, or with other items."""
    entry = _pick(document, rng, lambda e: e.payload is None)
    if entry.payload is not None or not entry.items:
        return _key(document, rng)
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


def _dims(document: Document, rng: Random) -> str:
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


def _tensor_type(document: Document, rng: Random) -> str:
    tensor, other = rng.choice(document.tensors), rng.choice(document.tensors)
    old = tensor.kind
    if rng.random() < 0.3:
        tensor.kind, other.kind = other.kind, tensor.kind
        return f"{tensor.name!r} {old} ↔ {other.name!r} {tensor.kind}"
    # 2 and 20 (Q4_0, IQ4_NL) and others have blocks of the same bytes
    tensor.kind = rng.choice((*range(45), 20, 20, 2, 2, 99, (1 << 31) - 1, (1 << 32) - 1))
    return f"{tensor.name!r} {old} → {tensor.kind}"


def _tensor_name(document: Document, rng: Random) -> str:
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


def _offset(document: Document, rng: Random) -> str:
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


def _tensor_list(document: Document, rng: Random) -> str:
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


def _block_scale(document: Document, rng: Random) -> str:
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


def _block_data(document: Document, rng: Random) -> str:
    tensor = rng.choice(document.tensors)
    data, count = bytearray(tensor.data), rng.choice((1, 1, 8, 1000))
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    tensor.data = bytes(data)
    return f"{tensor.name!r} {count} bits"


def _graft(document: Document, others: list[Model], rng: Random) -> str:
    """Metadata or tensors of another model's file."""
    donor = Document.parse(next(c for c in rng.choice(others).values() if c))
    if rng.random() < 0.5:
        document.entries = donor.entries
        return "another file's metadata"
    theirs = rng.sample(donor.tensors, k=min(len(donor.tensors), rng.choice((1, 5, 1000))))
    by_name = {tensor.name: tensor for tensor in theirs}
    document.tensors = [by_name.get(tensor.name, tensor) for tensor in document.tensors]
    return f"{len(theirs)} tensors of another file"


# Bytes


def _field(data: bytearray, spans: list[Span], rng: Random) -> str:
    """A count, length, type or dimension overwritten."""
    kinds = sorted(
        {s.what for s in spans if s.size in (4, 8) and s.what not in ("magic", "key", "name", "data", "padding")}
    )
    kind = rng.choice(kinds)
    span = rng.choice([s for s in spans if s.what == kind and s.size in (4, 8)])
    old = int.from_bytes(data[span.offset : span.offset + span.size], "little")
    new = rng.choice((*_WIDE, old + 1, old - 1, old * 2, old // 2, rng.getrandbits(64))) % (1 << 8 * span.size)
    data[span.offset : span.offset + span.size] = new.to_bytes(span.size, "little")
    return f"{kind} at {span.offset} {old} → {new}"


def _head_end(spans: list[Span]) -> int:
    return next(s.offset + s.size for s in spans if s.what == "padding")


def _range(data: bytearray, spans: list[Span], rng: Random) -> tuple[int, int]:
    """A stretch of the head (mostly) or of the data."""
    end = _head_end(spans) if rng.random() < 0.7 else len(data)
    start = rng.randrange(end)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 16, 64, 1024, 100_000)))


def _flip(data: bytearray, spans: list[Span], rng: Random) -> str:
    """Bits or whole bytes at random places: in the head, at the front of it, in the data, anywhere."""
    end = rng.choice((64, _head_end(spans), _head_end(spans), len(data)))
    start = _head_end(spans) if end == len(data) and rng.random() < 0.5 else 0
    places = [rng.randrange(start, min(end, len(data))) for _ in range(rng.choice((1, 1, 2, 8, 64)))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    return f"{len(places)} at {places[0]} …"


def _fill(data: bytearray, spans: list[Span], rng: Random) -> str:
    start, end = _range(data, spans, rng)
    how = rng.choice(("zeros", "ones", "random"))
    fill = {"zeros": bytes(end - start), "ones": b"\xff" * (end - start), "random": rng.randbytes(end - start)}
    data[start:end] = fill[how]
    return f"{how} {start}…{end}"


def _splice(data: bytearray, spans: list[Span], rng: Random) -> str:
    """A stretch copied over another, or inserted, or removed; the rest moves along."""
    start, end = _range(data, spans, rng)
    piece = bytes(data[start:end])
    how = rng.choice(("copied over", "inserted", "removed"))
    at = rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(_head_end(spans))
    if how == "copied over":
        data[at : at + len(piece)] = piece
    elif how == "inserted":
        data[at:at] = piece
    else:
        del data[start:end]
    return f"{len(piece)} bytes of {start} {how} {at}"


def _tail(data: bytearray, spans: list[Span], rng: Random) -> str:
    count = rng.choice((1, 31, 32, 4096))
    data += rng.randbytes(count)
    return f"{count} bytes behind the end"


def _padding(data: bytearray, spans: list[Span], rng: Random) -> str:
    """Bytes between the head and the data, or behind a tensor, which mean nothing."""
    span = rng.choice([s for s in spans if s.what == "padding" and s.size] or [spans[0]])
    for place in range(span.offset, span.offset + span.size):
        data[place] ^= rng.randrange(256)
    return f"{span.size} bytes at {span.offset}"


def _magic(data: bytearray, spans: list[Span], rng: Random) -> str:
    new = rng.choice((b"GGUG", b"FUGG", b"GGML", b"PK\x03\x04", b"\x7fELF", b"\0\0\0\0", b"gguf"))
    data[:4] = new
    return repr(new)


def _version(data: bytearray, spans: list[Span], rng: Random) -> str:
    new = rng.choice((0, 1, 2, 4, 99, 3 << 24, (1 << 32) - 1))
    data[4:8] = struct.pack("<I", new)
    return str(new)


def _cut(data: bytearray, spans: list[Span], rng: Random) -> str:
    """The file ends at or beside a boundary, or anywhere."""
    length = rng.choice(spans).offset + rng.choice((0, 0, 1, -1)) if rng.random() < 0.7 else rng.randrange(len(data))
    length = max(0, min(length, len(data) - 1))
    del data[length:]
    return f"{length} bytes are left"


# Several files


def _split_files(model: Model, rng: Random) -> str:
    """A file of a split model missing, empty, cut, exchanged, doubled or a folder; another one given as the first."""
    names = list(model)
    how = rng.choice(("missing", "empty", "cut", "exchanged", "doubled", "folder", "other first", "renamed"))
    at, other = rng.randrange(len(names)), rng.randrange(len(names))
    content = model[names[at]] or b""
    if len(names) > 1 and how in ("missing", "folder"):
        at = max(1, at)  # without a file to load there is nothing to test
    if how == "missing" and len(names) > 1:
        del model[names[at]]
    elif how == "empty":
        model[names[at]] = b""
    elif how == "cut":
        model[names[at]] = content[: rng.randrange(len(content) + 1)]
    elif how == "exchanged":
        model[names[at]], model[names[other]] = model[names[other]], model[names[at]]
    elif how == "doubled":
        model[names[other]] = content
    elif how == "folder" and len(names) > 1:
        model[names[at]] = None
    else:
        items = list(model.items())
        rest = items[at:] + items[:at] if how == "other first" else [(f"x{items[0][0]}", items[0][1]), *items[1:]]
        model.clear()
        model.update(rest)
    return f"{how} {at}"


# kind → (how often, what it does)
_KINDS: dict[str, tuple[int, OnDocument | OnBytes | OnModel]] = {
    "value": (14, _value),
    "value type": (6, _value_type),
    "text": (6, _key_text),
    "architecture": (3, _architecture),
    "key": (6, _key),
    "added": (7, _added),
    "alignment": (1, _alignment),
    "array": (10, _array),
    "dims": (6, _dims),
    "tensor type": (5, _tensor_type),
    "tensor name": (4, _tensor_name),
    "offset": (4, _offset),
    "tensors": (4, _tensor_list),
    "block scale": (4, _block_scale),
    "block data": (3, _block_data),
    "graft": (2, lambda document, rng: ""),
    "bytes: field": (16, _field),
    "bytes: flip": (12, _flip),
    "bytes: fill": (5, _fill),
    "bytes: splice": (6, _splice),
    "bytes: tail": (1, _tail),
    "bytes: padding": (1, _padding),
    "bytes: magic": (1, _magic),
    "bytes: version": (1, _version),
    "cut": (8, _cut),
    "split files": (5, _split_files),
}
