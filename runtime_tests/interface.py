"""What a runtime is. Runtimes are found through the entry points `signround_edge.runtimes`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from devices import DeviceProfile
from runtime_tests.transports.interface import Transport
from signround_edge.evaluation.metrics import FloatArray, TokenArray


@dataclass(frozen=True)
class StoredTensor:
    """One weight of an artifact, as the runtime's own dequantizer returns it.

    Attributes:
        name: the artifact's name of the tensor.
        weights: f32 [rows, values a row] in the artifact's orientation.
        stored_type: the artifact's name of the format ("Q4_0", "MatMulNBits-4x32", "F32").
    """

    name: str
    weights: FloatArray
    stored_type: str


class Session(Protocol):
    """A loaded artifact."""

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of one window, int32 [n], from an empty cache."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


@runtime_checkable
class SaysNotes(Protocol):
    """A session that a person should know something about which decides nothing, such as what it computes on."""

    @property
    def notes(self) -> list[str]:
        """In sentences."""
        ...


class Runtime(Protocol):
    """A runtime that loads one kind of artifact."""

    name: str
    artifact_format: str  # the name of the exporter that writes it: "gguf", "onnx"

    def on(self, profile: DeviceProfile, transport: Transport) -> Runtime:
        """The same runtime on a device: its sessions run where the transport leads, as the profile says."""
        ...

    def unavailable(self) -> str | None:
        """Why it cannot run there, in one clause with the way out; None when it can."""
        ...

    def open(self, artifact: Path) -> Session:
        """Load an artifact. Raises UserError when the runtime refuses the file."""
        ...

    def stored_tensors(self, artifact: Path) -> Iterator[StoredTensor]:
        """Every weight of the artifact through the runtime's own dequantizer, one at a time."""
        ...
