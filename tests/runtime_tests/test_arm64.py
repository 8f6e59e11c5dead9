"""llama.cpp and ONNX Runtime for arm64, emulated: real arm64 builds, real verify."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.transports.qemu import QemuTransport
from runtime_tests.verify import verify
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests.javascript_support import ready_device

pytestmark = pytest.mark.full


@pytest.mark.parametrize("device", ["arm64-armv8.0", "arm64-armv8.6"])
def test_verify_passes_on_arm64_with_the_weights_read_there(
    device: str, run: RunDirectory, gguf_file: Path, onnx_folder: Path, text: Path
) -> None:
    ready_device(device)
    report = verify(run, [gguf_file, onnx_folder], text, devices=[device], n_ctx=64, max_windows=1, log=str)
    assert [(r.name, r.status, r.reason) for r in report.runtimes] == [
        ("llama.cpp", "pass", None),
        ("onnxruntime", "pass", None),
    ]
    assert report.weights_exact


def test_the_figures_are_arm64s_own(gguf_file: Path) -> None:
    """NEON and AVX round sums differently: logits that were bit-equal would be this machine's."""
    profile = ready_device("arm64-armv8.0")
    tokens = np.random.default_rng(0).integers(0, 300, 40).astype(np.int32)
    with LlamaCppRuntime().open(gguf_file) as session:
        here = session.logits(tokens)
    with LlamaCppRuntime().on(profile, QemuTransport(profile)).open(gguf_file) as session:
        there = session.logits(tokens)
    assert not np.array_equal(here, there)
    assert float(np.abs(here - there).max()) < 0.5
