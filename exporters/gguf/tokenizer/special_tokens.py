"""Special tokens in GGUF: their ids, and the tokens at which llama.cpp ends a text.

transformers' tokenizer says which token is which; config.json only where it has none. llama.cpp ends a text at three
ids that a file names (`eos`, `eot`, `eom`) and at tokens that it knows by their text. Source: `llama_vocab::impl::load`
in llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gguf

from signround_edge.model.tokenizer import EndTokens

_KEYS = gguf.Keys.Tokenizer
_ID_KEYS = {
    "bos": _KEYS.BOS_ID,
    "eos": _KEYS.EOS_ID,
    "unk": _KEYS.UNK_ID,
    "sep": _KEYS.SEP_ID,
    "pad": _KEYS.PAD_ID,
    "mask": _KEYS.MASK_ID,
}

# Tokens that end a text for llama.cpp by what they are called.
ENDS_BY_TEXT = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    )
)  # fmt: skip
# Which never do where all of the others are in the vocabulary too, not even by their id.
_NEVER_BESIDE = {
    "<|end|>": ({"<|return|>", "<|call|>"}, {"<|return|>", "<|calls|>"}, {"<|call|>", "<|flush|>"},
                {"<|calls|>", "<|flush|>"}),
    "</s>": ({"<|tool_response>"},),
}  # fmt: skip
# Where a key is missing, llama.cpp takes a token with such a text for it: that is better left to it.
_FOUND_BY_TEXT = {
    _KEYS.EOT_ID: {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
                   "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"},
    _KEYS.EOM_ID: {"<|eom_id|>"},
}  # fmt: skip


def special_ids(hf: Any, config: dict[str, Any], n_vocab: int) -> dict[str, int]:
    """Kind of token → id, of those that an embedding of `n_vocab` rows has.

    Args:
        hf: transformers' tokenizer.
        config: config.json, whose own `text_config` stands in for what it does not say.
    """
    found: dict[str, int] = {}
    for kind in _ID_KEYS:
        name = f"{kind}_token_id"
        own = getattr(hf, name, None)  # an attribute of every transformers tokenizer
        for index in (own, config.get(name), (config.get("text_config") or {}).get(name)):
            if type(index) is int and 0 <= index < n_vocab:
                found[kind] = index
                break
    return found


def add_special_ids(writer: gguf.GGUFWriter, ids: dict[str, int]) -> None:
    """Write the keys of `special_ids`."""
    for kind, index in ids.items():
        writer.add_uint32(_ID_KEYS[kind], index)


def add_end_tokens(
    writer: gguf.GGUFWriter, tokens: Sequence[str], ids: dict[str, int], ends: EndTokens, log: Callable[[str], None]
) -> None:
    """Write `eot` and `eom` for the tokens at which llama.cpp would not end a text otherwise, and say which are lost.

    Args:
        tokens: the vocabulary.
        ids: kind of token → id, as the file has them.
    """
    missing, lost = _not_ending(tokens, [ids.get("eos")], ends)
    known = set(tokens)
    keys = sorted(_FOUND_BY_TEXT, key=lambda key: bool(_FOUND_BY_TEXT[key] & known))
    for key in keys if "eos" in ids else [_KEYS.EOS_ID, *keys]:
        if missing:
            writer.add_uint32(key, missing.pop(0))
    _say_lost(tokens, missing + lost, ends, log)


def check_end_tokens(metadata: Callable[[str], object], ends: EndTokens, log: Callable[[str], None]) -> None:
    """Say at which tokens llama.cpp will not end a text, of a file with this metadata."""
    tokens = metadata(_KEYS.LIST)
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        missing, lost = _not_ending(tokens, [metadata(key) for key in (_KEYS.EOS_ID, *_FOUND_BY_TEXT)], ends)
        _say_lost(tokens, missing + lost, ends, log)


def _not_ending(tokens: Sequence[str], named: Iterable[object], ends: EndTokens) -> tuple[list[int], list[int]]:
    """Ids at which llama.cpp does not end a text: those that a key would help, and those that it would not."""
    known, vocabulary = [index for index in named if isinstance(index, int)], set(tokens)
    never = {text for text, others in _NEVER_BESIDE.items() if any(each <= vocabulary for each in others)}
    ids = [index for index in dict.fromkeys(ends.ids) if index < len(tokens)]
    lost = [index for index in ids if tokens[index] in never]
    return [i for i in ids if i not in lost and i not in known and tokens[i] not in ENDS_BY_TEXT], lost


def _say_lost(tokens: Sequence[str], lost: list[int], ends: EndTokens, log: Callable[[str], None]) -> None:
    if lost:
        named = ", ".join(f"{index} ({tokens[index]})" for index in lost)
        log(
            f"llama.cpp will not end a text at token {named}, where {ends.source} ends it: it can be told of three "
            'such tokens; give these to it when it runs (--reverse-prompt, or "stop" in a request to llama-server)'
        )
