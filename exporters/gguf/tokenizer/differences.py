"""Where llama.cpp cuts a text into other tokens than the tokenizer does, by what tokenizer.json says.

Source of what llama.cpp does: `llm_tokenizer_spm_session`, `tokenizer_st_partition` and the attributes of tokens in
`llama_vocab::impl::load`, all in llama-vocab.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

_SHOWN = 5
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


def is_phi3(name: str, tokens: Iterable[str]) -> bool:
    """Whether llama.cpp takes the special tokens for Phi-3's, by `general.name`: it drops spaces behind them."""
    return bool(re.search("phi-?3", name.lower())) and {"</s>", *_PHI3_KEEPS} <= set(tokens)


def byte_level_differences(content: dict[str, Any], phi3: bool) -> Iterator[str]:
    """One sentence for each difference of a byte-level BPE tokenizer; `content` is its tokenizer.json."""
    yield from _normalizer_difference([step["type"] for step in _steps(content.get("normalizer"), "normalizers")])
    yield from _added_token_differences(content, phi3)


def sentencepiece_differences(content: dict[str, Any], phi3: bool) -> Iterator[str]:
    """One sentence for each difference of a SentencePiece BPE tokenizer; `content` is its tokenizer.json."""
    steps = _steps(content.get("normalizer"), "normalizers")
    yield from _normalizer_difference([step["type"] for step in steps if not _is_sentencepieces(step)])
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            yield from _metaspace_differences(step)
        elif step["type"] != "Split" or step["pattern"].get("String") != " ":  # no space is left to split at
            yield f"llama.cpp does not split texts before it merges ({step['type']}); token ids may differ"
    yield from _added_token_differences(content, phi3)


def _normalizer_difference(kinds: list[str]) -> Iterator[str]:
    if kinds:
        yield (
            f"llama.cpp does not apply this tokenizer's normalizer ({', '.join(kinds)}): texts that it changes get "
            "other token ids"
        )


def _is_sentencepieces(normalizer: dict[str, Any]) -> bool:
    """What llama.cpp does too: "▁" in front and for each space."""
    if normalizer["type"] == "Prepend":
        return bool(normalizer["prepend"] == "▁")
    return normalizer["type"] == "Replace" and (normalizer["pattern"], normalizer["content"]) == ({"String": " "}, "▁")


def _metaspace_differences(step: dict[str, Any]) -> Iterator[str]:
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    if scheme == "never":
        return
    yield (
        "llama.cpp puts a space in front of every text, this tokenizer only where there is none: texts that begin with "
        "a space get other token ids"
    )
    if scheme == "first":
        yield (
            "llama.cpp puts a space in front of text behind a special token, this tokenizer does not (prepend_scheme "
            "first): token ids differ there, as in chats"
        )


def _added_token_differences(content: dict[str, Any], phi3: bool) -> Iterator[str]:
    added = content.get("added_tokens") or []
    drops = {token["content"]: bool(token.get("rstrip")) for token in added}
    by_name = {text: phi3 and text not in _PHI3_KEEPS for text in drops}
    before = [token["content"] for token in added if token.get("lstrip")]
    behind = [text for text, dropped in drops.items() if dropped and not by_name[text]]
    kept = [text for text, dropped in drops.items() if by_name[text] and not dropped]
    words = [token["content"] for token in added if token.get("single_word")]
    if before:
        yield f"llama.cpp keeps the spaces in front of {_listed(before)}, which this tokenizer drops (lstrip)"
    if behind:
        yield f"llama.cpp keeps the spaces behind {_listed(behind)}, which this tokenizer drops (rstrip)"
    if kept:
        yield f"llama.cpp drops the spaces behind {_listed(kept)}, as in a Phi-3, which this tokenizer keeps"
    if words:
        yield f"llama.cpp finds {_listed(words)} within words too, this tokenizer does not (single_word)"


def _listed(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} other tokens" if more > 0 else "")


def _steps(part: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does in turn."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for child in part[children] for step in _steps(child, children)]
    return [part]
