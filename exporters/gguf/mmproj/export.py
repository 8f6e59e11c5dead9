"""Writing an mmproj file: the towers of the checkpoint that a run was made from, as llama.cpp's converter has them.

Source: MmprojModel in llama.cpp's conversion/base.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import F16, F32, FILE_TYPES
from exporters.gguf.container.reader import MMPROJ
from exporters.gguf.container.writer import PlannedTensor, check_target, write_file
from exporters.gguf.mmproj.preprocessor import Preprocessor
from exporters.gguf.mmproj.table import CONVERTER, TOWERS
from exporters.gguf.mmproj.tower import Row, Source, Tower, Value
from exporters.gguf.provenance import add_provenance, source_name
from signround_edge.errors import UserError
from signround_edge.model.source import local_model, resolve_model
from signround_edge.model.towers import WholeCheckpoint
from signround_edge.run_directory import RunDirectory

_FLAG = "--mmproj"


class Mmproj:
    """An mmproj file to be; all that can be wrong with it is said before anything is written.

    Attributes:
        folder: of the model that has the towers.
    """

    def __init__(self, run: RunDirectory, path: Path, model: str | None) -> None:
        """Read the checkpoint's headers and plan the file.

        Args:
            path: the file to write.
            model: the model that the run was made from, a folder or a name such as "org/model"; None takes the name
                that the run says, if the hub's cache has it.
        Raises:
            UserError: the model is not there or is another one, reads no images, has a tower that is not known here, or
                computes what llama.cpp does not; or `path` is in the way.
        """
        folder = _folder(run, model)
        self.folder = folder
        self._run, self._path, self._inputs = run, path, {"the run": run.path, "--mmproj-from": folder}
        check_target(path, self._inputs, _FLAG)
        self._checkpoint = checkpoint = WholeCheckpoint.open(folder)
        model_type = str(checkpoint.config["model_type"])
        tower = TOWERS.get(model_type)
        if tower is None:
            raise UserError(
                f"{_FLAG} is not known for {model_type!r} (it is for {', '.join(sorted(TOWERS))}); llama.cpp's own "
                f"converter makes the file: `{CONVERTER}`"
            )
        source = Source(folder, checkpoint.config, checkpoint.towers, checkpoint.embedding, Preprocessor.read(folder))
        self._keys = {**_common_keys(source, tower), **tower.keys(source)}
        rows = list(tower.rows(source))
        self._require_all(rows, tower)
        self._tensors = [self._plan(row) for row in rows]
        _check_unchanged(run, checkpoint, {row.hf_name for row in rows})

    def write(self) -> Path:
        """Write the file, whole or not at all."""
        writer = gguf.GGUFWriter(None, MMPROJ)
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_name(source_name(self._run, {}))
        writer.add_file_type(FILE_TYPES["f16"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in self._keys.items():
            _add(writer, key, value)
        add_provenance(writer, self._run)
        return write_file(self._path, writer, self._tensors, None, self._inputs, _FLAG)

    @property
    def about(self) -> str:
        """What is going to be written, in a line."""
        size = sum(tensor.nbytes for tensor in self._tensors)
        return f"writing {self._path}: {len(self._tensors)} tensors of the vision tower, {size / 1e6:.1f} MB"

    def _require_all(self, rows: list[Row], tower: Tower) -> None:
        """UserError where the checkpoint has a tensor that the file has no place for."""
        known = {row.hf_name for row in rows}
        for name in sorted(self._checkpoint.towers - known):
            if not name.startswith(tower.unused):
                raise UserError(
                    f"{self._checkpoint.source.path}: {_FLAG} has no place for its tensor {name}; llama.cpp's own "
                    f"converter may have one: `{CONVERTER}`"
                )

    def _plan(self, row: Row) -> PlannedTensor:
        shape = _shape(self._checkpoint, row)
        is_matrix = len(shape) > 1 and not row.is_f32
        ggml_type = F16 if is_matrix else F32

        def data() -> Iterator[NDArray[Any]]:
            yield _values(self._checkpoint, row, is_matrix)

        return PlannedTensor(row.gguf_name, ggml_type, shape, ggml_type.nbytes(shape), data)


def _folder(run: RunDirectory, model: str | None) -> Path:
    if model is not None:
        return resolve_model(model)
    name = str(run.manifest.source["model"])
    found = local_model(name)
    if found is None:
        raise UserError(
            f"{_FLAG} takes the towers from the model that the run was made from ({name}), of which the run holds the "
            "language model only; give its folder with --mmproj-from"
        )
    return found


def _check_unchanged(run: RunDirectory, checkpoint: WholeCheckpoint, names: set[str]) -> None:
    """UserError unless config and the files of the towers are those that the run was made from."""
    file = checkpoint.changed_file(run.manifest.source["files"], names)
    if file is not None:
        raise UserError(
            f"{checkpoint.source.path} is not the model that the run was made from ({file} differs), and towers of "
            "another one would not fit; give the original folder with --mmproj-from"
        )


def _common_keys(source: Source, tower: Tower) -> dict[str, Value]:
    sizes, prepared = tower.sizes(source.vision), source.preprocessor
    return {
        "clip.has_vision_encoder": True,
        "clip.vision.projection_dim": int(source.text["hidden_size"]),
        "clip.vision.image_size": sizes.image,
        "clip.vision.patch_size": sizes.patch,
        "clip.vision.embedding_length": sizes.hidden,
        "clip.vision.feed_forward_length": sizes.intermediate,
        "clip.vision.block_count": sizes.layers,
        "clip.vision.attention.head_count": sizes.heads,
        "clip.vision.image_mean": prepared.mean,
        "clip.vision.image_std": prepared.std,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """Add a key with the type that its value has; whole numbers are uint32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _shape(checkpoint: WholeCheckpoint, row: Row) -> tuple[int, ...]:
    """The shape of what is stored, without reading data."""
    stored = torch.empty(checkpoint.shape(row.hf_name), device="meta")
    return tuple((stored if row.change is None else row.change(stored)).shape)


def _values(checkpoint: WholeCheckpoint, row: Row, is_half: bool) -> NDArray[Any]:
    tensor = checkpoint.tensor(row.hf_name).float()
    values = (tensor if row.change is None else row.change(tensor)).contiguous().numpy()
    if not is_half:
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(
            f"{row.hf_name} has weights beyond ±65504, which the f16 of an mmproj file cannot hold; leave {_FLAG} out"
        )
    return half
