"""Checks, ceilings, steps and memory of tuning on a GPU, in one command. See benchmarks/gpu/README.md.

    python -m benchmarks.gpu --quick                    # what matters most, in seven minutes
    python -m benchmarks.gpu                            # fourteen minutes
    python -m benchmarks.gpu --only "Llama-3-70B"       # the parts with this in their names
    python -m benchmarks.gpu --device cpu --tiny        # do all parts work? on one core in a minute

Rows are on disk as soon as they are measured: results.jsonl and table.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.parts import Options, planned
from benchmarks.gpu.report import Report
from benchmarks.gpu.supervise import run_parts

RESULTS = Path(__file__).parent.parent / "results" / "gpu"
QUICK_S, WHOLE_S = 420, 840


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(arguments)
    options = Options(args.device, args.quick, args.tiny)
    parts = [part for part in planned(options) if not args.only or any(word in part.name for word in args.only)]
    if not parts:
        raise SystemExit(f"no part is named like {', '.join(args.only)}; --list names them")
    if args.list:
        for part in parts:
            print(f"{part.expected_s:5.0f} s  {part.name}")
        return
    device, today = _device_name(args.device), datetime.date.today()
    out = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS / f"{_slug(device)}-{today}")
    size = " (quick)" * args.quick + " (tiny sizes: no figure here means anything)" * args.tiny
    report = Report(out, f"Tuning on {device}, {today}{size}")
    run_parts(parts, options, args.budget or (QUICK_S if args.quick or args.tiny else WHOLE_S), report)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"wrote {out / 'results.jsonl'} and {out / 'table.md'}", file=sys.stderr)
    if not any(row.get("state") == "done" for row in report.rows):
        raise SystemExit("no part was done")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer samples, steps and grids")
    parser.add_argument("--tiny", action="store_true", help="sizes for one CPU core")
    parser.add_argument("--budget", type=float, help=f"seconds for all parts (default: {WHOLE_S}, quick: {QUICK_S})")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="parts named like this; repeatable")
    parser.add_argument("--list", action="store_true", help="name the parts and what they are expected to take")
    parser.add_argument("--out", type=Path, help="folder (default: $OUT, or benchmarks/results/gpu/DEVICE-DATE)")
    return parser


def _device_name(device: str) -> str:
    """Of the GPU, without loading torch."""
    if device == "cpu":
        return f"CPU {platform.machine()}"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "a GPU"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
