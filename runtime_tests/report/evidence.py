"""What a report of `verify` was made from."""

from __future__ import annotations

from dataclasses import dataclass

from devices import DeviceProfile
from runtime_tests.report.fingerprints import Fingerprint
from signround_edge.manifest import Manifest


@dataclass(frozen=True)
class Evidence:
    """The inputs of one `verify`.

    Attributes:
        fingerprints: of the run, each artifact, the text and the reference, taken before the first was opened.
        manifest: of the run.
        profiles: the devices.
        n_ctx, windows: of the text.
        tokens_sha256: of the tokens that were scored, int32 little-endian, window after window.
    """

    fingerprints: list[Fingerprint]
    manifest: Manifest
    profiles: list[DeviceProfile]
    n_ctx: int
    windows: int
    tokens_sha256: str
