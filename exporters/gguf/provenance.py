"""What a file says of where it comes from: its name, its type, and the run that its weights are of."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import gguf

from exporters.gguf.blocks.ggml_types import FILE_TYPES
from signround_edge import __version__
from signround_edge.files import sha256_of
from signround_edge.manifest import OUTSIDE
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.gguf_presets import GGUF_PRESETS
from signround_edge.schemes.scheme import PRESET_ALIASES

PROVENANCE = "signround_edge"
_TYPES_OUTSIDE = ("token_embedding=", "output_tensor=")  # how a manifest keeps the types of what is in no block


def file_type(run: RunDirectory, dtype: str | None) -> int:
    """general.file_type, the number of a preset (`FILE_TYPES`). It is for display only.

    As llama-quantize writes it: that of the run's preset, also where rows fell back to other types. Where the run has
    none (ONNX schemes), or `--tensor-type` gave most weights of the decoder blocks another type than the preset's, that
    of the preset which is named after the type that most of them have (Q4_K: q4_k_m, what llama-quantize makes of
    "q4_k").
    """
    if dtype is not None:
        return FILE_TYPES[dtype]
    preset, most = _preset(run.manifest.scheme), _most_frequent_format(run)
    if preset is None or (_has_overrides(run) and GGUF_PRESETS[preset].base != most):
        preset = PRESET_ALIASES.get(most.lower(), most.lower())
    return FILE_TYPES.get(preset, FILE_TYPES["guessed"])


def _preset(scheme: str) -> str | None:
    """The GGUF preset of a scheme ("q4_k_m" of "gguf:q4_k"), or None where it names none."""
    targets = (part.partition(":") for part in scheme.split(","))
    name = next((name for target, _, name in targets if target == "gguf"), "")
    name = PRESET_ALIASES.get(name, name)
    return name if name in GGUF_PRESETS else None


def _has_overrides(run: RunDirectory) -> bool:
    """Whether types of matrices in decoder blocks were given one by one."""
    given = run.manifest.settings.get("tensor_types") or ()
    return any(not text.startswith(_TYPES_OUTSIDE) for text in given)


def _most_frequent_format(run: RunDirectory) -> str:
    """The type that most weights of the decoder blocks have; F32 where none is quantized."""
    weights: Counter[str] = Counter()
    for entry in run.manifest.tensors:
        if entry.format is not None and entry.part != OUTSIDE:
            weights[entry.format] += math.prod(entry.shape)
    return max(weights, key=lambda name: weights[name], default="F32")


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
    name = source_name(run, config)
    if {"</s>", "<s>", "<unk>", "<|endoftext|>"} <= set(tokens):
        return name
    return re.sub("(?i)(phi)-?3", r"\1 3", name)


def source_name(run: RunDirectory, config: dict[str, Any]) -> str:
    """The last component of the source model's path or name."""
    source = str(run.manifest.source.get("model") or config.get("_name_or_path") or "model")
    return source.rstrip("/").rpartition("/")[2] or "model"
