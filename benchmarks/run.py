"""Our schemes, rounded and tuned, and auto-round, on one model: the same calibration samples, the same evaluation.

    python -m benchmarks.run                                        # the shipped tiny model, about 5 minutes
    python -m benchmarks.run --model HF_FOLDER --calibration C.jsonl --text T.txt --scheme gguf:q4_0 --tool auto-round

Results go to benchmarks/results/<model>.json, one entry per row; a row that is there already is not measured again
unless --again is given. Two of these commands may run side by side, each pinned to a core (`taskset -c 0 …`), so that
two tools are timed under the same conditions. `python -m benchmarks.table` renders docs/benchmarks.md from the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import auto_round
from benchmarks.gguf_in_torch import load_llama_gguf
from benchmarks.measure import run_measured
from signround_edge.demo import calibration_text_path, evaluation_text_path, tiny_llama_path
from signround_edge.evaluation import TorchSession, evaluate, load_run_model, load_source_model, text_windows
from signround_edge.inspection import inspect
from signround_edge.run_directory import RunDirectory, write_atomically

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent.parent / ".cache"
TOOLS = ("signround-edge", "auto-round")
DEFAULT_SCHEMES = ("gguf:q4_0,onnx:w4g32", "gguf:q4_1", "onnx:w4g128-asym")


def main() -> None:
    """Command line."""
    args = _parser().parse_args()
    results = RESULTS / f"{args.name or args.model.name}.json"
    for row in _planned(args):
        if not args.again and any(r["key"] == row["key"] for r in _read(results)):
            continue
        print(f"{row['key']} …", file=sys.stderr, flush=True)
        measured = _auto_round(args) if row["tool"] == "auto-round" else _ours(args, row["scheme"], row["steps"])
        done = {**row, **measured, "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"}
        others = [r for r in _read(results) if r["key"] != row["key"]]  # read again: another process may add rows
        write_atomically(results, (json.dumps([*others, done], indent=1) + "\n").encode())
        print(json.dumps(done, indent=1), flush=True)


def _read(results: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.is_file() else []
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=tiny_llama_path())
    parser.add_argument("--name", help="name of the result file (default: the folder's)")
    parser.add_argument("--calibration", type=Path, default=calibration_text_path())
    parser.add_argument("--text", type=Path, default=evaluation_text_path())
    parser.add_argument("--scheme", action="append", help="repeatable")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="repeatable (default: signround-edge)")
    parser.add_argument("--again", action="store_true", help="replace rows that were measured before")
    return parser


def _planned(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows to measure, each with a key that names everything that decides its figures."""
    common = f"{args.samples}x{args.seqlen}, batch {args.batch_size}, {args.calibration.name} → {args.text.name}"
    rows = []
    tools = args.tool or TOOLS[:1]
    for scheme in args.scheme or DEFAULT_SCHEMES if "signround-edge" in tools else ():
        for steps in (0, args.steps):
            rows.append({"tool": "signround-edge", "scheme": scheme, "steps": steps})
    if "auto-round" in tools:
        rows.append({"tool": "auto-round", "scheme": "gguf:q4_0", "steps": args.steps})
    return [{"key": f"{r['tool']} {r['scheme']} {r['steps']} steps, {common}", **r} for r in rows]


def _ours(args: argparse.Namespace, scheme: str, steps: int) -> dict[str, Any]:
    out = CACHE / "runs" / f"{args.name or args.model.name}-{scheme.replace(':', '-').replace(',', '+')}-{steps}"
    if (out / "manifest.json").is_file():
        raise SystemExit(f"{out} is there already; remove it to measure anew")
    sizes = {"samples": args.samples, "seqlen": args.seqlen, "steps": steps, "batch-size": args.batch_size}
    flags = [str(x) for name, value in sizes.items() for x in (f"--{name}", value)]
    command = [sys.executable, "-m", "signround_edge.cli", "quantize", str(args.model), "--scheme", scheme]
    cost = run_measured(
        [*command, "-o", str(out), "--calibration", str(args.calibration), *flags], out.with_suffix(".log")
    )
    run, found = RunDirectory.open(out), inspect(out)
    scores = _score(args, TorchSession(load_run_model(run)))
    return {"bytes": found.total_bytes, "bits_per_weight": found.bits_per_weight, **scores, **asdict(cost)}


def _auto_round(args: argparse.Namespace) -> dict[str, Any]:
    command = auto_round.environment(CACHE / "auto-round-env")
    out = CACHE / "auto-round" / (args.name or args.model.name)
    file, cost = auto_round.quantize(
        command, args.model, args.calibration, out, args.samples, args.seqlen, args.steps, args.batch_size
    )
    found = inspect(file)
    scores = _score(args, TorchSession(load_llama_gguf(file, args.model)))
    return {"bytes": found.total_bytes, "bits_per_weight": found.bits_per_weight, **scores, **asdict(cost)}


def _score(args: argparse.Namespace, session: TorchSession) -> dict[str, Any]:
    """Perplexity and KL divergence in torch, so that only the weights differ between rows."""
    windows = text_windows(args.model, args.text, args.n_ctx, args.windows)
    return asdict(evaluate(session, windows, TorchSession(load_source_model(args.model))))


if __name__ == "__main__":
    main()
