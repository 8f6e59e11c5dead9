"""Where each parameter of a run lies in a GGUF file: its name there and the order of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf

from exporters.gguf.families.family import TEMPLATE_HINT
from exporters.gguf.families.row_orders import Config, RowOrder
from exporters.gguf.families.table import family_of, row_order
from signround_edge.errors import UserError
from signround_edge.model.experts import stacks
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.gguf_names import name_table

_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Placement:
    """One tensor of the file, made of one parameter of the run, or of one matrix of each expert of a layer.

    Attributes:
        gguf_name: the tensor's name in the file.
        hf_names: the parameter's name in the run (for tied parameters: the one that holds the data); several are
            experts, stacked in this order.
        rows: stored row i is the parameter's row rows[i]; None when the order is the same.
        added: a constant that the file's convention adds (Gemma stores 1 + norm weight).
    """

    gguf_name: str
    hf_names: tuple[str, ...]
    rows: RowOrder | None = None
    added: float = 0.0

    def shape(self, run: RunDirectory) -> tuple[int, ...]:
        """Shape of the tensor, rows first: [n], [rows, values a row] or [experts, rows, values a row]."""
        one = run.entry(self.hf_names[0]).out_in_shape
        return one if len(self.hf_names) == 1 else (len(self.hf_names), *one)


def builtin_placements(run: RunDirectory, config: Config) -> list[Placement]:
    """Placement of every parameter, for the built-in families. UserError when one has no place.

    Args:
        config: as `canonical_config` gives it.
    """
    family = family_of(config)
    names = name_table(family.arch, int(config["num_hidden_layers"]))
    placements = []
    for stack, hf_names in stacks(run.names()).items():
        hf_name = hf_names[0]
        spellings = (names.get_name(spelling, try_suffixes=_SUFFIXES) for spelling in _spellings(stack))
        gguf_name = next(filter(None, spellings), None)
        if gguf_name is None or hf_name.endswith(family.without):
            raise UserError(
                f"parameter {hf_name} has no place in llama.cpp's {family.model_type} architecture; {TEMPLATE_HINT}"
            )
        rows = row_order(family, config, hf_name, run.entry(hf_name).out_in_shape[0])
        added = family.norm_added if hf_name.endswith("norm.weight") else 0.0
        placements.append(Placement(gguf_name, tuple(hf_names), rows, added))
    return placements


def candidate_names(run: RunDirectory, block_count: int, arch: str) -> dict[str, tuple[str, ...]]:
    """GGUF name → HF names (see `Placement`) that a template of architecture `arch` may use, tied ones included."""
    archs = [known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    maps = [name_table(known, block_count) for known in archs]
    found: dict[str, tuple[str, ...]] = {}
    for stack, data_names in _with_tied(run):
        for names in maps:
            for spelling in _spellings(stack):
                gguf_name = names.get_name(spelling, try_suffixes=_SUFFIXES)
                if gguf_name is not None:
                    found.setdefault(gguf_name, data_names)
    return found


def _with_tied(run: RunDirectory) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, names of the parameters that hold its data); for experts, the name without a number."""
    yield from ((stack, tuple(names)) for stack, names in stacks(run.names()).items())
    yield from ((name, (owner,)) for name, owner in run.manifest.tied.items())


def _spellings(hf_name: str) -> list[str]:
    """The name itself, and as base models (without a head on top) spell it."""
    known = ("model.", "transformer.", "gpt_neox.", "language_model.")
    bare = next((hf_name.removeprefix(prefix) for prefix in known if hf_name.startswith(prefix)), hf_name)
    return list(dict.fromkeys([hf_name, bare, f"model.{bare}", f"transformer.{bare}"]))
