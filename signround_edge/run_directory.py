"""The run directory: what `quantize` writes and every other command reads.

    run/manifest.json                 what the run is, and which parts are complete
    run/blocks/0007.safetensors       one decoder block: codes, scale fields and float tensors
    run/blocks/outside.safetensors    embeddings, output head, final norm: all that is outside the decoder blocks
    run/blocks/*.whole-model.safetensors   the same parts after the whole-model stage; they take the others' place
    run/statistics/0007.safetensors   what tuning did to the roundings of that block, for `analyze`
    run/config/                       config.json, tokenizer and generation files of the source model

Keys in a part file: `<parameter>` for float tensors, `<parameter>#codes` and `<parameter>#<field>` for quantized ones;
`<parameter>#row_scales`, `<parameter>#column_scales` where a transform scaled the weights before.
Every file is written under a temporary name and renamed when it is complete, so that a kill leaves no half file.
The manifest holds the sha256 of each complete part, so a changed part is refused. See docs/run-directory.md.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from signround_edge.arguments import nearest, path_of
from signround_edge.errors import UserError
from signround_edge.files import sha256_of, whole_file, write_atomically
from signround_edge.formats import QuantizedTensor, get_grid
from signround_edge.formats.channel_scales import ChannelScales
from signround_edge.formats.grid import take
from signround_edge.manifest import Manifest, ManifestError, PartRecord, TensorEntry
from signround_edge.model.config import read_config

_SEPARATOR = "#"
_SCALES = ("row_scales", "column_scales")
_VALUES_AT_ONCE = 1 << 20  # codes, of a byte each; what is made of them should stay in a core's cache
_FLOAT_BYTES = 4
_HASHED_AT_ONCE = 4  # parts


class RunDirectory:
    """A run directory opened for reading (and, in `quantize`, for adding parts).

    Tensors are read lazily; nothing is kept in memory.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._entries = {t.name: t for t in manifest.tensors}

    def __fspath__(self) -> str:
        """A run is usable wherever a path is."""
        return str(self.path)

    @property
    def config_dir(self) -> Path:
        """config.json, tokenizer and generation files of the source model."""
        return self.path / "config"

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The source model's config.json. UserError when it is missing or no JSON object."""
        return read_config(self.config_dir)

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> RunDirectory:
        """Start a new run directory (its config folder must have been filled already)."""
        (path / "blocks").mkdir(parents=True, exist_ok=True)
        run = cls(path, manifest)
        run._write_manifest()
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], allow_incomplete: bool = False) -> RunDirectory:
        """Open and check; UserError when it is no run directory, incomplete, or a part is missing or was changed."""
        path = path_of("the run", path)
        file = path / "manifest.json"
        if not path.exists():
            raise UserError(f"{path} does not exist; give the folder that `quantize -o` has written")
        if not file.is_file():
            raise UserError(f"{path} is not a run directory (it has no manifest.json); make one with `quantize`")
        try:
            manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
        except ManifestError as error:
            raise UserError(
                f"{file} is not a readable manifest: {error}; restore it, or remove {path} and run `quantize` again"
            ) from error
        run = cls(path, manifest)
        if manifest.state != "complete" and not allow_incomplete:
            done = sum(p in manifest.complete for p in manifest.parts)
            what = "whole-model stage" if done == len(manifest.parts) else f"{done} of {len(manifest.parts)} parts"
            raise UserError(f"{path} is incomplete ({what}); finish it with `quantize … --resume`")
        with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:  # hashing is most of opening, and leaves the interpreter free
            for _ in pool.map(run._check_part, manifest.complete, manifest.complete.values()):
                pass
        return run

    @property
    def is_transformed(self) -> bool:
        """Whether a transform changed weights before they were quantized: they need not resemble the source's."""
        return bool(self.manifest.settings.get("transforms"))

    def part_files(self) -> list[str]:
        """Names of the files in blocks/ that hold the parts as they are now."""
        return [self._part_path(part).name for part in self.manifest.parts]

    def names(self) -> list[str]:
        """Names of all parameters that hold data of their own (tied ones are in `manifest.tied`), in model order."""
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """The manifest's entry of a parameter; UserError for a name that has none."""
        if name in self._entries:
            return self._entries[name]
        if name in self.manifest.tied:
            raise UserError(f"{self.path}: {name} shares the data of {self.manifest.tied[name]}; give that name")
        near = ", ".join(nearest(name, self._entries))
        raise UserError(f"{self.path} has no parameter {name!r}; near it are {near}, and names() has all")

    def is_quantized(self, name: str) -> bool:
        """Whether the parameter is stored as codes and scale fields."""
        return self.entry(name).format is not None

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scale fields of a quantized parameter, [out features, in features]; UserError for another."""
        tensor = self._stored(name)
        self._refuse(name, tensor.codes_problem())
        return tensor

    def _stored(self, name: str) -> QuantizedTensor:
        """`quantized`, mapped, whose codes nobody has looked at yet: for those of a head that is a pass of its own."""
        entry = self.entry(name)
        if entry.format is None:
            raise UserError(f"{self.path}: {name} is kept in floats; float_tensor or dequantized gives it")
        grid = get_grid(entry.format)
        rows, cols = entry.out_in_shape
        with self._open_part(entry.part) as part:
            codes = part.get_tensor(f"{name}{_SEPARATOR}codes")
            fields = {f: part.get_tensor(f"{name}{_SEPARATOR}{f}") for f in grid.field_shapes(rows, cols)}
        tensor = QuantizedTensor(grid, codes, fields)
        problem = tensor.form_problem()
        self._refuse(name, "wrong shape" if problem is None and tensor.shape != (rows, cols) else problem)
        return tensor

    def _quantized_rows(self, name: str, order: NDArray[np.intp] | None, values: int) -> Iterator[QuantizedTensor]:
        stored = self._stored(name)
        for group in _row_groups(stored.shape, order, values):
            rows = stored.take_rows(group)
            self._refuse(name, rows.codes_problem())
            yield rows

    def _refuse(self, name: str, problem: str | None) -> None:
        if problem is not None:
            raise UserError(f"{self.path}: tensor {name}: {problem}; run `quantize` again")

    def channel_scales(self, name: str) -> ChannelScales:
        """How a transform scaled a matrix before it was quantized."""
        with self._open_part(self.entry(name).part) as part:
            stored = set(part.keys())
            keys = (f"{name}{_SEPARATOR}{which}" for which in _SCALES)
            return ChannelScales(*(part.get_tensor(key) if key in stored else None for key in keys))

    def float_tensor(self, name: str) -> Tensor:
        """A parameter that is kept in floats, as stored."""
        entry = self.entry(name)
        if entry.format is not None:
            raise UserError(f"{self.path}: {name} is quantized; quantized or dequantized gives it")
        with self._open_part(entry.part) as part:
            tensor: Tensor = part.get_tensor(name)
        return tensor

    def quantized_rows(self, name: str, order: NDArray[np.intp] | None = None) -> Iterator[QuantizedTensor]:
        """Codes and scale fields of a quantized parameter, some rows [n, in features] at a time.

        Args:
            order: numbers of the rows in the order wanted, [out features]; None leaves them as they are.
        """
        yield from self._quantized_rows(name, order, _VALUES_AT_ONCE)

    def dequantized_rows(self, name: str, order: NDArray[np.intp] | None = None) -> Iterator[Tensor]:
        """Any parameter as f32, some rows [n, in features] at a time (a vector is one piece, [n]).

        Of a large embedding all f32 weights would not fit into memory.

        Args:
            order: as for `quantized_rows`; it orders the values of a vector.
        """
        if self.is_quantized(name):
            values = _VALUES_AT_ONCE // _FLOAT_BYTES
            yield from (rows.dequantize() for rows in self._quantized_rows(name, order, values))
        else:
            yield from (rows.to(torch.float32) for rows in self.float_rows(name, order))

    def float_rows(self, name: str, order: NDArray[np.intp] | None = None) -> Iterator[Tensor]:
        """A parameter that is kept in floats, as stored, some rows at a time (see `dequantized_rows`)."""
        stored = self.float_tensor(name)
        stored = stored.T.contiguous() if self._entries[name].transposed else stored
        yield from (
            take(stored, rows) for rows in _row_groups(tuple(stored.shape), order, _VALUES_AT_ONCE // _FLOAT_BYTES)
        )

    def dequantized(self, name: str) -> Tensor:
        """Any parameter as f32 in Hugging Face's orientation: dequantized, or the float tensor itself."""
        if not self.is_quantized(name):
            return self.float_tensor(name).float()
        weight = self.quantized(name).dequantize()
        return weight.T.contiguous() if self._entries[name].transposed else weight

    def state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """(name, f32 tensor) of every parameter, one at a time; tied ones are left out."""
        for name in self.names():
            yield name, self.dequantized(name)

    def is_complete(self, part: str) -> bool:
        """Whether that part is written."""
        return part in self.manifest.complete

    def statistics(self, part: str) -> dict[str, dict[str, Tensor]]:
        """Name → what tuning did to the roundings of that matrix (see `tuning.statistics`), where it was recorded.

        It is of the block-wise stage: the whole-model stage leaves it as it is.
        """
        record, path = self.manifest.complete[part], self._statistics_path(part)
        if record.statistics_sha256 is None:
            return {}
        if not path.is_file() or sha256_of(path) != record.statistics_sha256:
            raise UserError(f"{path} is missing or was changed after `quantize` wrote it; restore it or quantize again")
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(path).items():
            name, _, field_name = key.rpartition(_SEPARATOR)
            found.setdefault(name, {})[field_name] = tensor
        return found

    def write_part(
        self,
        part: str,
        tensors: dict[str, Tensor | QuantizedTensor],
        report: dict[str, Any],
        scales: Mapping[str, ChannelScales] = MappingProxyType({}),
        transforms: dict[str, Any] | None = None,
        statistics: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
    ) -> None:
        """Write one part atomically and record it; `tensors` must be exactly the manifest's for that part.

        Args:
            scales: name → how a transform scaled that matrix.
            transforms: what transforms report about the part.
            statistics: of its tuned matrices, by name.
        """
        expected = {t.name for t in self.manifest.tensors if t.part == part}
        assert set(tensors) == expected, (part, set(tensors) ^ expected)
        counted = None
        if statistics:
            flat = {f"{name}{_SEPARATOR}{key}": t for name, own in statistics.items() for key, t in own.items()}
            path = self._statistics_path(part)
            counted = _save_atomically(flat, path)
        digest = self._write_tensors(self._part_path(part), tensors, scales)
        self.manifest.complete[part] = PartRecord(digest, report, transforms or {}, counted)
        self._write_manifest()

    def write_whole_model(
        self, parts: Iterable[tuple[str, dict[str, Tensor | QuantizedTensor]]], report: dict[str, Any]
    ) -> None:
        """Put every part, tuned by the whole-model stage, in the place of the block-wise one, all at one moment."""
        records = {}
        for part, tensors in parts:
            scales = {name: self.channel_scales(name) for name in tensors if self.is_quantized(name)}
            digest = self._write_tensors(self._part_path(part, whole_model=True), tensors, scales)
            records[part] = replace(self.manifest.complete[part], sha256=digest)
        assert set(records) == set(self.manifest.parts)
        self.manifest.complete, self.manifest.whole_model = records, report
        self._write_manifest()
        self.remove_superseded()

    def remove_superseded(self) -> None:
        """Delete the block-wise parts that those of the whole-model stage have replaced."""
        if self.manifest.whole_model is not None:
            for part in self.manifest.parts:
                self._part_path(part, whole_model=False).unlink(missing_ok=True)

    def _write_tensors(
        self, target: Path, tensors: dict[str, Tensor | QuantizedTensor], scales: Mapping[str, ChannelScales]
    ) -> str:
        """Write a part's file atomically; returns its sha256."""
        flat: dict[str, Tensor] = {}
        for name, scaled in scales.items():
            for which, vector in zip(_SCALES, (scaled.rows, scaled.columns), strict=True):
                if vector is not None:
                    flat[f"{name}{_SEPARATOR}{which}"] = vector.cpu().clone()  # matrices may share one
        for name, tensor in tensors.items():
            if isinstance(tensor, QuantizedTensor):
                assert tensor.problem() is None, (name, tensor.problem())
                flat[f"{name}{_SEPARATOR}codes"] = tensor.codes.cpu().contiguous()
                flat |= {f"{name}{_SEPARATOR}{f}": v.cpu().contiguous() for f, v in tensor.fields.items()}
            else:
                flat[name] = tensor.detach().cpu().contiguous()
        return _save_atomically(flat, target)

    def _write_manifest(self) -> None:
        write_atomically(self.path / "manifest.json", self.manifest.to_json().encode())

    def _part_path(self, part: str, whole_model: bool | None = None) -> Path:
        """The file of a part as it is now, or as it was before or will be after the whole-model stage."""
        revised = self.manifest.whole_model is not None if whole_model is None else whole_model
        return self.path / "blocks" / f"{part}{'.whole-model' if revised else ''}.safetensors"

    def _statistics_path(self, part: str) -> Path:
        return self.path / "statistics" / f"{part}.safetensors"

    def _open_part(self, part: str) -> Any:
        return safe_open(self._part_path(part), framework="pt")

    def _check_part(self, part: str, record: PartRecord) -> None:
        path = self._part_path(part)
        if not path.is_file():
            raise UserError(f"{path} is missing; run `quantize` again, or restore the file")
        try:
            with self._open_part(part):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a readable safetensors file ({error}); restore it or quantize again"
            ) from error
        if sha256_of(path) != record.sha256:
            raise UserError(f"{path} was changed after `quantize` wrote it; restore it or quantize again")


def _save_atomically(tensors: dict[str, Tensor], target: Path) -> str:
    """Write a safetensors file whole or not at all; returns its sha256."""
    try:
        with whole_file(target) as partial:
            save_file(tensors, partial)
            return sha256_of(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target} could not be written ({error}); free some disk space and run the same command with --resume"
        ) from error


def _row_groups(shape: tuple[int, ...], order: NDArray[np.intp] | None, values: int) -> Iterator[slice | Tensor]:
    """Indices of the rows of a matrix, in groups of about so many values; a vector is one group."""
    step = max(1, values // math.prod(shape[1:]) if len(shape) > 1 else shape[0])
    for start in range(0, shape[0], step):
        group = slice(start, start + step)
        yield group if order is None else torch.from_numpy(order[group])


def dtype_name(dtype: torch.dtype) -> str:
    """The short name: "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")
