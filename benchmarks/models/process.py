"""One model in a process of its own, with a limit of time: a library that dies or hangs takes no other with it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import queue
import resource
import signal
import tempfile
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch

from benchmarks.llama_converter import ConversionFailed, Converter
from benchmarks.models.small_models import build
from benchmarks.models.stages import ConverterRefused, Found, run_stages

_LIMIT_CPU_S = 400  # machines are shared
_LIMIT_S = 3 * _LIMIT_CPU_S

# Entries of config.json as published checkpoints have them, and not as transformers 5 writes them.
_PUBLISHED = {"mpt": {"architectures": ["MPTForCausalLM"]}, "phimoe": {"architectures": ["PhiMoEForCausalLM"]}}


def in_a_process(name: str, with_template: bool, formats: Collection[str]) -> Found:
    """What becomes of a small model, by name, in some of `stages.FORMATS`."""
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[Found] = context.Queue()
    process = context.Process(target=_work, args=(name, with_template, formats, answers))
    process.start()
    try:
        deadline = time.monotonic() + _LIMIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=1)
            if not process.is_alive() and answers.empty():
                if process.exitcode == -signal.SIGXCPU:
                    return {"tune": f"no: no answer within {_LIMIT_CPU_S} CPU seconds"}
                return {"tune": f"no: its process died with code {process.exitcode}"}
        return {"tune": f"no: no answer within {_LIMIT_S} s"}
    finally:
        process.kill()
        process.join()


def _work(name: str, with_template: bool, formats: Collection[str], answers: multiprocessing.Queue[Found]) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT_CPU_S, _LIMIT_CPU_S + 10))
    with tempfile.TemporaryDirectory(prefix="signround-models-") as temporary:
        model = build(name, Path(temporary) / name)
        if not with_template or "gguf" not in formats:
            answers.put(run_stages(model, Path(temporary), None, formats))
            return
        with Converter() as converter:
            answers.put(run_stages(model, Path(temporary), partial(_convert, converter), formats))


def _convert(converter: Converter, model: Path, out: Path) -> Path:
    config = model / "config.json"
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, **_PUBLISHED.get(known["model_type"], {})}))
    try:
        # tiny-llama's pre-tokenizer; models without heads for more than one token are converted as such.
        return converter.convert(model, out, "f32", _options(model), pre="llama-bpe")
    except ConversionFailed as error:
        raise ConverterRefused(f"llama.cpp's converter: {str(error).strip().splitlines()[-1]}") from error


def _options(model: Path) -> list[str]:
    kind = str(json.loads((model / "config.json").read_text())["model_type"])
    return ["--no-mtp"] if kind.startswith(("qwen3_5", "qwen3_next")) else []
