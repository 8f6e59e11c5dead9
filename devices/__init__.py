"""Device profiles: one TOML file per device, shipped in this folder. Copy one to describe another device.

name          as `verify --device` takes it
description   what it stands for, in a phrase
machines      what `platform.machine()` says where the profile runs natively
transport     how a worker is reached: "local"
runtimes      names of the runtimes to run there
memory_budget_mb  memory that an app may take there, in MB (10^6 bytes); may be left out
[tolerances]  the gates of `verify`; see `Tolerances`
"""

from __future__ import annotations

import platform
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from signround_edge.errors import UserError

DEFAULT_DEVICE = "cpu-x86"


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
    machines: tuple[str, ...]
    transport: str
    runtimes: tuple[str, ...]
    tolerances: Tolerances
    memory_budget_mb: int | None = None

    def unavailable(self) -> str | None:
        """Why nothing can run on it here, in one clause; None when it is ready."""
        if self.transport == "local" and platform.machine() not in self.machines:
            return f"this machine is {platform.machine()}, not {' or '.join(self.machines)}"
        return None


def load_devices() -> dict[str, DeviceProfile]:
    """Every shipped profile by name."""
    shipped = sorted((f for f in files(__name__).iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    profiles = [read_profile(file) for file in shipped]
    return {profile.name: profile for profile in profiles}


def get_device(name: str) -> DeviceProfile:
    """The profile of that name; UserError lists the known ones."""
    devices = load_devices()
    if name not in devices:
        raise UserError(f"unknown device {name!r}; known devices are {', '.join(devices)}")
    return devices[name]


def read_profile(file: Traversable) -> DeviceProfile:
    """Read one TOML file; UserError names what is wrong in it."""
    try:
        data: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        tolerances = Tolerances(**{key: float(value) for key, value in data.pop("tolerances").items()})
        data |= {key: tuple(map(str, data[key])) for key in ("machines", "runtimes")}
        return DeviceProfile(**data, tolerances=tolerances)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file.name} is not a device profile ({error}); compare it with cpu-x86.toml") from error
