"""What every route to a graph ends in, and the passes of those that match weights by value."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.onnx.bindings import Binding
from exporters.onnx.options import OnnxOptions
from exporters.onnx.passes.accuracy_level import set_accuracy_level
from exporters.onnx.passes.half_weights import halve_weights
from exporters.onnx.passes.matched_weights import set_matched_weights
from exporters.onnx.run_weights import RunWeights
from signround_edge.run_directory import RunDirectory

MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class FinishedGraph:
    """A graph that holds the run's weights, ready to be written.

    Attributes:
        model: the graph.
        bindings: what it holds of the run.
        made_by: who made the graph, for the provenance.
        kv_cache: it has a key-value cache.
    """

    model: ir.Model
    bindings: list[Binding]
    made_by: str
    kv_cache: bool


def replace_weights(
    model: ir.Model, matched: list[Binding], weights: RunWeights, options: OnnxOptions, keep_names: bool = False
) -> list[Binding]:
    """Put the run's weights in the place of a float graph's; returns what the finished graph holds.

    Args:
        model: edited in place.
        matched: what `matching` found in it.
        weights: the run.
        options: of the export.
        keep_names: see `set_matched_weights`.
    Raises:
        UserError: see `set_matched_weights`.
    """
    bindings = set_matched_weights(model, matched, weights, options.dtype is not None, keep_names)
    set_accuracy_level(model.graph, options.accuracy_level)
    common.RemoveUnusedNodesPass()(model)
    if options.dtype == "f16":
        halve_weights(model.graph, bindings, weights)
    return bindings


def copy_config_files(run: RunDirectory, folder: Path) -> None:
    """Copy the run's config and tokenizer files into a folder, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run.config_dir, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
