"""What is tuned together: the matrices of a decoder block, or a single one, and the data they are tuned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from signround_edge.formats import Grid, QuantizedTensor
from signround_edge.model.decoder import set_out_in, set_weight, weight_of
from signround_edge.tuning.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Matrix:
    """One weight matrix to quantize.

    Attributes:
        name: parameter name.
        module: the nn.Linear (or Conv1D) whose weight is tuned.
        grid: target grid.
        weight: original weight [out, in], in 16 bits where the checkpoint has it so: of large blocks it is kept long.
        importance: E[x²] f32 [in].
        writes_to_stream: whether its output is added to the residual stream as it is.
        seldom: it is an expert's that hardly any token came to: tuning would fit these few, so it is left out.
        underdetermined: it is an expert's that fewer tokens came to than it has inputs.
    """

    name: str
    module: nn.Module
    grid: Grid
    weight: Tensor
    importance: Tensor
    writes_to_stream: bool = False
    seldom: bool = False
    underdetermined: bool = False

    @property
    def exact(self) -> Tensor:
        """The original weight f32 [out, in]."""
        return self.weight.float()

    def install(self, weight: Tensor) -> None:
        """Put a weight [out, in] into the module."""
        set_out_in(self.module, weight)


@dataclass(frozen=True)
class Unit:
    """What is tuned together, and the data it is tuned on.

    Attributes:
        matrices: the matrices of the unit.
        forward: sample indices [n] → the unit's output f32 [n, seqlen, features] for the quantized model's inputs.
        target: sample indices [n] → the full-precision output, same shape.
        token_weights: full-precision output → weights of the tokens' squared errors [n, seqlen, 1].
        train, held_out: sample indices; of several ranks each has its own samples.
        module: what `forward` runs: the block, or the matrix's own module.
        ranks: the processes among which the samples are spread.
        train_forward: `forward` as the steps take it; None: the same.
    """

    matrices: list[Matrix]
    forward: Callable[[Tensor], Tensor]
    target: Callable[[Tensor], Tensor]
    token_weights: Callable[[Tensor], Tensor]
    train: Tensor
    held_out: Tensor
    module: nn.Module
    ranks: Ranks = ALONE
    train_forward: Callable[[Tensor], Tensor] | None = None

    def install(self, tensors: dict[str, QuantizedTensor], dtype: torch.dtype = torch.float32) -> None:
        """Put the dequantized weights into the modules.

        Args:
            tensors: by matrix name.
            dtype: that of the products, so that the weights take no more memory and are not converted at every call.
        """
        for matrix in self.matrices:
            matrix.install(tensors[matrix.name].dequantize().to(dtype))

    def release(self) -> None:
        """Give the memory of the modules' weights back; `install` fills them again."""
        for matrix in self.matrices:
            set_weight(matrix.module, weight_of(matrix.module).to("meta"))
