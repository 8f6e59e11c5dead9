"""onnxruntime-web's WebGPU provider, in a browser.

ONNX Runtime gives what that provider cannot run to its CPU provider, node by node and without a word; the session says
nothing of it. So the page reads where each node went from the log (`javascript/placements.mjs`), and a graph of which
WebGPU does not compute every float is refused here. What may stay on the CPU are the integers that ONNX Runtime itself
prefers there: lengths and shapes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from runtime_tests.runtimes.onnx_javascript import OnnxRuntimeWeb, external_files
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.setup.npm import ONNXRUNTIME_WEB
from runtime_tests.transports.pages.browser import ChromiumTransport
from runtime_tests.worker.onnxruntime_engine import decoder_config, model_file
from signround_edge.errors import UserError

_CPU = "CPUExecutionProvider"
_WEBGPU = "WebGpuExecutionProvider"
_SHOWN = 6
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


class WebGpuSession(WorkerSession):
    """A session that knows where its nodes are.

    Attributes:
        notes: the adapter, and how many nodes WebGPU and the CPU run.
    """

    @property
    def notes(self) -> list[str]:
        """For the report."""
        adapter, placed = self.facts["adapter"], self.facts["placements"]
        kind = "in software" if adapter["software"] else "a graphics card"
        half = "with" if adapter["shader_f16"] else "without"
        on_cpu = placed.get(_CPU, [])
        notes = [
            f"WebGPU adapter: {adapter['name']} ({kind}, {half} shader-f16); {len(placed.get(_WEBGPU, []))} nodes on it"
            + (f", {len(on_cpu)} of integers on the CPU ({_counted(on_cpu)})" if on_cpu else ", none on the CPU")
        ]
        if adapter["subgroups_left_out"]:
            notes.append(
                "its subgroups have fewer than 8 threads, with which onnxruntime-web's attention is wrong; they are "
                "switched off here, and an app on such an adapter must do the same"
            )
        return notes


@dataclass(frozen=True)
class OnnxRuntimeWebGpu(OnnxRuntimeWeb):
    """onnxruntime-web with the execution provider webgpu."""

    name = "onnxruntime-webgpu"

    def unavailable(self) -> str | None:
        """Why it cannot run there, with the way out; None when it can."""
        if not isinstance(self.transport, ChromiumTransport):
            return "it runs in a browser with WebGPU only (--device browser-webgpu)"
        return self.transport.unavailable() or ONNXRUNTIME_WEB.missing_with_way_out()

    def open(self, artifact: Path, accuracy_level: int | None = None) -> WorkerSession:
        """Load a folder or .onnx file. UserError when WebGPU cannot run some of it."""
        model = model_file(artifact)
        options = {"model": model.name, "external": external_files(model), "decoder": decoder_config(model.parent)}
        session = WebGpuSession(self.name, self.transport, model.parent, self.timeout, options, self.digest)
        left_out = floats_on_cpu(model, session.facts["placements"])
        if left_out:
            session.close()
            raise UserError(
                f"{artifact}: WebGPU does not run {len(left_out)} of its nodes ({_counted(left_out)}), such as "
                f"{left_out[0][1]}; onnxruntime-web computes them on the CPU instead, so this is no verdict on WebGPU"
            )
        return session


def floats_on_cpu(model: Path, placements: dict[str, list[Any]]) -> list[tuple[str, str]]:
    """(operator, name) of the nodes on the CPU that are not known to give integers only.

    Args:
        model: the .onnx file.
        placements: provider → [operator, name] of its nodes, after ONNX Runtime's fusions: a node that the file does
            not have counts.
    """
    from exporters.onnx.artifact.reader import open_model

    nodes = {node.name: node for node in open_model(model).graph}
    found = []
    for operator, name in placements.get(_CPU, []):
        node = nodes.get(name)
        if node is None or not all(output.dtype in _INTEGERS for output in node.outputs):
            found.append((operator, name))
    return found


def _counted(nodes: list[Any]) -> str:
    counts = Counter(operator for operator, _ in nodes).most_common()
    shown = [f"{count} {operator}" if count > 1 else operator for operator, count in counts[:_SHOWN]]
    return ", ".join([*shown, "…"] if len(counts) > _SHOWN else shown)
