"""Calibration samples: a text file, JSON lines or a Hugging Face dataset name becomes tokens [samples, seqlen]."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.model.tokenizer import added_bos
from signround_edge.tuning.calibration.documents import calibration_text, read_documents


def calibration_tokens(source: str, tokenizer: Any, samples: int, seqlen: int) -> Tensor:
    """int64 [samples, seqlen] from `source`; fewer samples when the text is short, UserError when it gives none.

    A plain text is tokenized once and cut into windows spread evenly over it. Of JSON lines and datasets, each document
    of at least `seqlen` tokens gives its first `seqlen`; shorter ones are joined end to end and then cut, and those of
    white space alone left out.

    Where the tokenizer puts BOS in front of a text, every sample begins with it, as all that the model is given later
    does: many models let attention rest there, and behave otherwise where it is missing.
    """
    bos = added_bos(tokenizer)
    documents = read_documents(source, tokenizer)
    if documents is None:
        windows = _from_text(_encode(tokenizer, calibration_text(Path(source)), bos), bos, samples, seqlen)
    else:
        encoded = (_encode(tokenizer, document, bos) for document in documents if document.strip())
        windows = _from_documents(encoded, bos, samples, seqlen)
    if not windows:
        raise UserError(f"--calibration {source} has fewer than {seqlen} tokens; give more text or a smaller --seqlen")
    return torch.tensor(windows, dtype=torch.int64)


def tokens_hash(tokens: Tensor) -> str:
    """sha256 of the samples: part of what decides whether a run may be resumed."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _from_text(tokens: list[int], bos: int | None, samples: int, seqlen: int) -> list[list[int]]:
    """Windows spread over a text; BOS stands once in front of `tokens`, and is put in front of each window."""
    start = [] if bos is None else [bos]
    text, room = tokens[len(start) :], seqlen - len(start)
    count = min(samples, len(text) // room)
    spread = (len(text) - room) / max(1, count - 1)
    return [start + text[first : first + room] for first in (int(i * spread) for i in range(count))]


def _from_documents(documents: Iterable[list[int]], bos: int | None, samples: int, seqlen: int) -> list[list[int]]:
    """The first tokens of long documents, and windows of short ones joined, which keep their BOS inside the window."""
    windows: list[list[int]] = []
    short: list[int] = []
    for tokens in documents:
        if len(tokens) >= seqlen:
            windows.append(tokens[:seqlen])
        else:
            short += tokens
            start = [] if bos is None or short[:1] == [bos] else [bos]
            room = seqlen - len(start)
            if len(short) >= room:
                windows.append(start + short[:room])
                short = short[room:]
        if len(windows) == samples:
            break
    return windows


def _encode(tokenizer: Any, text: str, bos: int | None) -> list[int]:
    """A text's tokens; one BOS in front, also where the text brings its own, as chat templates do."""
    # verbose=False: the tokenizer would warn that the text is longer than the model's context; it is cut below.
    tokens = list(tokenizer(text, verbose=False)["input_ids"])
    return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens
