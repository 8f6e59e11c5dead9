"""Making units: a block, or each of its matrices, with the activations that it is tuned on."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from signround_edge.model.decoder import out_in
from signround_edge.model.experts import split_expert
from signround_edge.schemes.roles import writes_to_stream
from signround_edge.tuning.block.compute import compute_context
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.calibration.activations import Stream, fetch, run_block
from signround_edge.tuning.calibration.block_call import Runner, compiled_runner
from signround_edge.tuning.calibration.input_moments import InputMoments, SecondMoments
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.job import Job

FEWEST_TOKENS = 0.005  # of the calibration's, that an expert must have seen to be tuned


def block_matrices(
    job: Job, index: int, importance: dict[str, Tensor], moments: SecondMoments | None = None
) -> list[Matrix]:
    """The quantized matrices of a loaded block, with the weights that are in it.

    Args:
        importance: parameter name → E[x²] f32 [in features].
        moments: which counted the tokens that came to each expert.
    """
    model_type = str(getattr(job.decoder.model.config, "model_type", ""))
    return [
        Matrix(
            name,
            module,
            job.grid(name),
            _as_stored(out_in(module).contiguous(), job.weights.dtype(name)),
            importance[name],
            writes_to_stream(name, model_type),
            _is_below(moments, name, FEWEST_TOKENS * job.tokens.numel()),
            _is_below(moments, name, len(importance[name])),
        )
        for name, module in job.decoder.matrices(index).items()
        if job.run.is_quantized(name)
    ]


def _as_stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight f32 in the checkpoint's dtype, where that holds it exactly."""
    stored = weight.to(dtype)
    return stored if torch.equal(stored.float(), weight) else weight


def _is_below(moments: SecondMoments | None, name: str, tokens: float) -> bool:
    """Whether fewer tokens than that came to the expert that the matrix belongs to, where they were counted."""
    seen = None if moments is None or split_expert(name)[1] is None else moments.tokens(name)
    return seen is not None and seen < tokens


def block_unit(job: Job, shell: Shell, index: int, matrices: list[Matrix], inputs: Stream, target: Tensor) -> Unit:
    """All matrices of a block against the block's exact output.

    Args:
        inputs: what enters the block in the quantized model.
        target: what leaves it in the exact model, f32 or bf16 [samples, seqlen, hidden].
    """
    block = job.decoder.blocks[index]

    def forward(samples: Tensor, runner: Runner | None = None) -> Tensor:
        call = shell.block_call(index, job.own_tokens[samples], job.device)
        return call.run(block, *inputs.at(samples, job.device), runner)

    targets = (lambda samples: fetch(target, samples, job.device).float(), job.token_weights)
    # The number of tokens that come to an expert is another at each step, and would be compiled anew.
    compiles = job.settings.compile_blocks and all(split_expert(m.name)[1] is None for m in matrices)
    compiled = functools.partial(forward, runner=compiled_runner()) if compiles else None
    return Unit(matrices, forward, *targets, *job.own_split(), block, job.ranks, compiled)


def layer_unit(job: Job, shell: Shell, index: int, matrix: Matrix, inputs: Stream) -> Unit:
    """One matrix against its own exact output for the input that the quantized model gives it."""
    seen: list[Tensor] = []
    hook = matrix.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().cpu()))
    run_all(job, shell, index, inputs)
    hook.remove()
    layer_inputs = torch.cat(seen)
    with torch.no_grad(), compute_context(job.settings, [matrix.grid], job.device):
        targets = torch.cat([matrix.module(x.to(job.device)).float().cpu() for x in seen])
    return Unit(
        [replace(matrix, writes_to_stream=False)],  # its own exact output is the target: nothing is inherited
        lambda samples: matrix.module(layer_inputs[samples].to(job.device)),
        lambda samples: targets[samples].to(job.device),
        job.token_weights,
        *job.own_split(),
        matrix.module,
        job.ranks,
    )


def run_all(
    job: Job, shell: Shell, index: int, stream: Stream, moments: InputMoments | None = None, in_place: bool = False
) -> Stream:
    """`stream`, all own samples of it, through block `index`, products in the dtype of its tuning; see `run_block`."""
    grids = [job.grid(name) for name in job.decoder.matrices(index) if job.run.is_quantized(name)]
    autocast = compute_context(job.settings, grids, job.device)
    size = job.settings.batch_size
    return run_block(job.decoder, shell, index, job.own_tokens, stream, size, job.device, autocast, moments, in_place)
