"""Where a runtime is known to compute a model a little otherwise: transformers' model of another config.json.

An artifact is then compared with that, so that all else in it is proved as of any other; what the difference alone
costs is measured beside it, and must be no more than what rounding activations may cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from signround_edge.evaluation.metrics import Scores
from signround_edge.evaluation.perplexity import TorchSession
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.model.config import write_config
from signround_edge.run_directory import RunDirectory


def session_of(run: RunDirectory, computes: dict[str, Any], folder: Path) -> TorchSession:
    """The run's weights in transformers' model with some entries of config.json replaced; it is written to `folder`."""
    config = {**run.config, **computes}
    write_config(folder, {name: value for name, value in config.items() if value is not None})
    return TorchSession(load_run_model(run, config_dir=folder))


def said(computes: dict[str, Any], config: dict[str, Any], cost: Scores) -> str:
    """What was compared, and what that costs, for a report.

    Args:
        computes: the entries.
        config: config.json of the run.
        cost: of that model beside the run's own.
    """
    entries = [entry for name, value in computes.items() for entry in _differing(name, value, config.get(name))]
    return (
        f"the runtime is known to compute this model with {', '.join(entries)}, and was compared with transformers' "
        f"model of that; the difference is a mean KL divergence of {cost.kld_mean:.2g} from the run's"
    )


def _differing(name: str, value: object, before: object) -> list[str]:
    if isinstance(value, dict):
        old = before if isinstance(before, dict) else {}
        return [f"{key} {entry}" for key, entry in value.items() if old.get(key) != entry]
    return [] if value is None else [f"{name} {value}"]
