"""Every family of models from its checkpoint to files that run.

    python -m benchmarks.models                  # all of them; half an hour on two cores
    python -m benchmarks.models lfm2 gemma4_mm   # some; their rows take the others' place in the file of results
    python -m benchmarks.models --page           # write the table of docs/models.md from the file of results

Each model has a process of its own, and a limit of time. Results are in signround_edge/tested_models.json, which
`signround-edge models` prints.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.llama_converter import ConversionFailed, Converter, why_unavailable
from benchmarks.models.page import write_page
from benchmarks.models.small_models import MODELS, build
from benchmarks.models.stages import ConverterRefused, Found, run_stages, to_json
from runtime_tests.worker.llama_cpp_bindings import VERSION
from signround_edge.tested_models import FILE

LIMIT_S = 400


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models (default: all)")
    parser.add_argument("--page", action="store_true", help="write the table of docs/models.md")
    parser.add_argument("--without-onnx", action="store_true", help="leave out ONNX, which takes longest")
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
    for name in args.names or MODELS:
        started = time.monotonic()
        found = _in_a_process(name, reason is None, not args.without_onnx)
        kept[name] = {**kept.get(name, {}), **found} if args.without_onnx else found
        print(f"{name:26} {time.monotonic() - started:4.0f} s  {found}", flush=True)
        results = {known: kept[known] for known in MODELS if known in kept}
        FILE.write_text(to_json(results, _versions()))


def _versions() -> dict[str, Any]:
    build_number = f"b{VERSION.rpartition('.')[2]}"
    return {"transformers": transformers.__version__, "torch": torch.__version__, "llama.cpp": build_number}


def _in_a_process(name: str, with_template: bool, with_onnx: bool) -> Found:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[Found] = context.Queue()
    process = context.Process(target=_work, args=(name, with_template, with_onnx, answers))
    process.start()
    try:
        return answers.get(timeout=LIMIT_S)
    except queue.Empty:
        return {"tune": f"no: no answer within {LIMIT_S} s"}
    finally:
        process.kill()
        process.join()


def _work(name: str, with_template: bool, with_onnx: bool, answers: multiprocessing.Queue[Found]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="signround-models-") as temporary:
        model = build(name, Path(temporary) / name)
        if not with_template:
            answers.put(run_stages(model, Path(temporary), None, with_onnx))
            return
        with Converter() as converter:
            answers.put(run_stages(model, Path(temporary), partial(_convert, converter), with_onnx))


def _convert(converter: Converter, model: Path, out: Path) -> Path:
    try:
        # tiny-llama's pre-tokenizer; models without heads for more than one token are converted as such.
        return converter.convert(model, out, "f32", _options(model), pre="llama-bpe")
    except ConversionFailed as error:
        raise ConverterRefused(f"llama.cpp's converter: {str(error).strip().splitlines()[-1]}") from error


def _options(model: Path) -> list[str]:
    kind = str(json.loads((model / "config.json").read_text())["model_type"])
    return ["--no-mtp"] if kind.startswith(("qwen3_5", "qwen3_next")) else []


if __name__ == "__main__":
    main()
