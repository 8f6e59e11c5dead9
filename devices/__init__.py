"""Device profiles: one TOML file per device, shipped in this folder. Copy one to describe another device.

name              as `verify --device` takes it; the file's own name without .toml
description       what it stands for, in a phrase
transport         how a worker is reached: "local", "qemu", "ssh", "adb", "node", "chromium" or "phone-browser"
machines          what `platform.machine()` says on the device; a local profile is ready only on such a machine
runtimes          names of the runtimes to run there
memory_budget_mb  memory that an app may take there, in MB (10^6 bytes)
cpu_features      instruction-set extensions that matter to the kernels, for people
cpu               the CPU that qemu emulates (qemu only)
gpu               true: the browser may use WebGPU, on a graphics card or else in software (chromium only)
address           where it is: user@host[:port] for ssh, a serial number for adb, host[:port] to listen on for browsers
logits            "full": all logits of a window come back; "digest": its most likely tokens and losses only
timeout_s         seconds that one window may take before the device counts as hung
[versions]        runtime → the version that the profile's tolerances were measured with
[tolerances]      the gates of `verify`; see `Tolerances`

A profile of one's own is given by its path: `--device my-pi.toml`. `--device raspberry-pi-5=pi@192.168.1.20` takes a
shipped one at another address.
"""

from __future__ import annotations

import platform
import tomllib
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError

DEFAULT_DEVICE = "cpu-x86"
TRANSPORTS = ("local", "qemu", "ssh", "adb", "node", "chromium", "phone-browser")
_LOGITS = ("full", "digest")
_LISTS = ("machines", "runtimes", "cpu_features")


@dataclass(frozen=True)
class Tolerances:
    """The gates of the parity test.

    Attributes:
        exact_kld_mean: mean KL divergence from torch, in nats, where the runtime computes in floats: the control.
        quantized_kld_mean: the same where the runtime rounds activations to int8.
        standard_errors: by how many standard errors of the paired mean log-ratio the perplexity may differ there.
        ln_ppl_bias: a difference of ln(perplexity) that passes however small its standard error is: rounding
            activations to int8 costs a little on every text, and on a long one that is significant.
        layer_error: relative error of each layer's hidden states, where the runtime computes in floats and shows them.
            Measured on sound files: at most 4e-6; one wrong epsilon is 1e-4 and more.
    """

    exact_kld_mean: float
    quantized_kld_mean: float
    standard_errors: float
    ln_ppl_bias: float
    layer_error: float = 5e-5


@dataclass(frozen=True)
class DeviceProfile:
    """One device. Attributes as in the TOML file."""

    name: str
    description: str
    transport: str
    runtimes: tuple[str, ...]
    tolerances: Tolerances
    machines: tuple[str, ...] = ()
    memory_budget_mb: int | None = None
    cpu_features: tuple[str, ...] = ()
    cpu: str | None = None
    gpu: bool = False
    address: str | None = None
    logits: str = "full"
    timeout_s: float = 900.0
    versions: dict[str, str] = field(default_factory=dict)

    def unavailable(self) -> str | None:
        """Why nothing can run on it because of what this machine is, in one clause; None when that is no obstacle."""
        if self.transport == "local" and platform.machine() not in self.machines:
            return f"this machine is {platform.machine()}, not {' or '.join(self.machines)}"
        return None


def load_devices() -> dict[str, DeviceProfile]:
    """Every shipped profile by name."""
    shipped = sorted((f for f in files(__name__).iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    profiles = [read_profile(file) for file in shipped]
    return {profile.name: profile for profile in profiles}


def get_device(name: str) -> DeviceProfile:
    """The profile that `--device` names: NAME, NAME=ADDRESS, or the path of a TOML file (with =ADDRESS or without).

    Raises:
        UserError: no such profile; the sentence lists the known ones.
    """
    name, _, address = name.partition("=")
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UserError(f"{name} does not exist; give the path of a device profile, or a name that `devices` lists")
        profile = read_profile(Path(name))
    else:
        devices = load_devices()
        if name not in devices:
            raise UserError(f"unknown device {name!r}; known devices are {', '.join(devices)}")
        profile = devices[name]
    return replace(profile, address=address) if address else profile


def read_profile(file: Traversable) -> DeviceProfile:
    """Read one TOML file; UserError names what is wrong in it."""
    try:
        data: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        tolerances = Tolerances(**{key: float(value) for key, value in data.pop("tolerances").items()})
        data |= {key: tuple(map(str, data[key])) for key in _LISTS if key in data}
        profile = DeviceProfile(**data, tolerances=tolerances)
        if profile.transport not in TRANSPORTS:
            raise ValueError(f"transport {profile.transport!r} is none of {', '.join(TRANSPORTS)}")
        if profile.logits not in _LOGITS:
            raise ValueError(f"logits {profile.logits!r} is none of {', '.join(_LOGITS)}")
        return profile
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file.name} is not a device profile ({error}); compare it with cpu-x86.toml") from error
