"""Tokenizer metadata: vocabulary, merges or scores, token types, special tokens, chat templates.

What counts is the tokenizer as transformers loads it (that is what calibration and evaluation used), so facts are read
from its serialised form and, for the added BOS, EOS and leading space, from what it does to a letter. Source of the
conventions: `get_vocab_base`, `_create_vocab_sentencepiece` in conversion/base.py and `llama_vocab::impl::load`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf

from exporters.gguf.tokenizer import pretokenizer
from exporters.gguf.tokenizer.chat_templates import add_chat_templates
from exporters.gguf.tokenizer.differences import byte_level_differences, is_phi3, sentencepiece_differences
from exporters.gguf.tokenizer.sentencepiece_vocab import Vocabulary, extra_splits, from_merges, from_model
from exporters.gguf.tokenizer.special_tokens import add_end_tokens, add_special_ids, special_ids
from signround_edge.errors import UserError
from signround_edge.model.config import is_model_folder, read_config
from signround_edge.model.tokenizer import chat_templates, end_tokens

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
GEMMA4 = "gemma4"  # llama.cpp's name of merges over a whole line, with byte fallback
# Control tokens that llama.cpp's chat parser must be able to read. Source: `Gemma4Model.set_vocab`.
_GEMMA4_SHOWN = (
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
)
_TEMPLATE_HINT = "make an f16 GGUF of the model with llama.cpp's convert_hf_to_gguf.py and give it as --template"


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer as transformers loads it.

    Attributes:
        folder: where its files are.
        hf: the transformers object.
        content: its serialised form, as in tokenizer.json.
    """

    folder: Path
    hf: Any
    content: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> LoadedTokenizer | None:
        """None when the folder has no tokenizer files; UserError when they cannot be loaded."""
        if not any((folder / name).is_file() for name in _FILES):
            return None
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            content = json.loads(hf.backend_tokenizer.to_str())
        except Exception as error:  # transformers and tokenizers raise what they like
            raise UserError(f"the tokenizer in {folder} cannot be loaded ({error}); {_TEMPLATE_HINT}") from error
        return cls(folder, hf, content)

    def added_affixes(self) -> tuple[list[int], list[int]]:
        """Token ids that encoding adds in front of a text and behind it."""
        plain = self.hf.encode("a", add_special_tokens=False)
        full = self.hf.encode("a", add_special_tokens=True)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def adds_leading_space(self) -> bool:
        """Whether a text that begins with a letter is encoded as if it began with a space."""
        ids = self.hf.encode("a", add_special_tokens=False)
        return bool(ids) and self.hf.convert_ids_to_tokens(ids[0]).startswith(("▁", "Ġ"))


def add_tokenizer(
    writer: gguf.GGUFWriter,
    folder: Path,
    n_vocab: int,
    log: Callable[[str], None],
    name: str = "",
    kind: str | None = None,
) -> list[str]:
    """Write all `tokenizer.*` keys for an embedding of `n_vocab` rows. UserError for kinds that are not built in.

    Args:
        log: is told where llama.cpp will do otherwise than the tokenizer.
        name: of the model, by which llama.cpp knows a Phi-3.
        kind: llama.cpp's kind of tokenizer, where the architecture has one of its own (`GEMMA4`).
    Returns:
        the tokens in order of their ids; none when the folder has no tokenizer.
    """
    loaded = LoadedTokenizer.load(folder)
    if loaded is None:
        log("the model has no tokenizer; the file holds token ids only")
        writer.add_tokenizer_model("no_vocab")
        return []
    model = loaded.content["model"]
    if kind == GEMMA4 and model["type"] == "BPE" and model.get("byte_fallback"):
        vocabulary = _add_gemma4(writer, loaded, n_vocab, log)
        differences = sentencepiece_differences
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        vocabulary = _add_sentencepiece(writer, loaded, n_vocab, log)
        differences = sentencepiece_differences
    elif model["type"] == "BPE":
        vocabulary = _add_byte_level(writer, loaded, n_vocab, log)
        differences = byte_level_differences
    else:
        raise UserError(f"tokenizers of kind {model['type']} have no built-in GGUF metadata; {_TEMPLATE_HINT}")
    for line in differences(loaded.content, is_phi3(name, vocabulary.tokens)):
        log(line)
    _add_special(writer, loaded, vocabulary, log)
    return vocabulary.tokens


def say_differences(metadata: Callable[[str], Any], folder: Path, log: Callable[[str], None]) -> None:
    """Say where llama.cpp will do otherwise than the tokenizer of `folder`, given a file's metadata (a template's)."""
    keys = gguf.Keys.Tokenizer
    sentencepiece = dict.fromkeys(("llama", GEMMA4), sentencepiece_differences)
    kinds = {"gpt2": byte_level_differences, **sentencepiece}
    differences, tokens = kinds.get(str(metadata(keys.MODEL))), metadata(keys.LIST)
    if differences is None or not isinstance(tokens, list):
        return
    try:
        loaded = LoadedTokenizer.load(folder)
    except UserError:  # the template's tokenizer is used, and nobody needs this one
        return
    if loaded is not None:
        for line in differences(loaded.content, is_phi3(str(metadata(gguf.Keys.General.NAME) or ""), map(str, tokens))):
            log(line)


def _add_byte_level(
    writer: gguf.GGUFWriter, loaded: LoadedTokenizer, n_vocab: int, log: Callable[[str], None]
) -> Vocabulary:
    """Byte-level BPE: `tokenizer.ggml.model` "gpt2"."""
    check_ids = loaded.hf.encode(pretokenizer.CHECK_TEXT)
    name = pretokenizer.detect(loaded.content, check_ids)
    if name in pretokenizer.APPROXIMATE:
        log(f"llama.cpp's pre-tokenizer {name!r} is approximate: tokens of accented and non-Latin words may differ")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    if loaded.adds_leading_space():
        log("llama.cpp does not put a space in front of a text as this tokenizer does; the first token may differ")
    vocabulary = Vocabulary.of_size(n_vocab)
    for text, index in loaded.content["model"]["vocab"].items():
        vocabulary.set(index, text, 0.0, gguf.TokenType.NORMAL)
    _add_tokens(writer, loaded, vocabulary, with_scores=False)
    _add_merges(writer, loaded)
    return vocabulary


def _add_merges(writer: gguf.GGUFWriter, loaded: LoadedTokenizer) -> None:
    merges = loaded.content["model"]["merges"]
    if not merges:
        raise UserError(f"the tokenizer in {loaded.folder} has no merges; {_TEMPLATE_HINT}")
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def _add_gemma4(
    writer: gguf.GGUFWriter, loaded: LoadedTokenizer, n_vocab: int, log: Callable[[str], None]
) -> Vocabulary:
    """BPE with byte fallback by its merges, not by scores as "llama" has it: `tokenizer.ggml.model` "gemma4"."""
    vocabulary = from_merges(loaded.content["model"], n_vocab)
    vocabulary.scores = [-1000.0] * n_vocab
    writer.add_tokenizer_model(GEMMA4)
    _add_tokens(writer, loaded, vocabulary, with_scores=True, shown=_GEMMA4_SHOWN)
    _add_merges(writer, loaded)
    writer.add_add_space_prefix(False)
    if loaded.adds_leading_space():
        log("llama.cpp does not put a space in front of a text as this tokenizer does; the first token may differ")
    if not loaded.added_affixes()[0]:
        log("llama.cpp puts BOS in front of every text of a Gemma 4, which this tokenizer does not")
    return vocabulary


def _add_sentencepiece(
    writer: gguf.GGUFWriter, loaded: LoadedTokenizer, n_vocab: int, log: Callable[[str], None]
) -> Vocabulary:
    """SentencePiece BPE, from tokenizer.model or from the merges of tokenizer.json: `tokenizer.ggml.model` "llama"."""
    vocabulary = from_model(loaded.folder / "tokenizer.model", loaded.content["model"]["vocab"], n_vocab)
    if vocabulary is None:
        vocabulary = from_merges(loaded.content["model"], n_vocab)
        extra = extra_splits(loaded.content["model"])
        if extra:
            log(
                f"{extra} token pairs may merge in llama.cpp though the tokenizer has no such merge; "
                "token ids can differ in rare words"
            )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    _add_tokens(writer, loaded, vocabulary, with_scores=True)
    writer.add_add_space_prefix(loaded.adds_leading_space())
    return vocabulary


def _add_tokens(
    writer: gguf.GGUFWriter,
    loaded: LoadedTokenizer,
    vocabulary: Vocabulary,
    with_scores: bool,
    shown: tuple[str, ...] = (),
) -> None:
    """Overlay the added tokens and write tokens, scores and types; `shown` are user-defined in any case."""
    unknown = loaded.content["model"].get("unk_token")
    for token in loaded.content.get("added_tokens") or ():
        text, index = token["content"], token["id"]
        if with_scores and text == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif text not in shown and (token["special"] or _looks_special(text)):
            kind = gguf.TokenType.CONTROL
        else:
            # llama.cpp matches user-defined tokens in the text as written, with spaces for SentencePiece's "▁".
            text, kind = text.replace("▁", " "), gguf.TokenType.USER_DEFINED
        vocabulary.set(index, text, -1000.0, kind)
    writer.add_token_list(vocabulary.tokens)
    if with_scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)


def _looks_special(text: str) -> bool:
    """Some models do not mark their control tokens as special. Source: `does_token_look_special`."""
    fences = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(first) and text.endswith(last) for first, last in fences
    )


def _add_special(
    writer: gguf.GGUFWriter, loaded: LoadedTokenizer, vocabulary: Vocabulary, log: Callable[[str], None]
) -> None:
    """Special token ids, add_bos and add_eos flags, chat templates."""
    config = read_config(loaded.folder) if is_model_folder(loaded.folder) else {}
    ends = end_tokens(loaded.folder)
    ids = special_ids(loaded.hf, config, len(vocabulary.tokens))
    if "eos" in ids:
        ends = replace(ends, ids=(ids["eos"], *ends.ids))
    front, behind = loaded.added_affixes()
    if front:
        ids["bos"] = front[0]
    if behind:
        ids["eos"] = behind[-1]
    if len(front) > 1 or len(behind) > 1:
        log("llama.cpp adds one token in front of a text and one behind it, this tokenizer adds more")
    add_special_ids(writer, ids)
    add_end_tokens(writer, vocabulary.tokens, ids, ends, log)
    writer.add_add_bos_token(bool(front))
    writer.add_add_eos_token(bool(behind))
    add_chat_templates(writer, chat_templates(loaded.hf, loaded.folder), log)
