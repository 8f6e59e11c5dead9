"""Which of llama.cpp's named pre-tokenizers (`tokenizer.ggml.pre`) splits text as a byte-level BPE tokenizer does.

Two ways, in this order. llama.cpp's converter identifies a tokenizer by the hash of the token ids of one text; the
table below holds the hashes of tokenizers that the built-in families use (source: `get_vocab_base_pre` in
conversion/base.py). A tokenizer that is not in it, as any newly trained one, is recognised by the structure of its
pre-tokenizer: the regular expressions are compared with those in `llm_tokenizer_bpe` (llama-vocab.cpp).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer

from signround_edge.errors import UserError

# The text whose token ids llama.cpp's converter hashes; every character counts.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

KNOWN_HASHES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",  # Smaug-Llama-3
    "d353350c764d8c3b39c763113960e4fb4919bea5fbf208a0e3b22e8469dc7406": "llama4",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen 1.5, 2, 2.5, 3
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen3-Embedding
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # SmolLM, SmolLM2
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "7967bfa498ade6b757b064f31e964dddbb80f8f9a4d68d4ba7998fcf281c531a": "jina-v2-code",
    "c7ea5862a53e4272c035c8238367063e2b270d51faa48c0f09e9d5b54746c360": "poro-chat",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "60824e3c0d9401f89943cbb2fff727f0e2d4c545ba4df2d6e4f09a6db0f5b450": "chameleon",
    "ad851be1dba641f2e3711822f816db2c265f788b37c63b4e1aeacb9ee92de8eb": "gigachat",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
    "862f827721df956049dff5ca81a57f29e575280bc622e290d3bf4e35eca29015": "f2llmv2",
    "7dec86086fcc38b66b7bc1575a160ae21cf705be7718b9d5598190d7c12db76f": "superbpe",
    "9e454714343b69b99b71795c1d27a68c2a1d15dab111f4d353109f966af29da7": "lfm2",  # LFM2.5-8B-A1B
    "169bf0296a13c4d9b7672313f749eb36501d931022de052aad6e36f2bf34dd51": "lfm2",  # LFM2.5
    "bba3b3366b646dbdded5dbc42d59598b849371afc42f7beafa914afaa5b70aa6": "hunyuan-dense",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",  # GPT-NeoX, Pythia, OLMo, MPT
    "3c30d3ad1d6b64202cd222813e7736c2db6e1bd6d67197090fc1211fbc612ae7": "bloom",
    "bc01ce58980e1db43859146dc51b1758b3b88729b217a74792e9f8d43e479d21": "gpt3-finnish",
    "8aeee3860c56296a157a1fe2fad249ec40aa59b1bb5709f4ade11c4e6fe652ed": "falcon",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|" + _TAIL.replace(r"\p{L}", r"\p{L}\p{M}")
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|" + _CASED_TAIL
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}|" + _CASED_TAIL
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

# (regular expressions applied one after the other, whether a pre-token that is a token skips the merges) → name.
_STRUCTURES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((_BLOOM,), False): "bloom",
}

# Falcon's steps behind ByteLevel see bytes as characters, some of which (²³¹¼½¾) count as digits. llama.cpp splits the
# text itself by the same expressions; the tokens are the same because a merge across a split was never trained.
_FALCON: list[dict[str, Any]] = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    {"type": "Digits", "individual_digits": False},
    {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
]

# llama.cpp's own expressions for these replace letter-case classes by ASCII ones and leave combining marks out.
APPROXIMATE = ("tekken", "gpt-4o", "llama4", "pixtral")


def check_hash(token_ids: list[int]) -> str:
    """The hash by which llama.cpp's converter knows a tokenizer, of CHECK_TEXT's token ids (special tokens too)."""
    return hashlib.sha256(str(token_ids).encode()).hexdigest()


def detect(tokenizer: dict[str, Any], check_ids: list[int]) -> str:
    """The name for `tokenizer.ggml.pre`.

    Args:
        tokenizer: contents of tokenizer.json.
        check_ids: token ids of CHECK_TEXT, with special tokens.
    Raises:
        UserError: llama.cpp has no such pre-tokenizer, as far as is known here.
    """
    known = KNOWN_HASHES.get(check_hash(check_ids))
    if known is not None:
        return known
    if _steps(tokenizer.get("pre_tokenizer")) == _FALCON and not tokenizer["model"].get("ignore_merges"):
        return "falcon"
    patterns = _patterns(tokenizer.get("pre_tokenizer"))
    if patterns is not None:
        skips = bool(tokenizer["model"].get("ignore_merges"))
        name = _STRUCTURES.get((patterns, skips))
        if name is None and (patterns, not skips) in _STRUCTURES and _merges_reach_every_token(tokenizer):
            name = _STRUCTURES[patterns, not skips]
        if name is not None:
            return name
    raise UserError(
        "llama.cpp's name for this tokenizer's pre-tokenizer is not known (hash "
        f"{check_hash(check_ids)[:12]}…); make an f16 GGUF of the model with llama.cpp's convert_hf_to_gguf.py and "
        "give it as --template"
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What a pre-tokenizer does in turn, without the one setting that is not about tokens."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return [{key: value for key, value in (step or {}).items() if key != "trim_offsets"} for step in steps]


def _patterns(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The regular expressions that a byte-level pre-tokenizer applies in turn, or None where it does other things."""
    patterns: list[str] = []
    byte_level = False
    for step in _steps(pre_tokenizer):
        kind = step.get("type")
        if byte_level:
            return None  # a step after the change of alphabet sees other characters than llama.cpp's does
        if kind == "ByteLevel":
            byte_level = True
            if step.get("use_regex", True):
                patterns.append(_GPT2)
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "Split" and _keeps_matches_apart(step) and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        else:
            return None
    return tuple(patterns) if byte_level else None


def _keeps_matches_apart(split: dict[str, Any]) -> bool:
    """Whether every match becomes a pre-token: Isolated, or what lies between matches removed (nothing does)."""
    behavior, invert = split.get("behavior"), bool(split.get("invert"))
    return (behavior == "Isolated" and not invert) or (behavior == "Removed" and invert)


def _merges_reach_every_token(tokenizer: dict[str, Any]) -> bool:
    """Whether each token is what merging its own characters gives: then skipping the merges changes nothing."""
    plain: dict[str, Any] = {
        "model": {**tokenizer["model"], "ignore_merges": False, "dropout": None},
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    merging = Tokenizer.from_str(json.dumps(plain))
    added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    texts = [text for text in tokenizer["model"]["vocab"] if text not in added]
    return all(len(encoding.ids) <= 1 for encoding in merging.encode_batch(texts, add_special_tokens=False))
