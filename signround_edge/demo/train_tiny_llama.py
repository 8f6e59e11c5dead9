"""Train the tiny Llama that signround-edge ships, on one CPU core, in about half an hour.

    python -m signround_edge.demo.train_tiny_llama --train speeches-train.txt --test speeches-test.txt

writes `tiny-llama/` (model, tokenizer, model card) and the two text excerpts beside this file. The shapes are
small but honest: rows of 256 and 768 fit every block type of GGUF, and grouped-query attention and tied
embeddings are there because most small models on devices have them. The test file is read only for the
perplexities of the model card; checkpoints and smoothing are chosen on slices held out of the training file.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1  # the trainer numbers special tokens first
IGNORED = -100  # the label that cross_entropy skips


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of the model, on one machine."""

    vocabulary: int = 3072
    layers: int = 5
    context: int = 256  # BOS + 255 tokens of text
    batch_size: int = 4
    epochs: int = 7
    peak_learning_rate: float = 1e-3
    warmup: float = 0.05  # part of all steps
    weight_decay: float = 0.1
    gradient_norm: float = 1.0
    held_out_characters: int = 80_000
    seed: int = 0
    threads: int = 1  # sums depend on it; and two threads crawl when others want the cores


def slices(text: str, total: int, pieces: int) -> list[str]:
    """Evenly spaced runs of whole lines, about `total` characters together.

    Several and not one, because the files are in order of date and one president does not speak for all.
    """
    runs = []
    for piece in range(pieces):
        start = text.find("\n", piece * len(text) // pieces) + 1 if piece else 0
        runs.append(text[start : text.find("\n", start + total // pieces) + 1 or len(text)])
    return runs


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Byte-level BPE with exactly GPT-2's pre-tokenizer, which llama.cpp knows as the pre type `gpt-2`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # so that no byte is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write it under the class name that transformers 4 and 5, llama.cpp and onnxruntime-genai all know."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(settings: Settings) -> LlamaForCausalLM:
    """A Llama with random weights; projections into the residual stream start smaller, as in GPT-2."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= math.sqrt(2 * settings.layers)
            layer.mlp.down_proj.weight /= math.sqrt(2 * settings.layers)
    return model


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Cut tokens [n] into inputs [windows, context] that start with BOS and labels of the same shape.

    Position i of the inputs predicts position i of the labels, so every token is a label exactly once. The
    last window is filled up with BOS, which causal attention never sees, and ignored labels.
    """
    per_window = context - 1
    count = math.ceil(len(tokens) / per_window)
    labels = torch.full((count * per_window,), IGNORED)
    labels[: len(tokens)] = tokens
    labels = labels.view(count, per_window)
    begin = torch.full((count, 1), BOS_ID)
    inputs = torch.cat([begin, labels[:, :-1].clamp(min=BOS_ID)], dim=1)
    return inputs, labels


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor, context: int) -> float:
    """exp(mean negative log-likelihood) of all tokens, in windows that start with BOS; float32."""
    model.eval()
    inputs, labels = windows(tokens, context)
    loss = 0.0
    for rows, targets in zip(inputs.split(16), labels.split(16), strict=True):
        logits = model(input_ids=rows, use_cache=False).logits
        loss += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return math.exp(loss / len(tokens))


def bigram_perplexity(train: Tensor, tokens: Tensor, vocabulary: int, strength: float) -> float:
    """Bigram with a Dirichlet prior: P(b|a) = (count(ab) + strength·P(b)) / (count(a) + strength).

    The prior P(b) is the add-one unigram. Unlike the model, it sees the true previous token at window starts.
    """
    unigram = (torch.bincount(train, minlength=vocabulary) + 1.0) / (len(train) + vocabulary)
    pairs = torch.bincount(train[:-1] * vocabulary + train[1:], minlength=vocabulary**2)
    firsts = torch.bincount(train[:-1], minlength=vocabulary)
    previous = torch.cat([torch.tensor([BOS_ID]), tokens[:-1]])
    joint = pairs[previous * vocabulary + tokens] + strength * unigram[tokens]
    return math.exp(-torch.log(joint / (firsts[previous] + strength)).double().mean().item())


def train(model: LlamaForCausalLM, tokens: Tensor, held_out: Tensor, settings: Settings) -> None:
    """Train in place and leave the checkpoint of the best epoch, by held-out perplexity, in the model."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    steps_per_epoch = (len(tokens) // (settings.context - 1) - 1) // settings.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # warm-up, then a cosine down to nearly 0
        optimizer,
        settings.peak_learning_rate,
        total_steps=settings.epochs * steps_per_epoch,
        pct_start=settings.warmup,
        cycle_momentum=False,
    )
    best, best_state, started = math.inf, model.state_dict(), time.monotonic()
    for epoch in range(settings.epochs):
        # Another offset each time, so that no two epochs cut the text at the same places.
        offset = int(torch.randint(settings.context - 1, (1,), generator=generator))
        inputs, labels = windows(tokens[offset:], settings.context)
        order = torch.randperm(len(inputs), generator=generator)
        model.train()
        total = 0.0
        for index in range(steps_per_epoch):
            rows = order[index * settings.batch_size : (index + 1) * settings.batch_size]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=inputs[rows], use_cache=False).logits
            loss = cross_entropy(logits.float().flatten(0, 1), labels[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_norm)
            optimizer.step()
            schedule.step()
            total += loss.item()
        now = perplexity(model, held_out, settings.context)
        if now < best:
            best, best_state = now, {name: value.clone() for name, value in model.state_dict().items()}
        print(
            f"epoch {epoch + 1}/{settings.epochs}: train {math.exp(total / steps_per_epoch):.2f}, "
            f"held out {now:.2f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    model.load_state_dict(best_state)


CARD = """---
license: apache-2.0
language: en
---
# tiny-llama

A Llama of {parameters:,} parameters, trained for signround-edge by
`signround_edge/demo/train_tiny_llama.py` on State of the Union and inaugural addresses of US presidents
(public domain). It is really trained, so quantization errors show in its perplexity; it has no other use.

| text | tokens | perplexity | of a bigram model |
|---|---|---|---|
{rows}

Perplexity per token, all tokens scored, float16 weights computed in float32, windows of {context} tokens of
which the first is `{bos}`. The bigram model is fitted on the same {train_tokens:,} training tokens and
smoothed towards the unigram with a Dirichlet prior of strength {strength:g}, chosen on the held-out slices.
A token of speeches-test.txt is {bytes_per_token:.2f} bytes.

Settings: {settings}.
AdamW, bfloat16 autocast; the epoch that is best on the held-out slices is kept. Training took {minutes:.1f}
minutes of CPU time in {threads} thread(s) ({machine}, torch {torch}).

Tokenizer: byte-level BPE, GPT-2 pre-tokenizer (`tokenizer.ggml.pre` is `gpt-2`), `{bos}` added in front.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, measure; see the module docstring."""
    parser = argparse.ArgumentParser(description="Train the tiny Llama that signround-edge ships.")
    parser.add_argument("--train", type=Path, required=True, help="training text, UTF-8")
    parser.add_argument("--test", type=Path, required=True, help="test text, UTF-8; only ever evaluated on")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    for name, value in asdict(Settings()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    output: Path = options.pop("output")
    train_text = options.pop("train").read_text(encoding="utf-8")
    test_text = options.pop("test").read_text(encoding="utf-8")
    settings = Settings(**options)

    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    test_excerpt = "".join(slices(test_text, 40_000, pieces=4))
    held_out_slices = slices(train_text, settings.held_out_characters, pieces=4)
    for held_out_slice in held_out_slices:
        train_text = train_text.replace(held_out_slice, "", 1)
    tokenizer = train_tokenizer(train_text, settings.vocabulary)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)

    tokens, held_out, test = encode(train_text), encode("".join(held_out_slices)), encode(test_text)
    model = build_model(settings)
    started = time.process_time()
    train(model, tokens, held_out, settings)
    minutes = (time.process_time() - started) / 60

    folder = output / "tiny-llama"
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    save_tokenizer(tokenizer, folder)
    calibration = "".join(slices(train_text, 200_000, pieces=8))
    (output / "speeches-train.txt").write_text(calibration, encoding="utf-8")
    (output / "speeches-test.txt").write_text(test_excerpt, encoding="utf-8")

    model.float()  # the float16 values, computed with in float32
    bigram = partial(bigram_perplexity, tokens, vocabulary=settings.vocabulary)
    strength = min((2.0**power for power in range(10)), key=lambda value: bigram(held_out, strength=value))
    texts = {
        "speeches-test.txt, whole": test,
        "speeches-test.txt, the excerpt shipped here": encode(test_excerpt),
        "held-out slices of speeches-train.txt": held_out,
    }
    rows = [
        f"| {name} | {len(text):,} | {perplexity(model, text, settings.context):.2f} "
        f"| {bigram(text, strength=strength):.2f} |"
        for name, text in texts.items()
    ]
    card = CARD.format(
        parameters=model.num_parameters(),
        rows="\n".join(rows),
        context=settings.context,
        bos=BOS,
        train_tokens=len(tokens),
        strength=strength,
        bytes_per_token=len(test_text.encode()) / len(test),
        settings=", ".join(f"{name} {value}" for name, value in asdict(settings).items()),
        minutes=minutes,
        threads=settings.threads,
        machine=platform.machine(),
        torch=torch.__version__,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
