"""What `verify` expects of an artifact of whose format it knows nothing but the exporter: the run's weights.

No control can be made of it, so the runtime's figures pass by the gate for runtimes that round activations. A package
that knows its format better says more; see `runtime_tests.artifacts.lookup`.
"""

from __future__ import annotations

from pathlib import Path

from runtime_tests.artifacts.expectation import Expectation
from signround_edge.plugins import exporter_of
from signround_edge.run_directory import RunDirectory

_NOTE = "its format has no control that computes in floats: its graph is judged by these figures alone"


def expect_weights(run: RunDirectory, artifact: Path, _folder: Path) -> Expectation:
    """The run's weights, by the artifact's own exporter; errors as `Exporter.iter_expected` says."""
    expected = {tensor.name: tensor.weights for tensor in exporter_of(artifact).iter_expected(run, artifact)}
    return Expectation(
        expected,
        computes_in_floats=False,
        open_control=None,
        open_float_graph=lambda runtime: runtime.open(artifact),
        notes=[_NOTE],
    )
