"""Decoding speed and resident memory of ONNX folders in onnxruntime-genai: ours beside the builder's own int4 folder.

    python -m benchmarks.onnx_decode --model HF_FOLDER --name NAME ours=FOLDER [other=FOLDER …]

The peer, `genai-int4`, is made from HF_FOLDER as its users make it (level 4, blocks of 32). Each folder is loaded in a
process of its own, one thread, and decodes after a prompt of its own tokens; rounds alternate between the folders and
start at another one each, so that what else the machine does meets all alike. The ratio is the median of the rounds'
ratios to the peer, in tokens a second of CPU time: one thread decodes, and waiting for a busy core is no part of it.
Written to
benchmarks/results/decode/NAME.json; `python -m benchmarks.table` renders it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.onnx_peers import build_int4
from signround_edge.files import write_atomically
from signround_edge.inspection import inspect

RESULTS = Path(__file__).parent / "results" / "decode"
CACHE = Path(__file__).parent.parent / ".cache"
PEER = "genai-int4"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="NAME=FOLDER of an exported model")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder for the peer")
    parser.add_argument("--name", required=True, help="name of the result file")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folders = {name: Path(path) for name, path in (text.split("=", 1) for text in args.folders)}
    folders = {PEER: _peer(args.model, args.name), **folders}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for first in range(args.rounds):
        names = list(folders)
        for name in (*names[first % len(names) :], *names[: first % len(names)]):
            rounds[name].append(_in_a_process(folders[name], args.prompt, args.tokens))
            print(name, json.dumps(rounds[name][-1]), file=sys.stderr, flush=True)
    rows = [_row(name, folders[name], found, rounds[PEER]) for name, found in rounds.items()]
    what = f"{args.prompt} + {args.tokens} tokens, {args.rounds} rounds, one thread, {platform.machine()}"
    write_atomically(
        RESULTS / f"{args.name}.json", (json.dumps({"what": what, "rows": rows}, indent=1) + "\n").encode()
    )
    print(json.dumps(rows, indent=1))


def _peer(model: Path, name: str) -> Path:
    folder = CACHE / "onnx-peers" / name / PEER
    if not (folder / "model.onnx").is_file():
        build_int4(model, folder, "default", 32)
    return folder


def _row(name: str, folder: Path, rounds: list[dict[str, float]], peer: list[dict[str, float]]) -> dict[str, Any]:
    speeds, of_peer = ([r["tokens_per_cpu_s"] for r in found] for found in (rounds, peer))
    return {
        "folder": name,
        "bytes": inspect(folder).total_bytes,
        "tokens_per_cpu_s": statistics.median(speeds),
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(speeds, of_peer, strict=True)),
        "all_tokens_per_cpu_s": speeds,
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in rounds),
        "resident_mb": min(r["resident_mb"] for r in rounds),
        "peak_mb": min(r["peak_mb"] for r in rounds),
        "load_cpu_s": min(r["load_cpu_s"] for r in rounds),
    }


def _in_a_process(folder: Path, prompt: int, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.onnx_decode_process", str(folder), str(prompt), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
