"""What a file says of where it comes from: its name, its type, and the run that its weights are of."""

from __future__ import annotations

import math
import re
from typing import Any

import gguf

from signround_edge import __version__
from signround_edge.files import sha256_of
from signround_edge.manifest import OUTSIDE
from signround_edge.run_directory import RunDirectory

PROVENANCE = "signround_edge"


_FILE_TYPES = {
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": gguf.LlamaFileType.MOSTLY_Q6_K,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "F32": gguf.LlamaFileType.ALL_F32,
}


def file_type(run: RunDirectory, dtype: str | None) -> gguf.LlamaFileType:
    """general.file_type: the type that most weights of the decoder blocks have. It is for display only."""
    if dtype is not None:
        return _FILE_TYPES[dtype.upper()]
    weights: dict[str, int] = {}
    for entry in run.manifest.tensors:
        if entry.format is not None and entry.part != OUTSIDE:
            weights[entry.format] = weights.get(entry.format, 0) + math.prod(entry.shape)
    most = max(weights, key=lambda name: weights[name]) if weights else "F32"
    return _FILE_TYPES.get(most, gguf.LlamaFileType.GUESSED)


def add_provenance(writer: gguf.GGUFWriter, run: RunDirectory) -> None:
    """Say which program, scheme and run directory the weights come from."""
    writer.add_string(f"{PROVENANCE}.version", __version__)
    writer.add_string(f"{PROVENANCE}.scheme", run.manifest.scheme)
    writer.add_string(f"{PROVENANCE}.manifest_sha256", sha256_of(run.path / "manifest.json"))


def model_name(run: RunDirectory, config: dict[str, Any], tokens: list[str]) -> str:
    """A name for people: the last component of the source model's path or name.

    llama.cpp takes special tokens of a "phi-3" for those of Microsoft's models, and dies where `tokens` lack them
    (`llama_vocab::impl::load`): then the name is written with a space.
    """
    source = str(run.manifest.source.get("model") or config.get("_name_or_path") or "model")
    name = source.rstrip("/").rpartition("/")[2] or "model"
    if {"</s>", "<s>", "<unk>", "<|endoftext|>"} <= set(tokens):
        return name
    return re.sub("(?i)(phi)-?3", r"\1 3", name)
