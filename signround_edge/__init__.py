"""signround-edge: SignRound-tuned 2- to 8-bit weights, exact on the grids of GGUF and ONNX Runtime.

What a program imports is here, in the words of the command line, and loaded when it is first used: `quantize`,
`plan`, `export`, `verify`, `inspect`, `evaluate`; `RunDirectory`, `TuningSettings`, `RECIPES`, `Progress`; `UserError`,
`CheckFailed`. docs/api.md has the whole chain as one program.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from signround_edge.api import evaluate, export, inspect, plan, quantize, verify
    from signround_edge.errors import CheckFailed, UserError
    from signround_edge.progress import Progress
    from signround_edge.run_directory import RunDirectory
    from signround_edge.tuning.settings import RECIPES, TuningSettings

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "CheckFailed",
    "Progress",
    "RunDirectory",
    "TuningSettings",
    "UserError",
    "__version__",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "quantize",
    "verify",
]

_MODULES = {
    "RECIPES": "tuning.settings",
    "TuningSettings": "tuning.settings",
    "CheckFailed": "errors",
    "UserError": "errors",
    "Progress": "progress",
    "RunDirectory": "run_directory",
} | dict.fromkeys(("evaluate", "export", "inspect", "plan", "quantize", "verify"), "api")


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for: torch alone takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
