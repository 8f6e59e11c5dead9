"""Reading a Hugging Face model folder: weights lazily from safetensors, files hashed, pickles refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.files import sha256_of
from signround_edge.model.config import CONFIG_FILE, is_model_folder, read_config
from signround_edge.model.experts import Index
from signround_edge.model.stored_quantized import quantization_method
from signround_edge.model.tokenizer import TEMPLATES_FOLDER

# What an exporter or an evaluation needs besides weights; copied into run/config.
CONFIG_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
ADAPTER_FILE = "adapter_config.json"  # of PEFT
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve_model(model: str, wanted: str = "a model folder") -> Path:
    """A local model folder: the path itself, or a download from the Hugging Face Hub when it is no path.

    Args:
        wanted: what may be given besides a name, for the message.
    """
    if not model:
        raise UserError("the name of the model is empty; give a model folder or a Hugging Face name such as org/model")
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model} is a file; give the model's folder (with config.json and *.safetensors)")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"{model} does not exist; give {wanted} or a Hugging Face name such as org/model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", *CONFIG_PATTERNS]))
    except Exception as error:
        raise UserError(
            f"{model} is neither a folder here nor a model that could be downloaded ({type(error).__name__}); "
            "check the name, or download it first and give the folder"
        ) from error


def local_model(name: str) -> Path | None:
    """The folder of a model in the Hugging Face cache, by the name that `model_name` gives; None where it is not."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def model_name(path: Path) -> str:
    """What a model folder is called: "org/model" in the Hugging Face cache, else the folder's own name."""
    folder = path.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.name


@dataclass(frozen=True)
class SourceModel:
    """A model folder whose safetensors headers have been read.

    Attributes:
        path: the folder.
        files: stored tensor name → path of its file in the folder, with "/".
        dtypes, shapes: stored tensor name → dtype and shape in the file.
        quantized: "fp8" or "mxfp4" where the tensors have to be dequantized; see `stored_quantized`.
    """

    path: Path
    files: dict[str, str]
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    quantized: str | None = None

    @classmethod
    def open(cls, path: Path) -> SourceModel:
        """Read config presence and the headers of the files that transformers would load.

        Raises:
            UserError: something is missing or broken, a tensor is in two files, or the checkpoint is quantized already.
        """
        if not is_model_folder(path):
            _refuse_adapter(path)
            raise UserError(f"{path} has no config.json; give a Hugging Face model folder")
        found = cls(path, {}, {}, {}, quantization_method(path))
        for file in _weight_files(path):
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                    found._add(name, file, tensors.get_slice(name))
        return found

    def _add(self, name: str, file: Path, piece: Any) -> None:
        place = file.relative_to(self.path).as_posix()
        if name in self.files:
            raise UserError(
                f"{self.path}: tensor {name} is in {self.files[name]} and in {place}; keep the files of one "
                "checkpoint only"
            )
        self.files[name] = place
        self.dtypes[name] = _DTYPES.get(piece.get_dtype(), _BYTES)
        self.shapes[name] = tuple(piece.get_shape())

    @property
    def ignored_files(self) -> list[str]:
        """Names of the safetensors files beside those that transformers loads."""
        return sorted({file.name for file in self.path.glob("*.safetensors")} - set(self.files.values()))

    def tensor(self, name: str, index: Index = ()) -> Tensor:
        """One tensor as stored, or its part [index]; UserError when it cannot be read or holds NaN or infinity."""
        file = self.path / self.files[name]
        with _open(file) as tensors:
            try:
                tensor: Tensor = _part(tensors.get_slice(name), index) if index else tensors.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: tensor {name} cannot be read ({error}); download the file again") from error
        # fp8 knows NaN too, but has no isfinite.
        finite = tensor if is_float(tensor.dtype) else tensor.float()
        if tensor.dtype.is_floating_point and not bool(finite.isfinite().all()):
            raise UserError(f"{file}: tensor {name} holds NaN or infinity; use a checkpoint without them")
        if tensor.dtype == torch.float64 and not bool(tensor.float().isfinite().all()):
            raise UserError(
                f"{file}: tensor {name} holds 64-bit values that 32-bit floats cannot hold; use a checkpoint whose "
                "values are below 3e38"
            )
        return tensor

    def hashes(self) -> dict[str, str]:
        """File name → sha256 of every weight file and of config.json."""
        names = sorted({*self.files.values(), CONFIG_FILE})
        return {name: sha256_of(self.path / name) for name in names}

    def copy_config(self, target: Path) -> None:
        """Copy config, tokenizer and generation files and all chat templates (no weights, no weight index)."""
        for pattern in (*CONFIG_PATTERNS, f"{TEMPLATES_FOLDER}/*.jinja"):
            for file in sorted(self.path.glob(pattern)):
                if not file.name.endswith(".safetensors.index.json"):
                    copied = target / file.relative_to(self.path)
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copied)


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers' `from_pretrained` loads: model.safetensors, else those that the index names."""
    named = read_config(path).get("transformers_weights")
    if named is not None:
        return _named_files(path, named)
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _indexed_files(index)
    for folder in (whole, index):
        if folder.is_dir():
            raise UserError(f"{folder} is a folder, not a file; download the model's weights again")
    found = sorted(file for file in path.glob("*.safetensors") if not _is_adapter(file))
    if len(found) == 1:
        raise UserError(f"{found[0]} has a name that transformers does not look for; rename it to {whole.name}")
    if found:
        raise UserError(
            f"{path} has {len(found)} safetensors files, but neither {whole.name} nor {index.name}, which says which "
            "of them are the model; download the index"
        )
    _refuse_adapter(path)
    pickles = [file.name for pattern in _PICKLES for file in path.glob(pattern)]
    if pickles:
        raise UserError(
            f"{path / pickles[0]} is a pickle checkpoint, which can run code when it is read; convert it to "
            "safetensors first (transformers: `model.save_pretrained(folder)`)"
        )
    raise UserError(f"{path} has no *.safetensors file; download the model's weights into it")


def _named_files(path: Path, named: Any) -> list[Path]:
    """The file that config.json's `transformers_weights` names, or those that such an index names."""
    said = f"{path / CONFIG_FILE}: its transformers_weights is {named!r}"
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{said}, no name of a safetensors file or index; name one, or remove the entry")
    _refuse_outside(named, said)
    if not (path / named).is_file():
        raise UserError(f"{said}, and there is no such file; download it, or remove the entry")
    return _indexed_files(path / named) if named.endswith(".json") else [path / named]


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names, all of them in its folder or below."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{index} is not a readable index ({error}); download it again") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(
            f"{index} is not a readable index (it has no weight_map of tensor names and file names); download it again"
        )
    names = sorted(set(places.values()))
    for name in names:
        _refuse_outside(name, f"{index} names {name}")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing, but {index.name} names it; download the missing file")
    return [index.parent / name for name in names]


def _refuse_outside(name: str, said: str) -> None:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise UserError(f"{said}, which is outside the model's folder; put all its files into the folder")


def _is_adapter(file: Path) -> bool:
    return file.name.startswith("adapter_model")


def _refuse_adapter(path: Path) -> None:
    """UserError for a folder with PEFT's weights beside another model's, and no model."""
    settings = path / ADAPTER_FILE
    if not settings.is_file() and not any(_is_adapter(file) for file in path.glob("*.safetensors")):
        return
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    raise UserError(
        f"{path} holds a PEFT adapter and no model; merge it into {base or 'the model that it was trained on'} (peft: "
        "`merge_and_unload()`), save that with `save_pretrained`, and give its folder"
    )


def _part(stored: Any, index: Index) -> Tensor:
    """A part of a tensor in a file; of rows that do not follow one another all are read."""
    strided = any(isinstance(axis, slice) and axis.step not in (None, 1) for axis in index)
    part: Tensor = stored[index[:1]][index[1:]] if strided else stored[index]
    return part


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}); download it again") from error


def is_float(dtype: torch.dtype) -> bool:
    """Whether it is what weights are computed with, and no code that needs a scale."""
    return dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def type_name(dtype: torch.dtype) -> str:
    """What safetensors calls it."""
    return next((name for name, found in _DTYPES.items() if found == dtype), str(dtype).removeprefix("torch."))


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_BYTES = torch.uint8  # of a type that torch lacks or that nobody stores weights in
