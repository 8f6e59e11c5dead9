"""The tables of SignRound's paper on a small model.

    python -m benchmarks.paper                              # all tables on the shipped tiny model
    python -m benchmarks.paper bits --model HF_FOLDER --calibration C.txt --text C4.txt --text WIKITEXT.txt
    python -m benchmarks.paper --quick --results /tmp/r.json --page /tmp/paper.md      # does it work? (not for figures)

Rows go to benchmarks/results/paper/<model>.json; one that is there already is not measured again. At the end (or with
--only-render) docs/paper.md is written from all rows.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.paper import bits, granularity, hyperparameters, optimizer
from benchmarks.paper.experiment import Results, Setup, measure, planned
from benchmarks.paper.table import document
from signround_edge.demo import calibration_text_path, evaluation_text_path, tiny_llama_path
from signround_edge.files import write_atomically

TABLES = {table.NAME: table for table in (bits, granularity, hyperparameters, optimizer)}
ROOT = Path(__file__).parent.parent.parent


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.tables if name not in TABLES]:
        parser.error(f"unknown table {unknown[0]}; known are {', '.join(TABLES)}")
    texts = tuple(args.text or [evaluation_text_path()])
    setup = Setup(args.model, args.calibration, texts, seeds=tuple(args.seeds))
    if args.quick:
        setup = replace(setup, samples=8, seqlen=32, steps=4, batch_size=4, seeds=setup.seeds[:1], n_ctx=64, windows=2)
    tables = [TABLES[name] for name in args.tables or TABLES]
    results = Results(args.results or ROOT / "benchmarks" / "results" / "paper" / f"{args.model.name}.json")
    cells = [cell for table in tables for cell in table.cells()]
    left = [] if args.only_render else planned(cells, setup, results.rows())
    for number, (cell, seed) in enumerate(left, 1):
        print(f"{number}/{len(left)} {cell.scheme} {cell.label}, seed {seed} …", file=sys.stderr, flush=True)
        row = measure(cell, setup, seed)
        results.add(row)
        text, found = next(iter(row["scores"].items()))
        print(f"    KL {found['kld_mean']:.5f} on {text}, {row['cpu_s']:.0f} CPU s", file=sys.stderr, flush=True)
    write_atomically(args.page, document(list(TABLES.values()), setup, results.rows()).encode())
    print(f"wrote {args.page}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--model", type=Path, default=tiny_llama_path())
    parser.add_argument("--calibration", type=Path, default=calibration_text_path())
    parser.add_argument("--text", type=Path, action="append", help="repeatable (default: the shipped speeches)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--quick", action="store_true", help="a few steps on a few tokens")
    parser.add_argument("--results", type=Path, help="where rows are kept")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "paper.md")
    parser.add_argument("--only-render", action="store_true", help="measure nothing")
    return parser


if __name__ == "__main__":
    main()
