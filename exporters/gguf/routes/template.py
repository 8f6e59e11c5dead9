"""The template route: everything from a GGUF file that llama.cpp's converter made, except the weights themselves.

It serves every architecture that llama.cpp knows. Names come from gguf's TensorNameMap, and each match is checked by
value, which also finds the order of rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import F32
from exporters.gguf.container.reader import GgufFile, StoredTensorInfo, shown
from exporters.gguf.container.writer import PlannedTensor, write_file
from exporters.gguf.families.rope import rope_parameters, say_truncation
from exporters.gguf.placement import Placement, candidate_names, names_of
from exporters.gguf.provenance import PROVENANCE, add_provenance, file_type
from exporters.gguf.routes.recognition import Recognition, Stack
from exporters.gguf.tensors import plan_tensor, say_floats
from exporters.gguf.tokenizer.special_tokens import check_end_tokens
from exporters.gguf.tokenizer.tokenizer import say_differences
from exporters.interface import ExportOptions
from signround_edge.errors import UserError
from signround_edge.model.experts import stacks
from signround_edge.model.tokenizer import end_tokens
from signround_edge.run_directory import RunDirectory

T = TypeVar("T")

_OUR_BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_THEIR_BLOCK = re.compile(r"^blk\.(\d+)\.")
_COPY_BYTES = 64 << 20
_OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")
_DROPPED_PREFIXES = ("split.", "quantize.imatrix.", f"{PROVENANCE}.")


def export_with_template(run: RunDirectory, path: Path, options: ExportOptions, template: Path) -> Path:
    """Write `path` with the template's metadata and tensor names and the run's data.

    Raises:
        UserError: the template is unreadable, or a parameter of the run finds no place in it.
    """
    source = GgufFile.open(template)
    placements = template_placements(run, source)
    kept = [name for name in source.tensors if name not in placements]
    if kept:
        options.log(f"kept {len(kept)} tensors of the template as they are: {', '.join(kept[:8])}")
    say_floats(run, placements.values(), options)
    writer, tensors = template_layout(run, source, placements, options)
    say_truncation(rope_parameters(run.config.get("text_config") or run.config), options.log)
    say_differences(source.get, run.config_dir, options.log)
    check_end_tokens(source.get, end_tokens(run.config_dir), options.log)
    options.log(f"writing {path}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 1e6:.1f} MB")
    inputs = {"the run": run.path, "--template": template}
    return write_file(path, writer, tensors, options.split_max_bytes, inputs)


def template_placements(run: RunDirectory, source: GgufFile) -> dict[str, Placement]:
    """Name of a template's tensor → what of the run it holds. UserError where a parameter finds no place."""
    placements = {p.gguf_name: p for p in match_by_value(run, source)}
    missing = set(run.names()) - names_of(placements.values())
    if missing:
        raise UserError(
            f"{source.path} has no place for {len(missing)} of the run's parameters ({', '.join(sorted(missing)[:3])}"
            f"{', …' if len(missing) > 3 else ''}): by name or by value none of its tensors is theirs; make "
            "the template from the same model"
            + (", or quantize without --transform, which changes weights" if run.is_transformed else "")
        )
    return placements


def template_layout(
    run: RunDirectory, source: GgufFile, placements: dict[str, Placement], options: ExportOptions
) -> tuple[gguf.GGUFWriter, list[PlannedTensor]]:
    """The template's metadata, and its tensors with the run's data."""
    tensors = [
        _planned(run, source, info, placements.get(name), options.dtype) for name, info in source.tensors.items()
    ]
    writer = gguf.GGUFWriter(None, source.architecture)
    _copy_metadata(writer, source, options)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type(run, options.dtype))
    add_provenance(writer, run)
    # `verify` must not expect the built-in route's metadata here.
    writer.add_string(f"{PROVENANCE}.template", source.path.name)
    return writer, tensors


def match_by_value(run: RunDirectory, file: GgufFile) -> list[Placement]:
    """Placement of the run's parameters in a file of any architecture; those without a place are left out.

    Names decide first. What they leave is looked for among the other parameters of the same block, by values alone.
    """
    names = candidate_names(run, _block_count(file), file.architecture)
    seen = Recognition(run, file, _head_counts(file), {})
    found: dict[str, Placement] = {}
    # Weights first: a bias has the order of its weight's rows.
    for gguf_name in sorted(set(names) & set(file.tensors), key=lambda name: name.endswith(".bias")):
        _keep(seen, found, _safely(seen.same, gguf_name, names[gguf_name]))
    placed = names_of(found.values())
    left = stacks([name for name in run.names() if name not in placed])
    by_block: dict[int | None, list[Stack]] = {}
    for stack, members in left.items():
        by_block.setdefault(_block(_OUR_BLOCK, stack), []).append(tuple(members))
    for gguf_name in sorted(set(file.tensors) - set(found), key=lambda name: name.endswith(".bias")):
        candidates = by_block.get(_block(_THEIR_BLOCK, gguf_name), [])
        _keep(seen, found, _safely(seen.changed, gguf_name, candidates))
    return list(found.values())


def _keep(seen: Recognition, found: dict[str, Placement], placement: Placement | None) -> None:
    if placement is not None:
        found[placement.gguf_name] = placement
        for piece in placement.pieces:
            if piece.rows is not None:
                seen.orders[piece.hf_name] = piece.rows


@np.errstate(all="ignore")  # a damaged file may hold NaN and infinity; they match nothing
def _safely(look: Callable[[str, T], Placement | None], gguf_name: str, candidates: T) -> Placement | None:
    return look(gguf_name, candidates)


def _block(pattern: re.Pattern[str], name: str) -> int | None:
    """Number of the decoder block that a tensor belongs to; None outside of the blocks."""
    match = pattern.search(name)
    return int(match[1]) if match else None


def _block_count(file: GgufFile) -> int:
    """Decoder blocks that the file announces, checked before a table of names is made for each of them."""
    count = file.get(f"{file.architecture}.block_count") or 0
    if not isinstance(count, int) or not 0 <= count <= len(file.tensors):
        raise UserError(
            f"{file.path} has {len(file.tensors)} tensors and says that it has {shown(count)} blocks: it is damaged; "
            "export or download it again"
        )
    return count


def _head_counts(file: GgufFile) -> list[int]:
    """Head counts of queries and of keys; some architectures have one of each for every layer."""
    counts: list[int] = []
    for key in ("head_count", "head_count_kv"):
        value = file.get(f"{file.architecture}.attention.{key}")
        counts += value if isinstance(value, list) else [value]
    return [count for count in dict.fromkeys(counts) if isinstance(count, int) and count > 0]


def _planned(
    run: RunDirectory, source: GgufFile, info: StoredTensorInfo, placement: Placement | None, dtype: str | None
) -> PlannedTensor:
    if placement is None:
        return PlannedTensor(info.name, info.ggml_type, info.shape, info.nbytes, lambda: _copied(source, info.name))
    template_is_f32 = info.ggml_type is F32
    keep_f32 = template_is_f32 and not run.is_quantized(placement.pieces[0].hf_name)
    return plan_tensor(run, placement, dtype, keep_f32)


def _copied(source: GgufFile, name: str) -> Iterator[NDArray[Any]]:
    data = source.raw(name).reshape(-1)
    for start in range(0, data.size, _COPY_BYTES):
        yield data[start : start + _COPY_BYTES]


def _copy_metadata(writer: gguf.GGUFWriter, source: GgufFile, options: ExportOptions) -> None:
    for key, entry in source.metadata.items():
        if key in _OWN_KEYS or key.startswith(_DROPPED_PREFIXES):
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(entry.value)
        elif isinstance(entry.value, list) and not entry.value:
            options.log(f"metadata {key} is an empty array and was left out")
        else:
            writer.add_key_value(key, _writable(entry.value), entry.type, entry.item_type)


def _writable(value: Any) -> Any:
    """Text as the bytes that it was read from: it need not be valid UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", errors="surrogateescape")
    return [_writable(item) for item in value] if isinstance(value, list) else value
