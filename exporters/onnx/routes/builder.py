"""Running onnxruntime-genai's model builder in this process without letting it leave traces there.

The builder is a script: importing it appends two folders to sys.path, configures the root logger, prints to stdout and
draws progress bars. All of that is undone on the way out, and its calls to the Hugging Face Hub are switched off. It
reads a model in memory and gives its graph back in memory: some methods of its model are ours while it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from exporters.onnx.builder_classes import BuilderClass
from exporters.onnx.routes.rope_tables import plain_rope, static_rope, use_rope
from exporters.onnx.routes.stand_ins import without_copies
from exporters.onnx.third_party_logging import logging_restored
from signround_edge.errors import UserError


class CannotBuild(Exception):
    """The builder raised: its first words, for use within a sentence."""


def build_graph(model: nn.Module, row: BuilderClass, config_dir: Path, out: Path, pack_qkv: bool = True) -> ir.Model:
    """Let the builder make the f32 graph of a model for the CPU, and write genai_config.json and tokenizer files.

    Args:
        model: transformers' model, which the builder reads in the place of a checkpoint.
        row: how the builder is told about its architecture.
        config_dir: its config and tokenizer files.
        out: folder to make.
        pack_qkv: let it pack the Q, K and V projections.
    Returns:
        The graph, whose initializers are views of the model's tensors or made from them when they are read.
    Raises:
        CannotBuild: the builder does not know the model, or its tokenizer cannot be read.
    """
    options: dict[str, Any] = {
        "hf_token": "false",
        "fuse_qkv": pack_qkv,
        # Full-length KV caches: a windowed one can only be fed by onnxruntime-genai, not by plain ONNX Runtime.
        "windowed_kv_cache": False,
        # Heads that draft several tokens are not part of what was tuned.
        "exclude_mtp": True,
    }
    # In f32 there is nothing that the builder would quantize by itself.
    arguments = ("", str(config_dir), str(out), "fp32", "cpu", str(config_dir / "cache"))
    try:
        with _contained():
            from onnxruntime_genai.models import builder

            builder.check_extra_options(*arguments, options)
            rope = static_rope(model)
            _tell(options["hf_details"]["hf_config"], row, type(model).__name__, rope is not None)
            with _reading(model, row, rope) as built:
                builder.create_model(*arguments, **options)
    except OSError as error:
        if error.errno is not None:  # a real file system error; transformers raises OSError without a number
            raise
        raise _cannot_build(error) from error
    except Exception as error:  # the builder raises whatever its libraries raise
        raise _cannot_build(error) from error
    (graph,) = built
    graph.graph.sort()
    return graph


def write_float_graph(checkpoint: Path, out: Path) -> None:
    """Write the folder that the builder makes of a Hugging Face folder in f32: what a user of it would have.

    Raises:
        CannotBuild: see `build_graph`.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32", local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        config_dir = shutil.copytree(checkpoint, Path(scratch) / "config", ignore=lambda _, names: _weights(names))
        graph = build_graph(model, BuilderClass(), config_dir, out)
    ir.save(graph, out / "model.onnx", external_data="model.onnx.data")


def _weights(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def _tell(config: Any, row: BuilderClass, architecture: str, rope_is_ours: bool) -> None:
    if row.architecture is not None or not config.architectures:
        config.architectures = [row.architecture or architecture]
    for change in row.config:
        change(config)
    if rope_is_ours:
        plain_rope(config)


@contextlib.contextmanager
def _reading(model: nn.Module, row: BuilderClass, rope: tuple[Tensor, float] | None) -> Iterator[list[ir.Model]]:
    """Within, the builder's models read `model`, and are put into the list that is given instead of being written."""
    base: Any = importlib.import_module("builders.base").Model
    make_model = base.make_model
    built: list[ir.Model] = []

    def make_from_ours(self: Any, input_path: str) -> None:
        make_initializer = self.make_initializer
        for change in row.model:
            change(self)
        if rope is not None:
            use_rope(self, rope)

        def make_small(tensor: Any, /, name: str, *, to: Any = None, raw: bool = False) -> None:
            make_initializer(without_copies(tensor), name, to=to, raw=raw)

        self.make_initializer = make_small
        self.load_weights = lambda path: model
        self.save_model = lambda folder: built.append(self.model)
        make_model(self, input_path)

    base.make_model = make_from_ours
    try:
        yield built
    finally:
        base.make_model = make_model


def _cannot_build(error: Exception) -> CannotBuild:
    return CannotBuild(" ".join(str(error).split())[:300] or type(error).__name__)


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
