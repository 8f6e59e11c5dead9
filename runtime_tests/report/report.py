"""What `verify` found: the report and its JSON form (a contract, design section 9)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime_tests.checks.exactness import Exactness
from runtime_tests.checks.gates import Gate
from runtime_tests.checks.layers import Divergence
from runtime_tests.report.evidence import Evidence
from signround_edge.evaluation.metrics import FloatArray, Scores

Status = Literal["pass", "fail", "skipped"]
_DIFFERENCES_SHOWN = 20
_MORE_FIGURES = ("ppl_stderr", "kld_stderr", "kld_median", "kld_p99", "kld_max", "ln_ratio_stderr")


@dataclass
class ArtifactReport:
    """Exactness of one artifact.

    Attributes:
        path, format: which artifact; the name of its exporter ("gguf", "onnx").
        exactness: the comparison, or None when it could not be made; then `reason` says why.
        status: "skipped" when no runtime of its format is available.
    """

    path: str
    format: str
    status: Status = "skipped"
    reason: str | None = None
    exactness: Exactness | None = None

    def to_json(self) -> dict[str, Any]:
        differences = self.exactness.differences if self.exactness else []
        return {
            "path": self.path,
            "format": self.format,
            "status": self.status,
            "reason": self.reason,
            "weights_exact": self.status == "pass",
            "tensors_checked": self.exactness.tensors_checked if self.exactness else 0,
            "values_checked": self.exactness.values_checked if self.exactness else 0,
            "tensors_differing": len(differences),
            "values_differing": sum(d.values for d in differences),
            "first_difference": f"{differences[0].tensor} {differences[0].what}" if differences else None,
            "differences": [
                {"tensor": d.tensor, "values": d.values, "what": d.what} for d in differences[:_DIFFERENCES_SHOWN]
            ],
        }


@dataclass(frozen=True)
class PerToken:
    """Figures of every scored token in nats, f32 [n]: loss of the runtime and of torch, and KL divergence."""

    nll: FloatArray
    nll_reference: FloatArray
    kld: FloatArray


@dataclass
class RuntimeReport:
    """One artifact on one runtime of one device.

    Attributes:
        name, device, artifact: which runtime, device profile and file.
        gate: "exact" where the runtime computes in floats, "quantized" where it rounds activations.
        parity: the artifact against torch with the same dequantized weights.
        control: the same graph computing in floats, against torch; None where the artifact itself is that.
        fidelity: the artifact against the original model.
        divergence: where the graph leaves torch, when that was looked for and the runtime shows it.
        gates: the comparisons that decided.
        per_token: figures of every scored token.
        seconds: time that the device computed, where the session says it.
        peak_memory_bytes: of the process that computed, where the session says it.
        notes: what a person should know although it decides nothing.
    """

    name: str
    device: str
    artifact: str
    status: Status = "skipped"
    reason: str | None = None
    gate: Literal["exact", "quantized"] | None = None
    parity: Scores | None = None
    control: Scores | None = None
    fidelity: Scores | None = None
    divergence: Divergence | None = None
    gates: list[Gate] = field(default_factory=list)
    per_token: PerToken | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        parity = self.parity
        return {
            "name": self.name,
            "device": self.device,
            "status": self.status,
            "reason": self.reason,
            **{name: _figure(parity, name) for name in ("ppl", "ppl_reference", "kld_mean", "top1_agreement")},
            "artifact": self.artifact,
            "gate": self.gate,
            "control_kld_mean": _figure(self.control, "kld_mean"),
            **{name: _figure(parity, name) for name in _MORE_FIGURES},
            "tokens": parity.tokens if parity else 0,
            "fidelity": _fidelity_json(self.fidelity),
            "divergence": None if self.divergence is None else self.divergence.to_json(),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "notes": self.notes,
        }


@dataclass
class VerifyReport:
    """Everything that `verify` found.

    Attributes:
        run, text, reference: as they were given.
        evidence: what a certificate needs besides.
        changed: which input was changed while it was verified; then nothing is proved about it.
    """

    run: str
    text: str
    reference: str | None
    evidence: Evidence | None = None
    artifacts: list[ArtifactReport] = field(default_factory=list)
    runtimes: list[RuntimeReport] = field(default_factory=list)
    changed: str | None = None

    @property
    def weights_exact(self) -> bool:
        """Whether every artifact was compared and none differs."""
        return bool(self.artifacts) and all(a.status == "pass" for a in self.artifacts)

    @property
    def status(self) -> Status:
        """ "fail" when anything fails; "pass" only when every artifact is exact and ran somewhere."""
        if self.changed is not None or "fail" in [a.status for a in self.artifacts] + [r.status for r in self.runtimes]:
            return "fail"
        ran = {r.artifact for r in self.runtimes if r.status == "pass"}
        return "pass" if self.weights_exact and all(a.path in ran for a in self.artifacts) else "skipped"

    @property
    def passed(self) -> bool:
        """Exit code 0: nothing failed, and nothing was passed over."""
        return self.status == "pass"

    def to_json(self) -> dict[str, Any]:
        """The `--json` document."""
        return {
            "status": self.status,
            "weights_exact": self.weights_exact,
            "tensors_checked": sum(a.exactness.tensors_checked for a in self.artifacts if a.exactness),
            "runtimes": [r.to_json() for r in self.runtimes],
            "artifacts": [a.to_json() for a in self.artifacts],
            "run": self.run,
            "text": self.text,
            "reference": self.reference,
            "changed": self.changed,
        }


def _fidelity_json(scores: Scores | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    names = ("ppl_reference", "kld_mean", "kld_stderr", "kld_median", "kld_p99", "top1_agreement")
    return {name: _figure(scores, name) for name in names}


def _figure(scores: Scores | None, name: str) -> float | None:
    """A figure for JSON, which knows no NaN and no infinity: a file whose logits are NaN has no perplexity."""
    value: float | None = None if scores is None else getattr(scores, name)
    return value if value is not None and math.isfinite(value) else None
