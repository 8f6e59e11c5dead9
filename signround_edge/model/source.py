"""Reading a Hugging Face model folder: weights lazily from safetensors, files hashed, pickles refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.files import sha256_of
from signround_edge.model.config import CONFIG_FILE, is_model_folder

# What an exporter or an evaluation needs besides weights; copied into run/config.
CONFIG_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve_model(model: str) -> Path:
    """A local model folder: the path itself, or a download from the Hugging Face Hub when it is no path."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model} is a file; give the model's folder (with config.json and *.safetensors)")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"{model} does not exist; give a model folder or a Hugging Face name such as org/model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", *CONFIG_PATTERNS]))
    except Exception as error:
        raise UserError(
            f"{model} is neither a folder here nor a model that could be downloaded ({type(error).__name__}); "
            "check the name, or download it first and give the folder"
        ) from error


@dataclass(frozen=True)
class ExpertPart:
    """One expert's matrix within a tensor that holds all experts of a layer.

    Attributes:
        tensor: the stored tensor, [experts, rows, cols].
        expert: its number.
        rows: its rows.
    """

    tensor: str
    expert: int
    rows: slice


@dataclass(frozen=True)
class SourceModel:
    """A model folder whose safetensors headers have been read.

    Attributes:
        path: the folder.
        files: tensor name → file name. Matrices of fused experts have names too, as if stored one by one.
        dtypes, shapes: tensor name → dtype and shape in the file.
        parts: name of such a matrix → where it is.
    """

    path: Path
    files: dict[str, str]
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, ExpertPart] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> SourceModel:
        """Read config presence and all safetensors headers; UserError on anything missing or broken."""
        if not is_model_folder(path):
            raise UserError(f"{path} has no config.json; give a Hugging Face model folder")
        files: dict[str, str] = {}
        dtypes: dict[str, torch.dtype] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        parts: dict[str, ExpertPart] = {}
        for file in _weight_files(path):
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                    piece = tensors.get_slice(name)
                    files[name] = file.name
                    dtypes[name] = _DTYPES.get(piece.get_dtype(), torch.float32)
                    shapes[name] = tuple(piece.get_shape())
                    for matrix, part in _expert_parts(name, shapes[name]).items():
                        parts[matrix] = part
                        files[matrix], dtypes[matrix] = files[name], dtypes[name]
                        shapes[matrix] = (part.rows.stop - part.rows.start, shapes[name][2])
        return cls(path, files, dtypes, shapes, parts)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored; UserError when it cannot be read or holds NaN or infinity."""
        file = self.path / self.files[name]
        part = self.parts.get(name)
        with _open(file) as tensors:
            try:
                tensor: Tensor = (
                    tensors.get_tensor(name)
                    if part is None
                    else tensors.get_slice(part.tensor)[part.expert, part.rows].contiguous()
                )
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: tensor {name} cannot be read ({error}); download the file again") from error
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{file}: tensor {name} holds NaN or infinity; use a checkpoint without them")
        return tensor

    def hashes(self) -> dict[str, str]:
        """File name → sha256 of every weight file and of config.json."""
        names = sorted({*self.files.values(), CONFIG_FILE})
        return {name: sha256_of(self.path / name) for name in names}

    def copy_config(self, target: Path) -> None:
        """Copy config, tokenizer and generation files (no weights, no weight index)."""
        target.mkdir(parents=True, exist_ok=True)
        for pattern in CONFIG_PATTERNS:
            for file in sorted(self.path.glob(pattern)):
                if not file.name.endswith(".safetensors.index.json"):
                    shutil.copyfile(file, target / file.name)


def _expert_parts(name: str, shape: tuple[int, ...]) -> dict[str, ExpertPart]:
    """The matrices in a tensor of fused experts, under the names that they have where each is stored apart.

    Layout: transformers' `gate_up_proj` [experts, 2·intermediate, hidden], `down_proj` [experts, hidden, intermediate].
    """
    stem, _, leaf = name.rpartition(".")
    if len(shape) != 3 or not stem.endswith(".experts") or leaf not in ("gate_up_proj", "down_proj"):
        return {}
    rows = shape[1]
    slices = {"down_proj": slice(0, rows)}
    if leaf == "gate_up_proj":
        slices = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
    return {
        f"{stem}.{expert}.{matrix}.weight": ExpertPart(name, expert, part)
        for expert in range(shape[0])
        for matrix, part in slices.items()
    }


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not a readable index ({error}); download it again") from error
        for name in names:
            if not (path / name).is_file():
                raise UserError(f"{path / name} is missing, but {index.name} names it; download the missing file")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if found:
        return found
    pickles = [file.name for pattern in _PICKLES for file in path.glob(pattern)]
    if pickles:
        raise UserError(
            f"{path / pickles[0]} is a pickle checkpoint, which can run code when it is read; convert it to "
            "safetensors first (transformers: `model.save_pretrained(folder)`)"
        )
    raise UserError(f"{path} has no *.safetensors file; download the model's weights into it")


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}); download it again") from error


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
