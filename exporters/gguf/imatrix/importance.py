"""Importance matrices under Hugging Face names: what `quantize --imatrix` reads and `--save-imatrix` writes.

E[x²] belongs to input channels, and llama.cpp's files keep their order in every family (only rows, the output channels,
are stored in another order), so names are all there is to map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters.gguf.container.writer import check_target
from exporters.gguf.imatrix.file import read_imatrix, write_imatrix
from signround_edge.errors import UserError
from signround_edge.files import sha256_of
from signround_edge.model.config import CONFIG_FILE, read_config
from signround_edge.model.experts import split_expert, stacks
from signround_edge.schemes.gguf_names import gguf_name


def _config(model: Path) -> tuple[str, dict[str, Any]]:
    """(model_type, config.json) of a model folder; UserError when it names none."""
    try:
        config = read_config(model)
        return str(config["model_type"]), config
    except (UserError, KeyError) as error:
        raise UserError(f"{model / CONFIG_FILE} names no model_type; give a Hugging Face folder") from error


class ImatrixSource:
    """An importance matrix as a tuning run's E[x²]; see `signround_edge.tuning.calibration.importance`."""

    def __init__(self, path: Path, model: Path) -> None:
        """Read `path` for the model in the folder `model`. UserError when it is no importance matrix."""
        self.label = str(path)
        self._vectors = read_imatrix(path)
        self.sha256 = sha256_of(path)
        self._model_type, config = _config(model)
        self._experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)

    def of(self, parameter: str, length: int) -> Tensor | None:
        """E[x²] f32 [length] of a parameter's input channels; None when the file lacks it.

        Raises:
            UserError: the file's vector has another length.
        """
        name = gguf_name(parameter, self._model_type)
        if name is None or name not in self._vectors:
            return None
        vector = self._vectors[name]
        expert = split_expert(parameter)[1]
        if expert is not None and vector.size == self._experts * length:
            vector = vector.reshape(self._experts, length)[expert]
        if vector.shape != (length,):
            shape = " × ".join(map(str, vector.shape))
            raise UserError(
                f"--imatrix {self.label}: {name} has {shape} values, but {parameter} has {length} input channels; give "
                "an importance matrix of this model"
            )
        return torch.from_numpy(vector.copy())


class ImatrixSink:
    """A file for the E[x²] that a tuning run collects; see `signround_edge.tuning.calibration.importance`.

    The experts of a layer are one entry, [experts, in], each with the count of all tokens: llama-quantize divides sums
    by counts, which gives E[x²] over the tokens that an expert saw.

    llama-imatrix sums squares over all tokens alike. We write the mean that our own scale search uses, times the number
    of tokens: by default each token of a block counts by one over the mean square of its hidden states
    (`relative_weights`), so that no single token owns the sum; with `--loss mse` all count alike, as in llama.cpp.
    """

    def __init__(self, path: Path, model: Path, dataset: str) -> None:
        """`dataset` is recorded as what the model was calibrated on."""
        self._path = path
        self._model_type, _ = _config(model)
        self._dataset = dataset

    def check(self, parameters: Iterable[str]) -> None:
        """UserError when the file could not be written, or could not hold one of the parameters."""
        check_target(self._path, {}, "--save-imatrix")
        for parameter in parameters:
            if gguf_name(parameter, self._model_type) is None:
                raise UserError(f"--save-imatrix: llama.cpp has no name for {parameter}; leave --save-imatrix out")

    def write(self, importance: Mapping[str, Tensor], samples: int, seqlen: int) -> str:
        """Write E[x²] f32 [in] by parameter name, from `samples` × `seqlen` tokens; returns the path."""
        vectors = {}
        for members in stacks(list(importance)).values():
            matrix = np.stack([importance[name].float().cpu().numpy() for name in members])
            vectors[str(gguf_name(members[0], self._model_type))] = matrix[0] if len(members) == 1 else matrix
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
