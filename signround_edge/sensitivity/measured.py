"""What the pass over a model finds: how much each tensor matters, in vectors; and how it is kept in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.files import whole_file

_SEPARATOR = "#"


@dataclass(frozen=True)
class MatrixSensitivity:
    """Of a matrix in a block.

    Attributes:
        outputs: E[g²] f32 [out features] over all tokens, g the slope of a text's log-likelihood, summed over its
            tokens, whose labels are drawn from the model itself.
        inputs: E[x²] f32 [in features], by which tuning searches scales.
        conditional: f32 [in features]; see `conditional_variances`.
    """

    outputs: Tensor
    inputs: Tensor
    conditional: Tensor


@dataclass(frozen=True)
class HeadSensitivity:
    """Of the output head: Fisher's matrix at the logits as it is, diag(p) − p·pᵀ, for some tokens and rows.

    Attributes:
        inputs: E[x²] f32 [in features].
        sample: what the head read of some tokens, f32 [tokens, in features].
        rows: numbers of the rows that stand for all, int64 [n].
        probabilities: of these rows' tokens, each for all that it stands for, f32 [tokens, n]; 1 together.
        slopes: ∂logit/∂output, f32 [tokens, n], or [1, 1] where it is one number for all.
    """

    inputs: Tensor
    sample: Tensor
    rows: Tensor
    probabilities: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class LookupSensitivity:
    """Of a table that is looked up by token.

    Attributes:
        outputs: E[g²] f32 [features of a row].
        frequencies: share of the calibration's tokens that each row is looked up for, f32 [rows].
    """

    outputs: Tensor
    frequencies: Tensor


@dataclass(frozen=True)
class Measured:
    """Of a whole model; dictionaries are by parameter name.

    Attributes:
        matrices: those of the decoder blocks.
        head: of the output head.
        lookups: of the token embedding and what else is looked up by token.
        labels: the tokens that were drawn, int64 [samples, seqlen].
    """

    matrices: dict[str, MatrixSensitivity]
    head: HeadSensitivity
    lookups: dict[str, LookupSensitivity]
    labels: Tensor

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all."""
        named = [("matrix", name, found) for name, found in self.matrices.items()]
        rest = [("head", "", self.head), *(("lookup", name, found) for name, found in self.lookups.items())]
        flat = {"labels": self.labels}
        for kind, name, found in [*named, *rest]:
            flat |= {_SEPARATOR.join((kind, name, key)): t.contiguous() for key, t in vars(found).items()}
        with whole_file(path) as partial:
            save_file(flat, partial)

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read it again; UserError when the file is damaged."""
        try:
            flat = load_file(path)
            found: dict[str, dict[str, dict[str, Tensor]]] = {"matrix": {}, "head": {}, "lookup": {}}
            labels = flat.pop("labels")
            for key, tensor in flat.items():
                kind, name, attribute = key.split(_SEPARATOR)
                found[kind].setdefault(name, {})[attribute] = tensor
            return cls(
                {name: MatrixSensitivity(**parts) for name, parts in found["matrix"].items()},
                HeadSensitivity(**found["head"][""]),
                {name: LookupSensitivity(**parts) for name, parts in found["lookup"].items()},
                labels,
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, and it will be measured again") from error
