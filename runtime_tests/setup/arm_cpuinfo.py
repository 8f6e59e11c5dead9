"""The /proc/cpuinfo of an emulated ARM core.

qemu's user mode shows the host's /proc/cpuinfo. ONNX Runtime reads it on import and dies of a file without ARM's
fields, so the emulated root gets one that fits the core.
"""

from __future__ import annotations

import os
from pathlib import Path

from runtime_tests.setup.arm64_python import Arm64Python
from runtime_tests.setup.cache import cache_folder, fill

# qemu's name → (part number of ARM's MIDR register, features as Linux names them)
_ARMV8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_ARMV8_2 = _ARMV8_0 + " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
_CORES = {
    "cortex-a35": (0xD04, _ARMV8_0),
    "cortex-a53": (0xD03, _ARMV8_0),
    "cortex-a57": (0xD07, _ARMV8_0),
    "cortex-a72": (0xD08, _ARMV8_0),
    "cortex-a76": (0xD0B, _ARMV8_2),
    "neoverse-n1": (0xD0C, _ARMV8_2),
}
_NEWEST = (0xD41, _ARMV8_2 + " sha3 sha512 jscvt fcma i8mm bf16")  # Cortex-A78: what "max" comes nearest to


def emulated_root(python: Arm64Python, cpu: str) -> Path:
    """A root folder for `qemu -L`: links to the unpacked system, and a /proc/cpuinfo of that core."""

    def make(folder: Path) -> None:
        for entry in python.folder.iterdir():
            (folder / entry.name).symlink_to(entry)
        (folder / "proc").mkdir()
        (folder / "proc" / "cpuinfo").write_text(cpuinfo(cpu))

    return fill(cache_folder() / "debian" / f"{python.folder.name}-{cpu}", make)


def cpuinfo(cpu: str, cores: int = os.cpu_count() or 1) -> str:
    """Contents of the file, one stanza a core."""
    part, features = _CORES.get(cpu, _NEWEST)
    lines = ("BogoMIPS\t: 48.00", f"Features\t: {features}", "CPU implementer\t: 0x41", "CPU architecture: 8")
    rest = (*lines, "CPU variant\t: 0x1", f"CPU part\t: {part:#05x}", "CPU revision\t: 0")
    return "".join("\n".join((f"processor\t: {core}", *rest)) + "\n\n" for core in range(cores))
