"""Whether a damaged model still means the same: every weight's value and every metadata value that decides anything."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants

from tests.fuzz.gguf_document import CODES, MALFORMED, Document, Entry, Tensor
from tests.fuzz.gguf_mutations import Model

_FREE = (b"general.file_type", b"signround_edge.version")
_TEMPLATE = b"signround_edge.template"


def differences(intact: Model, damaged: Model) -> str | None:
    """What is no longer the same, in a few words; None when nothing is.

    With a template the artifact's own metadata is all that there is, so only weights count there.
    """
    try:
        before, after = _documents(intact), _documents(damaged)
    except MALFORMED as error:
        return f"it cannot be taken apart ({error!r})"
    old, new = _metadata(before[0]), _metadata(after[0])
    if _TEMPLATE not in new:
        old.pop(_TEMPLATE, None)  # all else being equal, the file is what the built-in route makes
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if keys:
            return f"metadata {keys} differs"
    ours, theirs = _tensors(before), _tensors(after)
    if ours.keys() != theirs.keys():
        return f"its tensors are not the same: {sorted(ours.keys() ^ theirs.keys())}"
    wrong = [name for name, tensor in ours.items() if not _equal(tensor, theirs[name])]
    return f"tensors {wrong} differ" if wrong else None


def _documents(model: Model) -> list[Document]:
    """The files that a loader reads: the first, or as many as it announces."""
    documents = [Document.parse(content or b"") for content in list(model.values())]
    count = documents[0].entry(b"split.count")
    return documents[: max(1, int(count.number()))] if count else documents[:1]


def _metadata(document: Document) -> dict[bytes, Any]:
    return {e.key: _value(e) for e in document.entries if e.key not in _FREE and not e.key.startswith(b"split.")}


def _value(entry: Entry) -> Any:
    if entry.payload is None:
        return entry.kind, entry.item_kind, entry.items
    return entry.kind, entry.number() if entry.kind in CODES else entry.payload


def _tensors(documents: list[Document]) -> dict[bytes, Tensor]:
    return {tensor.name: tensor for document in documents for tensor in document.tensors}


def _equal(one: Tensor, other: Tensor) -> bool:
    if _trimmed(one.dims) != _trimmed(other.dims):
        return False
    if (one.kind, one.data) == (other.kind, other.data):
        return True
    values = [
        quants.dequantize(np.frombuffer(t.data, dtype=np.uint8), GGMLQuantizationType(t.kind)) for t in (one, other)
    ]
    return bool(np.array_equal(*values))


def _trimmed(dims: list[int]) -> list[int]:
    """Without ones at the end, which mean nothing."""
    return _trimmed(dims[:-1]) if dims[1:] and dims[-1] == 1 else dims
