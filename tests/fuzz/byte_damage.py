"""Damage to the bytes of a written GGUF file, which knows where its fields are."""

from __future__ import annotations

import struct
from random import Random

from tests.fuzz.gguf_document import Span

_WIDE = (0, 1, 2, 3, 5, 33, 255, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 60, 1 << 63)


def overwrite_field(data: bytearray, spans: list[Span], rng: Random) -> str:
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


def flip(data: bytearray, spans: list[Span], rng: Random) -> str:
    """Bits or whole bytes at random places: in the head, at the front of it, in the data, anywhere."""
    end = rng.choice((64, _head_end(spans), _head_end(spans), len(data)))
    start = _head_end(spans) if end == len(data) and rng.random() < 0.5 else 0
    places = [rng.randrange(start, min(end, len(data))) for _ in range(rng.choice((1, 1, 2, 8, 64)))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    return f"{len(places)} at {places[0]} …"


def fill(data: bytearray, spans: list[Span], rng: Random) -> str:
    start, end = _range(data, spans, rng)
    how = rng.choice(("zeros", "ones", "random"))
    fill = {"zeros": bytes(end - start), "ones": b"\xff" * (end - start), "random": rng.randbytes(end - start)}
    data[start:end] = fill[how]
    return f"{how} {start}…{end}"


def splice(data: bytearray, spans: list[Span], rng: Random) -> str:
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


def add_tail(data: bytearray, spans: list[Span], rng: Random) -> str:
    count = rng.choice((1, 31, 32, 4096))
    data += rng.randbytes(count)
    return f"{count} bytes behind the end"


def change_padding(data: bytearray, spans: list[Span], rng: Random) -> str:
    """Bytes between the head and the data, or behind a tensor, which mean nothing."""
    span = rng.choice([s for s in spans if s.what == "padding" and s.size] or [spans[0]])
    for place in range(span.offset, span.offset + span.size):
        data[place] ^= rng.randrange(256)
    return f"{span.size} bytes at {span.offset}"


def change_magic(data: bytearray, spans: list[Span], rng: Random) -> str:
    new = rng.choice((b"GGUG", b"FUGG", b"GGML", b"PK\x03\x04", b"\x7fELF", b"\0\0\0\0", b"gguf"))
    data[:4] = new
    return repr(new)


def change_version(data: bytearray, spans: list[Span], rng: Random) -> str:
    new = rng.choice((0, 1, 2, 4, 99, 3 << 24, (1 << 32) - 1))
    data[4:8] = struct.pack("<I", new)
    return str(new)


def cut(data: bytearray, spans: list[Span], rng: Random) -> str:
    """The file ends at or beside a boundary, or anywhere."""
    length = rng.choice(spans).offset + rng.choice((0, 0, 1, -1)) if rng.random() < 0.7 else rng.randrange(len(data))
    length = max(0, min(length, len(data) - 1))
    del data[length:]
    return f"{length} bytes are left"
