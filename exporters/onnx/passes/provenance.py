"""Say in the model file itself where its weights come from."""

from __future__ import annotations

import onnx_ir as ir

import signround_edge
from exporters.onnx.run_weights import RunWeights
from signround_edge.files import sha256_of

# The line is padded, so that the model file's size is known before anything was checked.
_CHECK_WIDTH = 200


def provenance(weights: RunWeights, graph_builder: str) -> dict[str, str]:
    """What model file and `signround_edge.json` both say: version, scheme, manifest, source check, builder."""
    run = weights.run
    return {
        "version": signround_edge.__version__,
        "scheme": run.manifest.scheme,
        "manifest_sha256": sha256_of(run.path / "manifest.json"),
        "source_check": run.manifest.source_line,
        "graph_builder": graph_builder,
    }


def set_provenance(model: ir.Model, facts: dict[str, str]) -> None:
    """Write them to metadata_props under `signround_edge.…`; the builder puts the git commit of its folder there."""
    facts = {**facts, "source_check": facts["source_check"].ljust(_CHECK_WIDTH)}
    model.producer_name, model.producer_version = "signround-edge", signround_edge.__version__
    for key, value in facts.items():
        model.metadata_props[f"signround_edge.{key}"] = value
