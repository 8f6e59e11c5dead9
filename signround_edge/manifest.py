"""manifest.json of a run directory: what a run is, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
OUTSIDE = "outside"


class ManifestError(ValueError):
    """What is wrong with a manifest, for use within a sentence."""


@dataclass
class TensorEntry:
    """One parameter of the model.

    Attributes:
        name: Hugging Face parameter name.
        part: name of the part file that holds it.
        shape: shape of the Hugging Face parameter.
        dtype: dtype in the source model ("float16").
        format: grid name, or None for a tensor kept in floats.
        transposed: the source stores [in, out] (Conv1D); codes are always [out, in].
        fallback_from: the format that the scheme asked for, where the row length forced another one.
    """

    name: str
    part: str
    shape: list[int]
    dtype: str
    format: str | None = None
    transposed: bool = False
    fallback_from: str | None = None

    @property
    def out_in_shape(self) -> tuple[int, ...]:
        """[out, in] of a matrix, which is also the shape of its codes; [n] of a vector."""
        return tuple(self.shape[::-1] if self.transposed else self.shape)


@dataclass
class PartRecord:
    """A complete part: its file's hash, what tuning and transforms report about it, the hash of its statistics."""

    sha256: str
    report: dict[str, Any] = field(default_factory=dict)
    transforms: dict[str, Any] = field(default_factory=dict)
    statistics_sha256: str | None = None


@dataclass
class Manifest:
    """manifest.json. `settings` and `source` decide whether a run may be resumed.

    It holds no times, so that a resumed run and an uninterrupted one are byte-identical.

    Attributes:
        scheme: the scheme's text.
        targets: exporters that need no further rounding ("gguf", "onnx").
        source: {"model": path or name, "files": {file name: sha256}}, and where the run is of the language model inside
            a model that reads more than text, "inside": that one's model_type.
        settings: tuning settings, seed, the hash of the calibration tokens and the BOS in front of each sample.
        versions: versions of the libraries that ran.
        parts: part names in order.
        tied: parameter name → name of the parameter whose data it shares.
        tensors: every parameter, in model order.
        complete: part name → record, for parts that are written.
        source_check: how tuning's reading of the model was compared with transformers'; see `tuning.source_check`.
        whole_model: what the whole-model stage reports, once it is done; the parts are its own from then on.
    """

    scheme: str
    targets: list[str]
    source: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    parts: list[str]
    tied: dict[str, str]
    tensors: list[TensorEntry]
    complete: dict[str, PartRecord] = field(default_factory=dict)
    whole_model: dict[str, Any] | None = None
    source_check: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def state(self) -> str:
        """Either "complete" or "incomplete"."""
        pending = self.settings.get("whole_model_steps", 0) and self.whole_model is None
        return "complete" if all(p in self.complete for p in self.parts) and not pending else "incomplete"

    @property
    def inside(self) -> str | None:
        """model_type of the model that reads more than text, whose language model the run is; None for all others."""
        found = self.source.get("inside")
        return None if found is None else str(found)

    @property
    def source_line(self) -> str:
        """What the source check found, in a line: "source: checked against transformers 5.23.0 …, worst 4e-07"."""
        found = self.source_check
        if found is None or found["error"] is None:
            return "source: not checked against transformers"
        return (
            f"source: checked against transformers {found['transformers']} on {found['tokens']} tokens, worst relative "
            f"error {found['error']:.0e} ({found['at']})"
        )

    def to_json(self) -> str:
        data = asdict(self)
        return json.dumps({"schema_version": data.pop("schema_version"), "state": self.state, **data}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ManifestError on anything that is not a manifest of this version."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ManifestError(f"it is not JSON ({error})") from error
        if not isinstance(data, dict) or "schema_version" not in data:
            raise ManifestError("it says no schema_version, so `quantize` did not write it")
        version = data.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"its schema_version is {version}, and this version of signround-edge reads {SCHEMA_VERSION}"
            )
        try:
            data.pop("state")
            data["tensors"] = [TensorEntry(**t) for t in data["tensors"]]
            data["complete"] = {k: PartRecord(**v) for k, v in data["complete"].items()}
            return cls(**data)
        except KeyError as error:
            raise ManifestError(f"it has no {error.args[0]!r}") from error
        except (TypeError, AttributeError) as error:
            raise ManifestError(f"it does not hold what a manifest holds ({error})") from error
