"""Running onnxruntime-genai's model builder in this process without letting it leave traces there.

The builder is a script: importing it appends two folders to sys.path, configures the root logger, prints to stdout and
draws progress bars. All of that is undone on the way out, and its calls to the Hugging Face Hub are switched off.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from exporters.onnx.third_party_logging import logging_restored
from signround_edge.errors import UserError


def build_graph(checkpoint: Path, out: Path, precision: str, pack_qkv: bool = True) -> None:
    """Let the builder write model.onnx, genai_config.json and tokenizer files for the CPU into `out`.

    Args:
        checkpoint: Hugging Face folder, plain or pre-quantized, with tokenizer files.
        out: folder to make.
        precision: the builder's word: "int4" for a pre-quantized checkpoint (f32 inputs and outputs), "fp32".
        pack_qkv: let it pack the Q, K and V projections where they agree in bits and block size.
    Raises:
        UserError: the builder does not know the model, or its tokenizer cannot be read.
    """
    options: dict[str, object] = {
        "hf_token": "false",
        "fuse_qkv": pack_qkv,
        # Full-length KV caches: a windowed one can only be fed by onnxruntime-genai, not by plain ONNX Runtime.
        "windowed_kv_cache": False,
    }
    if precision == "int4":
        # The embedding is quantized by our own pass, which also shares its bytes with a tied head.
        options["shared_embeddings"] = False
    cache = checkpoint / "cache"
    arguments = ("", str(checkpoint), str(out), precision, "cpu", str(cache))
    try:
        with _contained():
            from onnxruntime_genai.models import builder

            builder.check_extra_options(*arguments, options)
            builder.create_model(*arguments, **options)
    except OSError as error:
        if error.errno is not None:  # a real file system error; transformers raises OSError without a number
            raise
        raise _cannot_build(error) from error
    except Exception as error:  # the builder raises whatever its libraries raise
        raise _cannot_build(error) from error


def _cannot_build(error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(
        f"--format onnx: onnxruntime-genai's model builder cannot build this model ({reason}); check the config and "
        "tokenizer files in the run's config folder, or export with --format gguf"
    )


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Silence the builder, keep it off the network, and restore sys.path and the root logger."""
    import huggingface_hub.constants as hub

    paths, offline = list(sys.path), hub.HF_HUB_OFFLINE
    # The builder imports its neighbours as top-level modules; they must win over a user's folder of the same name.
    sys.path.insert(0, str(_builder_folder()))
    hub.HF_HUB_OFFLINE = True
    try:
        with (
            logging_restored("onnxruntime.quantization.matmul_nbits_quantizer"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        sys.path[:] = paths


def _builder_folder() -> Path:
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        raise UserError("--format onnx needs the package onnxruntime-genai; install it with pip")
    return Path(spec.origin).parent / "models"
