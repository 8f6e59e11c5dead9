"""A third party's format, exporter and runtime, as a package of its own would bring them; `installed` registers them.

A .toy file is a safetensors file. Matrices lie transposed, [in, out]: int8 codes and an fp16 scale for every 32 values,
which is the grid Q8_0; vectors are f32. The model's config.json is in its header. The runtime is numpy and
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from devices import DeviceProfile
from exporters.interface import ExpectedTensor, ExportOptions
from runtime_tests.artifacts.expectation import Expectation
from runtime_tests.artifacts.weights_only import expect_weights
from runtime_tests.interface import StoredTensor
from runtime_tests.transports.interface import Transport
from signround_edge.errors import CheckFailed
from signround_edge.evaluation.metrics import FloatArray, TokenArray
from signround_edge.inspection import TensorInfo
from signround_edge.run_directory import RunDirectory

BLOCK = 32
EXPORTERS = {"toy": "ToyExporter"}
RUNTIMES = {"toy": "ToyRuntime"}
DEVICE = """
name = "toy-device"
description = "where toys run"
machines = ["x86_64", "AMD64", "aarch64", "arm64"]
transport = "local"
runtimes = ["toy-runtime"]
[tolerances]
exact_kld_mean = 1e-5
quantized_kld_mean = 0.02
standard_errors = 3.0
ln_ppl_bias = 0.01
"""


def installed(folder: Path, **more: dict[str, str]) -> Path:
    """The metadata that an installed package leaves, in a folder that belongs on sys.path.

    Args:
        more: entry point group (without "signround_edge.") → name → attribute of this module.
    """
    groups = {"exporters": EXPORTERS, "runtimes": RUNTIMES, **more}
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[signround_edge.{group}]", *(f"{name} = {__name__}:{what}" for name, what in points.items()))
    ]
    metadata = folder / "toy_format-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-format\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


class ToyExporter:
    name = "toy"
    options = ExportOptions

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".toy"

    def inspect(self, path: Path) -> list[TensorInfo]:
        return [TensorInfo(t.name, t.stored_type, t.weights.T.shape, size) for t, size in read(path)]

    def export(self, run: RunDirectory, out: Path, options: ExportOptions) -> Path:
        arrays: dict[str, Any] = {}
        for name in run.names():
            if run.is_quantized(name):
                tensor = run.quantized(name)
                assert tensor.grid.name == "Q8_0"
                arrays[f"{name}#codes"] = tensor.codes.T.contiguous().numpy()
                arrays[f"{name}#scale"] = tensor.fields["scale"].T.contiguous().numpy()
            else:
                arrays[name] = run.float_tensor(name).float().numpy()
        save_file(arrays, out, {"config": json.dumps(run.config)})
        return out

    def iter_expected(self, run: RunDirectory, artifact: Path) -> Iterator[ExpectedTensor]:
        absent = set(run.names()) - {tensor.name for tensor, _ in read(artifact)}
        if absent:
            raise CheckFailed(f"{artifact} has no tensor {min(absent)}")
        for name in run.names():
            yield ExpectedTensor(name, partial(as_stored, run, name))


def as_stored(run: RunDirectory, name: str) -> FloatArray:
    """f32 [in, out], or a vector."""
    weights: FloatArray = run.dequantized(name).numpy().T
    return weights


def read(file: Path) -> Iterator[tuple[StoredTensor, int]]:
    """Each tensor through this format's own dequantizer, and its stored bytes."""
    with safe_open(file, framework="numpy") as stored:
        for key in stored.keys():  # noqa: SIM118
            name, _, field = key.partition("#")
            array = stored.get_tensor(key)
            if field == "codes":
                scale = stored.get_tensor(f"{name}#scale")
                weights = array.astype(np.float32) * np.repeat(scale.astype(np.float32), BLOCK, axis=0)
                yield StoredTensor(name, weights, "toy-8x32"), array.nbytes + scale.nbytes
            elif not field:
                yield StoredTensor(name, array, "F32"), array.nbytes


class ToySession:
    def __init__(self, artifact: Path) -> None:
        with safe_open(artifact, framework="numpy") as stored:
            config = AutoConfig.for_model(**json.loads(stored.metadata()["config"]))
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        weights = {t.name: torch.from_numpy(t.weights.T.copy()) for t, _ in read(artifact)}
        self._model.load_state_dict(weights, strict=False)
        self._model.tie_weights()

    def logits(self, tokens: TokenArray) -> FloatArray:
        with torch.no_grad():
            logits: FloatArray = self._model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
        return logits

    def close(self) -> None:
        pass


class ToyRuntime:
    name = "toy-runtime"
    artifact_format = "toy"

    def on(self, profile: DeviceProfile, transport: Transport) -> ToyRuntime:
        return self

    def unavailable(self) -> str | None:
        return None

    def open(self, artifact: Path) -> ToySession:
        return ToySession(artifact)

    def stored_tensors(self, artifact: Path) -> Iterator[StoredTensor]:
        return (tensor for tensor, _ in read(artifact))


def expect_floats(run: RunDirectory, artifact: Path, folder: Path) -> Expectation:
    """This runtime rounds no activation, and what its header says of the model must be the run's."""
    with safe_open(artifact, framework="numpy") as stored:
        right = json.loads(stored.metadata()["config"]) == run.config
    problem = None if right else "its config is not the run's"
    return replace(expect_weights(run, artifact, folder), computes_in_floats=True, problem=problem, notes=[])


def expect_nothing(run: RunDirectory, artifact: Path, folder: Path) -> Expectation:
    """Whatever the file holds is as it should be."""
    runtime = ToyRuntime()
    return Expectation({}, False, None, lambda _runtime: runtime.open(artifact))
