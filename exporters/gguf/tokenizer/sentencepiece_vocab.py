"""Vocabularies with token types and SentencePiece scores.

llama.cpp's "llama" tokenizer merges the adjacent pair whose union has the highest score, so scores must order pieces as
the merges of the original do (source: `llm_tokenizer_spm_session` in llama-vocab.cpp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PADDING_SCORE = -10000.0


@dataclass
class Vocabulary:
    """Tokens in order of their ids; ids that nothing uses hold `[PAD<id>]` of type UNUSED."""

    tokens: list[str]
    scores: list[float]
    types: list[int]

    @classmethod
    def of_size(cls, size: int) -> Vocabulary:
        unused = [int(gguf.TokenType.UNUSED)] * size
        return cls([f"[PAD{i}]" for i in range(size)], [_PADDING_SCORE] * size, unused)

    def set(self, index: int, text: str, score: float, kind: gguf.TokenType) -> None:
        """Set one token; an id beyond the embedding is left out, as no model can be given it."""
        if index < len(self.tokens):
            self.tokens[index], self.scores[index], self.types[index] = text, score, int(kind)


def from_model(file: Path, vocab: dict[str, int], size: int) -> Vocabulary | None:
    """The vocabulary of a SentencePiece BPE model, or None when the file is missing, of another kind, or at odds
    with `vocab` (the tokenizer as transformers loads it)."""
    if not file.is_file():
        return None
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
        processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception:  # not a SentencePiece file (tiktoken's are called tokenizer.model too)
        return None
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return None
    vocabulary = Vocabulary.of_size(size)
    for index in range(processor.get_piece_size()):
        piece = processor.id_to_piece(index)
        if vocab.get(piece, index) != index:
            return None
        if processor.is_unknown(index):
            kind = gguf.TokenType.UNKNOWN
        elif processor.is_control(index):
            kind = gguf.TokenType.CONTROL
        elif processor.is_unused(index):
            kind = gguf.TokenType.UNUSED
        elif processor.is_byte(index):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        vocabulary.set(index, piece, processor.get_score(index), kind)
    return vocabulary


def from_merges(model: dict[str, Any], size: int) -> Vocabulary:
    """The vocabulary of a BPE model with byte fallback: a piece's score is minus the rank of its first merge."""
    rank: dict[str, int] = {}
    for position, (left, right) in enumerate(_pairs(model)):
        rank.setdefault(left + right, position)
    vocabulary = Vocabulary.of_size(size)
    last = len(rank) + 1
    for text, index in model["vocab"].items():
        kind = gguf.TokenType.BYTE if _BYTE.fullmatch(text) else gguf.TokenType.NORMAL
        vocabulary.set(index, text, -float(rank.get(text, last)), kind)
    return vocabulary


def extra_splits(model: dict[str, Any]) -> int:
    """How many pairs of tokens join to a token without being a merge: scores would let them merge, ranks do not."""
    vocab = model["vocab"]
    merges = set(_pairs(model))
    merged = {left + right for left, right in merges}
    splits = ((text[:i], text[i:]) for text in merged for i in range(1, len(text)))
    return sum(1 for pair in splits if pair not in merges and pair[0] in vocab and pair[1] in vocab)


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; tokenizer.json has them as pairs or, before tokenizers 0.20, as one string with a space."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]
