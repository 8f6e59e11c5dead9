"""Where what a model's pass has found is kept, so that the next plan needs no pass: beside other users' caches.

    <cache>/plans/<key>/sensitivity.safetensors   what `measure` found
    <cache>/plans/<key>/costs.json                what each type costs on each tensor, as far as anybody has asked

The key is a hash of the model's files, of the tokens and of all else that decides the figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from signround_edge import __version__
from signround_edge.errors import UserError
from signround_edge.files import write_atomically
from signround_edge.sensitivity.measured import Measured
from signround_edge.tuning.calibration.text import tokens_hash

_VERSION = 1  # of how things are measured
_SENSITIVITY, _COSTS = "sensitivity.safetensors", "costs.json"


def default_cache() -> Path:
    """$SIGNROUND_EDGE_CACHE, or signround-edge in the user's folder for caches ($XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("SIGNROUND_EDGE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "signround-edge"


def usable_cache(cache: Path) -> Path:
    """The folder, made where it is not there; UserError where nothing can be written in it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        raise UserError(
            f"the cache of plans cannot be kept in {cache} ({error.strerror or error}); give another folder with "
            "--cache or $SIGNROUND_EDGE_CACHE"
        ) from error


@dataclass
class Store:
    """One model on one text.

    Attributes:
        folder: of its files.
        costs: parameter name → type → cost.
    """

    folder: Path
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, cache: Path, files: dict[str, str], tokens: Tensor, seed: int) -> Store:
        """The store of a model.

        Args:
            files: name → sha256 of the model's files.
            tokens: int64 [samples, seqlen].
            seed: of the labels.
        """
        what = [_VERSION, __version__, files, tokens_hash(tokens), list(tokens.shape), seed]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        store = cls(cache / "plans" / key)
        try:
            store.costs = json.loads((store.folder / _COSTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet; a damaged one is computed anew
            store.costs = {}
        return store

    @property
    def is_measured(self) -> bool:
        """Whether the pass has been made."""
        return (self.folder / _SENSITIVITY).is_file()

    def measured(self, measure: Callable[[], Measured]) -> Measured:
        """What the pass has found; made by `measure` where there is none."""
        if self.is_measured:
            return Measured.load(self.folder / _SENSITIVITY)
        found = measure()
        found.save(self.folder / _SENSITIVITY)
        return found

    def keep_costs(self) -> None:
        """Write the costs."""
        write_atomically(self.folder / _COSTS, json.dumps(self.costs).encode())
