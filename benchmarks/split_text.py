"""Cut a text in two: JSON lines of calibration samples from its first half, the second half for evaluation.

    python -m benchmarks.split_text TEXT --model HF_FOLDER --out DIR

Every sample decodes `seqlen` tokens and a few more, so that each tool, cutting to `seqlen`, sees the same text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from signround_edge.model.tokenizer import load_tokenizer

# Decoding and tokenizing again may merge tokens; with this many more, `seqlen` remain.
SPARE_TOKENS = 16


def json_lines(texts: Iterable[str]) -> str:
    """What a `.jsonl` file of calibration texts holds."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="whose tokenizer cuts the samples")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    half = text.index("\n", len(text) // 2) + 1
    tokenizer = load_tokenizer(args.model)
    tokens = tokenizer(text[:half], add_special_tokens=False, verbose=False)["input_ids"]
    length = args.seqlen + SPARE_TOKENS
    step = (len(tokens) - length) // max(1, args.samples - 1)
    texts = [tokenizer.decode(tokens[i * step : i * step + length]) for i in range(args.samples)]
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"calibration-{args.samples}x{args.seqlen}.jsonl"
    (args.out / name).write_text(json_lines(texts), encoding="utf-8")
    (args.out / "evaluation.txt").write_text(text[half:], encoding="utf-8")


if __name__ == "__main__":
    main()
