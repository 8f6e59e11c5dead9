"""`evaluate`: score anything that gives logits: a model folder, a run directory, or an artifact on its runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from signround_edge.arguments import read_text
from signround_edge.errors import UserError
from signround_edge.evaluation.cache_types import CacheTypes, TakesCacheTypes
from signround_edge.evaluation.metrics import Scores
from signround_edge.evaluation.perplexity import TorchSession, check_windows, evaluate, text_windows
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.model.config import is_model_folder
from signround_edge.model.source import resolve_model
from signround_edge.plugins import exporter_of, exporters, runtimes
from signround_edge.run_directory import RunDirectory


def score(
    path: str,
    text: Path,
    reference: str | None,
    n_ctx: int,
    max_windows: int | None,
    cache_types: CacheTypes | None = None,
) -> Scores:
    """Scores of `path` on a text; an artifact runs on its own runtime, and then tokenizes with the reference's files.

    Raises:
        UserError: neither model, run nor artifact; or an artifact without a --reference to take the tokenizer from.
    """
    check_windows(n_ctx, max_windows)
    read_text("--text", text)  # before a model is loaded
    reference_dir = None if reference is None else resolve_model(reference)
    with opened(path, reference_dir, cache_types) as (session, tokenizer_dir):
        windows = text_windows(tokenizer_dir, text, n_ctx, max_windows)
        base = None if reference_dir is None else TorchSession(load_source_model(reference_dir))
        return evaluate(session, windows, base)


@contextmanager
def opened(path: str, reference_dir: Path | None, cache_types: CacheTypes | None = None) -> Iterator[tuple[Any, Path]]:
    """(session, folder of its tokenizer) of a model folder, a run directory or an artifact; closed at the end.

    Raises:
        UserError: as `score` says.
    """
    session, tokenizer_dir = _open(path, reference_dir, cache_types)
    try:
        yield session, tokenizer_dir
    finally:
        close = getattr(session, "close", None)
        if close is not None:
            close()


def _open(path: str, reference_dir: Path | None, cache_types: CacheTypes | None) -> tuple[Any, Path]:
    local = Path(path)
    in_torch = (local / "manifest.json").is_file() or not local.exists() or _is_model(local)
    if cache_types is not None and in_torch:
        raise UserError(
            f"--cache-type-k and --cache-type-v are llama.cpp's, and {path} runs in torch; give a GGUF file"
        )
    if (local / "manifest.json").is_file():
        run = RunDirectory.open(local)
        return TorchSession(load_run_model(run)), run.config_dir
    if in_torch:
        folder = resolve_model(path, "a run directory, a GGUF file, an ONNX folder, a model folder")
        return TorchSession(load_source_model(folder)), folder
    artifact_format = exporter_of(local).name
    tokenizer_dir = local if (local / "tokenizer.json").is_file() else reference_dir
    if tokenizer_dir is None:
        raise UserError(f"{path}: give --reference MODEL too; its tokenizer cuts the text into windows")
    for runtime in runtimes().values():
        if runtime.artifact_format == artifact_format:
            reason = runtime.unavailable()
            if reason:
                raise UserError(f"{path} needs the runtime {runtime.name}, which cannot run here: {reason}")
            if cache_types is not None:
                if not isinstance(runtime, TakesCacheTypes):
                    raise UserError(
                        f"--cache-type-k and --cache-type-v are llama.cpp's, and {path} runs on {runtime.name}; give a "
                        "GGUF file"
                    )
                runtime = runtime.with_cache(cache_types)
            return runtime.open(local), tokenizer_dir
    raise UserError(f"{path}: no runtime for {artifact_format} is installed")


def _is_model(folder: Path) -> bool:
    """Whether it is a model: an ONNX folder may carry config.json too, and a model of the hub graphs in onnx/."""
    if not is_model_folder(folder) or (folder / "model.onnx").is_file():
        return False
    has_weights = any(folder.glob("*.safetensors"))
    return has_weights or not any(exporter.recognises(folder) for exporter in exporters().values())
