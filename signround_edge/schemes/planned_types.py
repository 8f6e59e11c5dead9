"""plan.json: a type for every matrix of one model, as `plan` found them under a budget, for `quantize --plan`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError
from signround_edge.files import write_atomically
from signround_edge.formats import get_grid

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlannedTypes:
    """What plan.json holds.

    Attributes:
        target: the file's format, "gguf" or "onnx".
        model: the model's name, for people.
        files: file name → sha256 of its weight files and config.json.
        types: parameter name → type of every matrix that is quantized; one without stays in floats.
        file_bytes: what the file will have, metadata included.
        budget_bytes: what it may have.
        bits_per_weight: of the whole model.
        predicted_kl: mean KL divergence from the original model, in nats, once tuned.
        factor: by which the second-order prediction was multiplied; 1 unless a finished run has corrected it.
        settings: what else decided the plan, for people.
        sha256: of the file that it was read from.
    """

    target: str
    model: str
    files: dict[str, str]
    types: dict[str, str]
    file_bytes: int
    budget_bytes: int
    bits_per_weight: float
    predicted_kl: float
    factor: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @property
    def scheme(self) -> str:
        """What stands in the place of a scheme's text: "gguf:plan"."""
        return f"{self.target}:plan"

    def to_json(self) -> dict[str, Any]:
        """The document."""
        document = asdict(self)
        del document["sha256"]
        return {"schema_version": SCHEMA_VERSION, **document}

    def summary(self) -> dict[str, Any]:
        """What a run's manifest keeps of it."""
        return {"sha256": self.sha256, "predicted_kl": self.predicted_kl, "file_bytes": self.file_bytes}

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
        try:
            plan = cls(**document, sha256=hashlib.sha256(data).hexdigest())
            for kind in sorted(set(plan.types.values())):
                get_grid(kind)
        except (TypeError, AttributeError) as error:
            raise UserError(f"--plan {path} does not hold what a plan holds ({error}); {again}") from error
        if plan.target not in ("gguf", "onnx"):
            raise UserError(f"--plan {path} is for the format {plan.target!r}, which there is not; {again}")
        return plan

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
