"""Importance matrices under Hugging Face names: what `quantize --imatrix` reads and `--save-imatrix` writes.

E[x²] belongs to input channels, and llama.cpp's files keep their order in every family (only rows, the output channels,
are stored in another order), so names are all there is to map.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from exporters.gguf.families import FAMILIES
from exporters.gguf.imatrix import read_imatrix, write_imatrix
from signround_edge.errors import UserError
from signround_edge.gguf_names import name_table
from signround_edge.run_directory import sha256_of

_BLOCK = re.compile(r"\.(\d+)\.")


class TensorNames:
    """llama.cpp's names of a model's parameters.

    A built-in family is asked under its own architecture, others under llama.cpp's architecture of the same name, and
    where there is none under all of them: matrices have the same name in nearly all.
    """

    def __init__(self, model: Path) -> None:
        """`model`: a folder with config.json."""
        self._model = model

    def of(self, parameter: str) -> str | None:
        """ "blk.3.attn_q.weight" for "model.layers.3.self_attn.q_proj.weight"; None when there is no such name."""
        block = _BLOCK.search(parameter)
        stem = _BLOCK.sub(".0.", parameter, count=1).removesuffix(".weight")
        found = Counter(name for names in self._maps if (name := names.get_name(stem)) is not None)
        if not found:
            return None
        name = str(found.most_common(1)[0][0])
        return f"{name.replace('blk.0.', f'blk.{block[1]}.') if block else name}.weight"

    @cached_property
    def _maps(self) -> list[gguf.TensorNameMap]:
        """Name maps of one block: all blocks are named alike."""
        try:
            model_type = str(json.loads((self._model / "config.json").read_text(encoding="utf-8"))["model_type"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._model / 'config.json'} names no model_type; give a Hugging Face folder") from error
        family = FAMILIES.get(model_type)
        same = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if _bare(name) == _bare(model_type)]
        archs = [family.arch] if family else same or list(gguf.MODEL_ARCH)
        return [name_table(arch, 1) for arch in archs]


def _bare(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


class ImatrixSource:
    """An importance matrix as the source of a tuning run's E[x²]; see `signround_edge.tuning.importance`."""

    def __init__(self, path: Path, model: Path) -> None:
        """Read `path` for the model in the folder `model`. UserError when it is no importance matrix."""
        self.label = str(path)
        self._vectors = read_imatrix(path)
        self.sha256 = sha256_of(path)
        self._names = TensorNames(model)

    def of(self, parameter: str, length: int) -> Tensor | None:
        """E[x²] f32 [length] of a parameter's input channels; None when the file lacks it.

        Raises:
            UserError: the file's vector has another length.
        """
        name = self._names.of(parameter)
        if name is None or name not in self._vectors:
            return None
        vector = self._vectors[name]
        if vector.shape != (length,):
            shape = " × ".join(map(str, vector.shape))
            raise UserError(
                f"--imatrix {self.label}: {name} has {shape} values, but {parameter} has {length} input channels; give "
                "an importance matrix of this model"
            )
        return torch.from_numpy(vector.copy())


class ImatrixSink:
    """A file for the E[x²] that a tuning run collects; see `signround_edge.tuning.importance`.

    llama-imatrix sums squares over all tokens alike. We write the mean that our own scale search uses, times the number
    of tokens: by default each token of a block counts by one over the mean square of its hidden states
    (`relative_weights`), so that no single token owns the sum; with `--loss mse` all count alike, as in llama.cpp.
    """

    def __init__(self, path: Path, model: Path, dataset: str) -> None:
        """`dataset` is recorded as what the model was calibrated on."""
        self._path = path
        self._names = TensorNames(model)
        self._dataset = dataset

    def check(self, parameters: Iterable[str]) -> None:
        """UserError when the file could not be written, or could not hold one of the parameters."""
        if self._path.is_dir():
            raise UserError(f"--save-imatrix {self._path} is a folder; give the name of a file")
        for parameter in parameters:
            if self._names.of(parameter) is None:
                raise UserError(f"--save-imatrix: llama.cpp has no name for {parameter}; leave --save-imatrix out")

    def write(self, importance: Mapping[str, Tensor], samples: int, seqlen: int) -> str:
        """Write E[x²] f32 [in] by parameter name, from `samples` × `seqlen` tokens; returns the path."""
        vectors = {str(self._names.of(name)): np.asarray(v.float().cpu().numpy()) for name, v in importance.items()}
        return str(write_imatrix(self._path, vectors, samples * seqlen, seqlen, [self._dataset]))


def importance_files(
    imatrix: Path | None, save_imatrix: Path | None, model: Path, calibration: str
) -> tuple[ImatrixSource | None, ImatrixSink | None]:
    """What the flags --imatrix and --save-imatrix name, opened for the model in a folder.

    Args:
        calibration: the calibration text, whose name (without folders) --save-imatrix records.
    Raises:
        UserError: --imatrix is no importance matrix, or both flags name one file.
    """
    if imatrix is not None and save_imatrix is not None and imatrix.resolve() == save_imatrix.resolve():
        raise UserError(f"--imatrix and --save-imatrix both name {imatrix}; give --save-imatrix another name")
    source = None if imatrix is None else ImatrixSource(imatrix, model)
    dataset = Path(calibration).name if Path(calibration).is_file() else calibration
    return source, None if save_imatrix is None else ImatrixSink(save_imatrix, model, dataset)
