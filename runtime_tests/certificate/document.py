"""certificate.json: the report of `verify` with all that is needed to believe it. Its schema: docs/certificate.md."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from devices import DeviceProfile
from runtime_tests.report.evidence import Evidence
from runtime_tests.report.report import RuntimeReport, VerifyReport
from signround_edge import __version__
from signround_edge.evaluation.metrics import FloatArray
from signround_edge.files import write_atomically

SCHEMA_VERSION = 1
KIND = "signround-edge parity certificate"
FILE_NAME = "certificate.json"
VERDICTS = {"pass": "pass", "fail": "fail", "skipped": "incomplete"}
_PACKAGES = ("torch", "transformers", "numpy", "onnxruntime", "openvino", "xllamacpp", "gguf", "onnx")
_DIGITS = 6  # of per-token figures


def certificate(report: VerifyReport, evidence: Evidence, folder: Path) -> dict[str, Any]:
    """The document for a certificate in `folder`."""
    data = report.to_json()
    for entry, runtime in zip(data["runtimes"], report.runtimes, strict=True):
        entry["gates"] = [asdict(gate) for gate in runtime.gates]
        entry["per_token"] = _per_token(runtime)
    document = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "verdict": VERDICTS[report.status],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **data,
        "model": {
            "source": evidence.manifest.source,
            "source_check": evidence.manifest.source_line,
            "scheme": evidence.manifest.scheme,
            "settings": evidence.manifest.settings,
            "tuned_with": evidence.manifest.versions,
        },
        "scoring": {"n_ctx": evidence.n_ctx, "windows": evidence.windows, "tokens_sha256": evidence.tokens_sha256},
        "devices": [_device(profile) for profile in evidence.profiles],
        "inputs": [f.to_json(folder) for f in evidence.fingerprints],
        "versions": _versions(),
    }
    return {**document, "digest": digest_of(document)}


def digest_of(document: dict[str, Any]) -> str:
    """sha256 of a certificate without its own digest, as JSON with sorted keys."""
    content = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_document(document: dict[str, Any], folder: Path) -> Path:
    """Write certificate.json into a folder, made when needed."""
    path = folder / FILE_NAME
    write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return path


def _device(profile: DeviceProfile) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(profile).items()}


def _per_token(runtime: RuntimeReport) -> dict[str, list[float | None]] | None:
    """Loss of the runtime, loss of torch and KL divergence of every scored token, in nats, in the text's order."""
    figures = runtime.per_token
    if figures is None:
        return None
    return {
        "nll": _rounded(figures.nll),
        "nll_reference": _rounded(figures.nll_reference),
        "kld": _rounded(figures.kld),
    }


def _rounded(values: FloatArray) -> list[float | None]:
    return [float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()]


def _versions() -> dict[str, str]:
    """Of signround-edge, of the libraries that compute, and of what they ran on."""
    found = {"signround_edge": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
