"""Every family of models from its checkpoint to files that run.

    python -m benchmarks.models                  # all of them; half an hour on two cores
    python -m benchmarks.models lfm2 gemma4_mm   # some; their rows take the others' place in the file of results
    python -m benchmarks.models --only onnx      # one format; the results of the other stay
    python -m benchmarks.models --page           # write the table of docs/models.md from the file of results

Each model has a process of its own, and a limit of time. Results are in signround_edge/tested_models.json, which
`signround-edge models` prints.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
import transformers

from benchmarks.llama_converter import why_unavailable
from benchmarks.models.page import write_page
from benchmarks.models.process import in_a_process
from benchmarks.models.small_models import MODELS
from benchmarks.models.stages import FORMATS, Found, to_json
from runtime_tests.worker.llama_cpp_bindings import VERSION
from signround_edge.tested_models import FILE


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models (default: all)")
    parser.add_argument("--page", action="store_true", help="write the table of docs/models.md")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--only", choices=list(FORMATS), help="one format; the results of the other stay")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in MODELS]
    if unknown:
        raise SystemExit(f"no model is called {', '.join(unknown)}; there are {', '.join(MODELS)}")
    if args.page:
        write_page()
        return
    reason = why_unavailable()
    if reason is not None:
        print(f"without templates: {reason}")
    kept: dict[str, Found] = json.loads(FILE.read_text())["models"] if FILE.exists() else {}
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            pool.submit(in_a_process, name, reason is None, [args.only] if args.only else list(FORMATS)): name
            for name in args.names or MODELS
        }
        for run in as_completed(runs):
            name, found = runs[run], run.result()
            kept[name] = {**kept.get(name, {}), **found} if args.only else found
            print(f"{name:26} {found}", flush=True)
            results = {known: kept[known] for known in MODELS if known in kept}
            FILE.write_text(to_json(results, _versions()))


def _versions() -> dict[str, Any]:
    build_number = f"b{VERSION.rpartition('.')[2]}"
    return {"transformers": transformers.__version__, "torch": torch.__version__, "llama.cpp": build_number}


if __name__ == "__main__":
    main()
