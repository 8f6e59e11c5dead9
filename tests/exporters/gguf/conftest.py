"""Tiny models and tokenizers for the GGUF tests; random weights, so no download and no training time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, GemmaTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from signround_edge.run_directory import RunDirectory
from tests.support import make_run, save_random_model

TEXT = (
    "Hello world, I've been told that they're 1234567 people; 3.14 is π!  Two  spaces,\ttab\n\n\nand lines \r\n end. "
    "Größe, façade, naïve — “quotes” … Привет, мир! 你好，世界 こんにちは 세계 مرحبا שלום नमस्ते 🚀👩‍👩‍👧 ½ Ⅷ ①   "
    "x²+y² = z² fooBarBAZ HTTPServer I'LL We'Ve a'lL def f(x):\n    return x[0] if x else None  # comment\n"
)

BASE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def train_byte_level(folder: Path, pre_tokenizer: pre_tokenizers.PreTokenizer, bos: bool = False) -> Path:
    """A byte-level BPE tokenizer of 600 tokens, trained on a few lines, in transformers' layout."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=590,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "some more words of the world and the people"] * 3, trainer)
    tokenizer.add_tokens(["<tool>"])  # user-defined, not special
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    fast.save_pretrained(folder)
    return folder


def gpt2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_byte_level(tmp_path_factory.mktemp("bytelevel"), gpt2_split())


def train_sentencepiece(folder: Path, **options: object) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a SentencePiece BPE model of 590 tokens into `folder`/tokenizer.model.

    Returns:
        (vocab, merges): what transformers makes of it.
    """
    import sentencepiece

    text = folder / "text.txt"
    text.write_text((TEXT + " the people of the world and the words of the people told\n") * 20, encoding="utf-8")
    settings: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 590,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), **{**settings, **options}
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = {piece: processor.get_score(i) for piece, i in vocab.items()}
    return vocab, generate_merges(vocab, scores)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model as Llama 2's: tokenizer.model, and tokenizer.json made from its merges."""
    folder = tmp_path_factory.mktemp("spm")
    vocab, merges = train_sentencepiece(folder)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model as Gemma's: no leading space; runs of line ends and spaces are user-defined."""
    folder = tmp_path_factory.mktemp("gemma")
    runs = ["\n\n", "\n\n\n", "▁▁", "▁▁▁", "<table>"]
    vocab, merges = train_sentencepiece(
        folder,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=["<mask>", "<start_of_turn>", *runs],
    )
    tokenizer = GemmaTokenizer(vocab, merges, add_bos_token=True, extra_special_tokens=["<start_of_turn>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in runs])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., RunDirectory]:
    """A run directory of a random model with that config."""

    def make(config: PretrainedConfig, scheme: str = "gguf:q4_0", tokenizer: Path | None = None) -> RunDirectory:
        save_random_model(config, tmp_path / "model", tokenizer)
        return make_run(tmp_path / "model", tmp_path / "run", scheme)

    return make


def export(run: RunDirectory, out: Path, log: Callable[[str], None] = lambda line: None, **options: object) -> Path:
    return GgufExporter().export(run, out, ExportOptions(log=log, **options))  # type: ignore[arg-type]
