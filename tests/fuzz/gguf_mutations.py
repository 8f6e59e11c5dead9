"""Ways to damage a GGUF model. Everything random comes from the generator given, so that a seed names a case.

A model is its files by name, the one to load first.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.fuzz import byte_damage as of_bytes
from tests.fuzz import document_damage as of_document
from tests.fuzz.gguf_document import MALFORMED, Document, Span

Model = dict[str, bytes | None]  # None: a folder of that name


def mutate(model: Model, others: list[Model], rng: Random) -> str:
    """Damage a model in place and say how: "kind: details"; now and then in two ways at once.

    Args:
        others: intact models, whose parts may be grafted on this one.
    """
    intact, kinds = list(model.items()), list(_OFTEN)
    said: list[str] = []
    while list(model.items()) == intact:  # some damage is none, such as two equal types exchanged
        said = [_apply(rng.choices(kinds, list(_OFTEN.values()))[0], model, others, rng)]
    if rng.random() < 0.1:
        said.append(_apply(rng.choice(kinds), model, others, rng))
    return "; and ".join(said)


def _apply(kind: str, model: Model, others: list[Model], rng: Random) -> str:
    if kind in _MODEL:
        return f"{kind}: {_MODEL[kind](model, others, rng)}"
    name, document = _pick_document(model, rng)
    if document is None:
        return f"{kind}: not a second time"
    if kind in _DOCUMENT:
        details = _DOCUMENT[kind](document, rng)
        model[name] = document.write()[0]
    else:
        content, spans = document.write()
        damaged = bytearray(content)
        details = _BYTES[kind](damaged, spans, rng)
        model[name] = bytes(damaged)
    return f"{kind}: {details}" + (f" in {name}" if len(model) > 1 else "")


def _pick_document(model: Model, rng: Random) -> tuple[str, Document | None]:
    """One of the files, most likely the first; None where it has been damaged beyond reading."""
    names = list(model)
    name = rng.choice([names[0], *names])
    try:
        return name, Document.parse(model[name] or b"")
    except MALFORMED:
        return name, None


def _graft(model: Model, others: list[Model], rng: Random) -> str:
    """Metadata or tensors of another model's file."""
    name, document = _pick_document(model, rng)
    if document is None:
        return "not a second time"
    donor = Document.parse(next(content for content in rng.choice(others).values() if content))
    if rng.random() < 0.5:
        document.entries = donor.entries
        said = "another file's metadata"
    else:
        theirs = rng.sample(donor.tensors, k=min(len(donor.tensors), rng.choice((1, 5, 1000))))
        by_name = {tensor.name: tensor for tensor in theirs}
        document.tensors = [by_name.get(tensor.name, tensor) for tensor in document.tensors]
        said = f"{len(theirs)} tensors of another file"
    model[name] = document.write()[0]
    return said


def _damage_files(model: Model, others: list[Model], rng: Random) -> str:
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


_DOCUMENT: dict[str, Callable[[Document, Random], str]] = {
    "value": of_document.change_value,
    "value type": of_document.change_value_type,
    "text": of_document.change_text,
    "architecture": of_document.change_architecture,
    "key": of_document.change_key,
    "added": of_document.add_entry,
    "alignment": of_document.change_alignment,
    "array": of_document.change_array,
    "dims": of_document.change_dims,
    "tensor type": of_document.change_tensor_type,
    "tensor name": of_document.change_tensor_name,
    "offset": of_document.change_offset,
    "tensors": of_document.change_tensor_list,
    "block scale": of_document.change_block_scale,
    "block data": of_document.change_block_data,
}
_BYTES: dict[str, Callable[[bytearray, list[Span], Random], str]] = {
    "field": of_bytes.overwrite_field,
    "flip": of_bytes.flip,
    "fill": of_bytes.fill,
    "splice": of_bytes.splice,
    "cut": of_bytes.cut,
    "tail": of_bytes.add_tail,
    "padding": of_bytes.change_padding,
    "magic": of_bytes.change_magic,
    "version": of_bytes.change_version,
}
_MODEL: dict[str, Callable[[Model, list[Model], Random], str]] = {"graft": _graft, "files": _damage_files}

# How often each kind comes, relative to the others; 1 where it is not named.
_OFTEN = dict.fromkeys((*_DOCUMENT, *_BYTES, *_MODEL), 1) | {
    "value": 14, "value type": 6, "text": 6, "architecture": 3, "key": 6, "added": 7, "array": 10, "dims": 6,
    "tensor type": 5, "tensor name": 4, "offset": 4, "tensors": 4, "block scale": 4, "block data": 3, "graft": 2,
    "field": 16, "flip": 12, "fill": 5, "splice": 6, "cut": 8, "files": 5,
}  # fmt: skip
