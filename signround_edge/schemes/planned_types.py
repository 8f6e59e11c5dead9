"""plan.json: a type for every matrix of one model, as `plan` found them under a budget, for `quantize --plan`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError
from signround_edge.files import write_atomically
from signround_edge.formats import get_grid
from signround_edge.formats.matmul_nbits import has_matmul_nbits_form

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlannedTypes:
    """What plan.json holds.

    Attributes:
        target: the file's format, "gguf" or "onnx".
        model: the model's name, for people.
        files: file name → sha256 of its weight files and config.json.
        types: parameter name → type of every matrix that is quantized.
        floats: names of the matrices that stay in floats, since no block divides their rows.
        file_bytes: what the file will have, metadata included.
        budget_bytes: what it may have.
        bits_per_weight: of the whole model.
        predicted_kl: mean KL divergence from the original model, in nats, once tuned.
        factor: by which the second-order prediction was multiplied; 1 unless a finished run has corrected it.
        settings: what else decided the plan, for people.
        sha256: of the file that it was read from.
        is_edited: whether types in that file are others than `plan` found.
    """

    target: str
    model: str
    files: dict[str, str]
    types: dict[str, str]
    file_bytes: int
    budget_bytes: int
    bits_per_weight: float
    predicted_kl: float
    floats: list[str] = field(default_factory=list)
    factor: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    is_edited: bool = False

    @property
    def scheme(self) -> str:
        """What stands in the place of a scheme's text: "gguf:plan"."""
        return f"{self.target}:plan"

    def to_json(self) -> dict[str, Any]:
        """The document."""
        document = asdict(self)
        del document["sha256"], document["is_edited"]
        return {"schema_version": SCHEMA_VERSION, **document, "types_sha256": self._types_sha256()}

    def _types_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.types, sort_keys=True).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What a run's manifest keeps of it; without bytes and prediction where types were edited by hand."""
        predicted = {} if self.is_edited else {"predicted_kl": self.predicted_kl, "file_bytes": self.file_bytes}
        return {"sha256": self.sha256, **predicted}

    @staticmethod
    def check_out(path: Path) -> None:
        """UserError where writing a plan and its picture would replace anything but those of an earlier plan."""
        if path.suffix != ".json":
            raise UserError(f"-o {path} is for the plan; give a name that ends in .json")
        if not path.exists():
            kept = path.with_suffix(".svg")
            if kept.exists():
                raise UserError(f"{kept} is there, and the plan's picture would replace it; give another -o")
            return
        try:
            PlannedTypes.read(path)
        except UserError as error:
            raise UserError(f"-o {path} is there and no plan; give another -o") from error

    def save(self, path: Path) -> None:
        """Write plan.json, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> PlannedTypes:
        """Read plan.json; UserError when it is missing, or no plan of this version."""
        again = "make it again with `plan`"
        if not path.is_file():
            raise UserError(f"--plan {path} is no file; give a plan.json that `plan` wrote")
        data = path.read_bytes()
        try:
            document = json.loads(data)
        except ValueError as error:
            raise UserError(f"--plan {path} is no JSON ({error}); {again}") from error
        if not isinstance(document, dict) or document.pop("schema_version", None) != SCHEMA_VERSION:
            raise UserError(f"--plan {path} is no plan of schema_version {SCHEMA_VERSION}; {again}")
        known = {f.name for f in fields(cls)} - {"sha256", "is_edited"}
        digest = document.pop("types_sha256", None)
        types, files = document.get("types"), document.get("files")
        if not known - {"floats", "factor", "settings"} <= set(document) <= known:
            raise UserError(f"--plan {path} does not hold what a plan holds; {again}")
        if not (_is_texts(types) and _is_texts(files)):
            raise UserError(f"--plan {path}: its types and files are no tables of names; {again}")
        plan = cls(**document, sha256=hashlib.sha256(data).hexdigest())
        if plan.target not in ("gguf", "onnx"):
            raise UserError(f"--plan {path} is for the format {plan.target!r}, which there is not; {again}")
        for name, kind in plan.types.items():
            try:
                grid = get_grid(kind)
            except UserError as error:
                raise UserError(f"--plan {path}: {name}: {error}") from error
            fits = has_matmul_nbits_form(grid) if plan.target == "onnx" else not grid.name.startswith("w")
            if not fits:
                raise UserError(f"--plan {path}: {name} has the type {kind}, which {plan.target.upper()} cannot store")
            plan.types[name] = grid.name
        return replace(plan, is_edited=digest != plan._types_sha256())

    def check_model(self, files: dict[str, str]) -> None:
        """UserError where a model is not the one that was planned.

        Args:
            files: file name → sha256 of the model's files.
        """
        changed = [name for name in sorted({*files, *self.files}) if files.get(name) != self.files.get(name)]
        if changed:
            raise UserError(
                f"--plan is of another model ({self.model}: {changed[0]} differs); make one for this model with `plan`"
            )


def _is_texts(value: object) -> bool:
    """Whether it is a table of texts by text."""
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
