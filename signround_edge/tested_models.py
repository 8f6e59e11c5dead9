"""Which families of models were taken the whole way, and how far each came: what `benchmarks.models` found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tested_models.json")


@dataclass(frozen=True)
class TestedModels:
    """Results of one run over all small models.

    Attributes:
        versions: of the software that they hold for.
        models: name → stage → "yes", a figure, or "no: " and the reason.
    """

    versions: dict[str, str]
    models: dict[str, dict[str, str]]

    @classmethod
    def read(cls) -> TestedModels:
        """The results that are shipped."""
        return cls(**json.loads(FILE.read_text(encoding="utf-8")))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
