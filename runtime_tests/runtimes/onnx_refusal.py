"""What a runtime says of a node that it does not run, as one sentence with the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime_tests.transports.interface import WorkerFailure
from signround_edge.errors import UserError, first_line


@contextlib.contextmanager
def refusal_said(artifact: Path, node: Any, way_out: str) -> Iterator[None]:
    """Within, whatever a runtime raises on the weights of `node` (an `onnx_ir.Node`) becomes a UserError.

    A worker that fails as a whole stays a WorkerFailure.
    """
    try:
        yield
    except WorkerFailure:
        raise
    except Exception as error:  # onnxruntime's error classes share no base but Exception
        raise UserError(
            f"{artifact}: the runtime refuses the weights of node {node.name} ({first_line(error)}); {way_out}"
        ) from error
