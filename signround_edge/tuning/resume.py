"""Where `quantize` writes: a new run directory, or one that it may continue because it is the same run.

A resumed run must be byte-identical to an uninterrupted one, so all that decides its bytes has to be the same.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from signround_edge import __version__
from signround_edge.errors import UserError
from signround_edge.manifest import Manifest
from signround_edge.model.config import read_config, write_config
from signround_edge.model.language_model import save_text_config
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import RunDirectory
from signround_edge.tuning.lock import LOCK_FILE


def to_continue(out: Path, manifest: Manifest, resume: bool) -> RunDirectory | None:
    """The run of `manifest` that `out` holds; None where there is none and a new one can be made.

    Args:
        manifest: of the run asked for.
        resume: continue what `out` holds.
    Raises:
        UserError: `out` holds another run or something else, or this run and `resume` is not given.
    """
    if (out / "manifest.json").is_file():
        if not resume:
            raise UserError(f"{out} already holds a run; add --resume to continue it, or give another -o")
        run = RunDirectory.open(out, allow_incomplete=True)
        difference = _difference(run.manifest, manifest)
        if difference:
            raise UserError(f"{out} cannot be resumed: {difference}; use the same arguments, or give another -o")
        run.remove_superseded()
        return run
    if out.exists() and (not out.is_dir() or _has_foreign_files(out)):
        raise UserError(f"{out} exists and is not a run directory; give another -o")
    return None


def create(out: Path, manifest: Manifest, weights: ModelWeights) -> RunDirectory:
    """A new run directory with a copy of the model's config."""
    weights.source.copy_config(out / "config")
    if weights.is_inside:
        save_text_config(weights.decoder.model, out / "config")
    config = read_config(out / "config")
    # Whoever builds the model from the run's config must get what the run holds.
    config.pop("quantization_config", None)
    config.pop("transformers_weights", None)
    if weights.untied:
        config["tie_word_embeddings"] = False
    if config != read_config(out / "config"):
        write_config(out / "config", config)
    return RunDirectory.create(out, manifest)


def _has_foreign_files(out: Path) -> bool:
    """Anything but what a run that was killed before its first manifest leaves behind."""
    return any(p.name not in ("config", "blocks", "manifest.json.partial", LOCK_FILE) for p in out.iterdir())


def _difference(old: Manifest, new: Manifest) -> str | None:
    """What differs between a run on disk and the one asked for, in a few words; None when they are the same."""
    if old.scheme != new.scheme:
        return f"its scheme is {old.scheme}, not {new.scheme}"
    for file in sorted({*old.source["files"], *new.source["files"]}):
        if old.source["files"].get(file) != new.source["files"].get(file):
            return f"it was made from another model ({file} differs)"
    for name, value in new.settings.items():
        if old.settings.get(name) != value:
            return f"its {name} is {old.settings.get(name)}, not {value}"
    for name, version in new.versions.items():
        if old.versions.get(name) != version:
            return f"it was made with {name} {old.versions.get(name)}, not {version}"
    return None if old.tensors == new.tensors else "its list of tensors differs"


def versions(device: torch.device) -> dict[str, str]:
    """What a run's bytes depend on besides its inputs: versions of the libraries, and the machine that computes."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "numpy")}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"signround_edge": __version__, **packages, "python": platform.python_version(), "machine": machine}
