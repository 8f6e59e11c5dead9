"""What it runs on, as rows of a name and a value."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import Row
from benchmarks.processor import processor

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "gguf", "auto-round")


def machine(bench: Bench) -> Iterator[Row]:
    """Rows of the table "machine"."""
    for name, value in _facts(bench.device):
        yield {"table": "machine", "what": name, "value": value}


def _facts(device: torch.device) -> Iterator[tuple[str, str]]:
    yield "device", torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        yield "device memory", f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free"
        yield "compute capability", f"{properties.major}.{properties.minor}"
        yield "multiprocessors", str(properties.multi_processor_count)
        yield "driver", said_by(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    yield "CUDA that torch was built for", str(torch.version.cuda)
    for package in _PACKAGES:
        yield package, _version(package)
    yield "python", platform.python_version()
    yield "processor", processor()
    yield "threads of torch", str(torch.get_num_threads())
    yield "bf16 products on the CPU", "native" if torch.cpu._is_avx512_bf16_supported() else "not native"
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    yield "host memory", f"{pages * page / 1e9:.1f} GB"
    yield "commit", said_by(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"])
    yield "Triton kernels of our own", "none yet: the sign step is compiled by torch.compile"


def said_by(command: list[str]) -> str:
    """The first line that a command prints; "unknown" where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
