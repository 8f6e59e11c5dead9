"""The tables of a run: which columns each has, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the rows.
        head: with the unit.
    """

    key: str
    head: str


@dataclass(frozen=True)
class Table:
    """Rows of one kind.

    Attributes:
        title: of its section.
        note: how to read it.
    """

    title: str
    note: str
    columns: tuple[Column, ...]


def _columns(*pairs: tuple[str, str]) -> tuple[Column, ...]:
    return tuple(Column(key, head) for key, head in pairs)


_BLOCK = (("block", "block"), ("format", "format"))
_APART = (
    ("codes_percent", "codes that differ, %"),
    ("largest", "largest difference, codes"),
    ("scales_percent", "blocks with other scales, %"),
)
_WHY = ("why", "why")

TABLES: dict[str, Table] = {
    "parts": Table(
        "Parts",
        "In the order in which they ran. Expected times are guesses that the budget is spent by.",
        _columns(("what", "part"), ("state", "state"), ("expected_s", "expected, s"), ("took_s", "took, s")),
    ),
    "machine": Table("Machine", "", _columns(("what", "what"), ("value", "value"))),
    "products": Table(
        "Ceiling: matrix products",
        "Median of ten repeats on random values.",
        _columns(("what", "product"), ("dtype", "dtype"), ("ms", "time, ms"), ("tflops", "TFLOP/s")),
    ),
    "copies": Table(
        "Ceiling: copies",
        "",
        _columns(("what", "copy"), ("megabytes", "moved, MB"), ("gb_s", "GB/s")),
    ),
    "search": Table(
        "Check: scale search, the CPU against the device",
        "As with --steps 0, on matrices of tiny-llama, the worst of them; the error is Σ E[x²]·(w − ŵ)².",
        _columns(("format", "grid"), *_APART, _WHY),
    ),
    "gptq": Table(
        "Check: GPTQ's codes, the CPU against the device",
        "From the same weight, scales and hessian; the error is tr(ΔW·H·ΔWᵀ). One code rounded otherwise changes all "
        "that come after it in its row. The loop is the device's own, column by column; on a GPU the others are the "
        "kernel's.",
        _columns(("format", "grid"), ("damping", "damping"), *_APART, _WHY),
    ),
    "sign_step": Table(
        "Check: three sign steps, the CPU against the device",
        "From the same state by the same gradients, not compiled.",
        _columns(
            ("format", "grid"),
            *_APART,
            ("v_apart", "V, largest difference"),
            ("weights_percent", "weights that differ, %"),
            ("off_grid_percent", "weights off the grid, %"),
            _WHY,
        ),
    ),
    "compiled": Table(
        "Check: three sign steps, compiled against not compiled, on the device",
        "",
        _columns(
            ("format", "grid"),
            *_APART,
            ("v_apart", "V, largest difference"),
            ("weights_percent", "weights that differ, %"),
            ("off_grid_percent", "weights off the grid, %"),
            _WHY,
        ),
    ),
    "tuned": Table(
        "Check: `tune_unit` on two matrices of a block of tiny-llama, the CPU against the device",
        "From GPTQ's start through three steps. Losses are of the held-out samples.",
        _columns(
            ("format", "grid"),
            ("dtype", "compute dtype"),
            ("start_codes_percent", "codes that differ at the start, %"),
            *_APART,
            ("rounded_cpu", "loss rounded, CPU"),
            ("rounded_device", "device"),
            ("start_cpu", "loss at the start, CPU"),
            ("start_device", "device"),
            ("tuned_cpu", "loss tuned, CPU"),
            ("tuned_device", "device"),
            _WHY,
        ),
    ),
    "runs": Table(
        "Check: whole runs",
        "",
        _columns(("what", "what"), ("outcome", "outcome"), ("as_expected", "as expected")),
    ),
    "steps": Table(
        "One step, section by section",
        "The device is idle between sections, so each has its host's time, too. FLOPs are of the forward and the "
        "backward pass by `Shape.step_flops`, and beside torch's flop counter; TFLOP/s are theirs in these two "
        "sections.",
        _columns(
            *_BLOCK,
            ("dtype", "compute dtype"),
            ("tokens", "tokens"),
            ("step_tflop", "TFLOP"),
            ("counted_over_formula", "counted / formula"),
            ("arguments_ms", "block arguments, ms"),
            ("inputs_ms", "inputs copied, ms"),
            ("targets_ms", "targets copied, ms"),
            ("forward_ms", "forward, ms"),
            ("loss_ms", "loss, ms"),
            ("backward_ms", "backward, ms"),
            ("update_ms", "sign step, ms"),
            ("sum_ms", "sum, ms"),
            ("tflops", "TFLOP/s"),
            ("of_ceiling_percent", "of the ceiling, %"),
            ("first_update_s", "first sign step, s"),
        ),
    ),
    "compiled_block": Table(
        "Forward and backward pass, compiled",
        "With `--compile-blocks`, beside operator by operator; median of ten.",
        _columns(
            *_BLOCK,
            ("compile_s", "compiling, s"),
            ("plain_ms", "as it is, ms"),
            ("compiled_ms", "compiled, ms"),
            ("compiled_over_plain", "compiled / as it is"),
            ("tflops", "TFLOP/s, compiled"),
        ),
    ),
    "sign_steps": Table(
        "The sign step of a matrix",
        "GB/s are of the bytes that it must at least read or write: the weight's position, V twice, gradient and ŵ.",
        _columns(
            *_BLOCK,
            ("what", "matrix"),
            ("count", "of them"),
            ("compiled_ms", "compiled, ms"),
            ("eager_ms", "not compiled, ms"),
            ("gb_s", "the faster, GB/s"),
        ),
    ),
    "where": Table(
        "Where the time of a block goes",
        "`tune_unit` as it is, without anything between its steps; TFLOP/s are of whole steps. Shares are of a block "
        "at the default 200 steps and 3 checks, for the samples measured here. Losses are of random weights.",
        _columns(
            *_BLOCK,
            ("dtype", "compute dtype"),
            ("samples", "samples × tokens"),
            ("steps", "steps"),
            ("pass_s", "all samples once, s"),
            ("start_s", "start, s"),
            ("compile_s", "compiling, s"),
            ("graphs", "graphs compiled"),
            ("step_ms", "step, ms"),
            ("tflops", "TFLOP/s"),
            ("of_ceiling_percent", "of the ceiling, %"),
            ("check_s", "held-out loss, s"),
            ("rest_s", "rest, s"),
            ("total_s", "total, s"),
            ("start_percent", "start, % of a block"),
            ("steps_percent", "steps, %"),
            ("copies_percent", "of them copies, %"),
            ("checks_percent", "held-out losses, %"),
            ("rest_percent", "rest, %"),
            ("loss_rounded", "loss rounded"),
            ("loss_start", "at the start"),
            ("loss_tuned", "tuned"),
        ),
    ),
    "kernels": Table(
        "What a step launches",
        "By torch's profiler, a step; shares are of a step's time without the profiler.",
        _columns(
            *_BLOCK, ("what", "kernel"), ("count", "launches"), ("ms", "ms"), ("of_step_percent", "of the step, %")
        ),
    ),
    "start": Table(
        "The start, piece by piece",
        "Of one matrix of each shape, and of the block. GPTQ's time is of both dampings, their factors included, by "
        "the kernel where the device takes that, and by the loop over columns; "
        "hessians and drift are one pass over the training samples each, and more.",
        _columns(
            *_BLOCK,
            ("what", "matrix"),
            ("count", "of them"),
            ("search_s", "scale search, s"),
            ("factor_s", "Cholesky factors, s"),
            ("gptq_s", "GPTQ, s"),
            ("loop_s", "by the loop, s"),
            ("hessians_s", "hessians, s"),
            ("drift_s", "drift correction besides, s"),
            ("loss_s", "a held-out loss, s"),
            ("sum_s", "sum, s"),
            ("steps_100", "in 100 steps of it"),
        ),
    ),
    "memory": Table(
        "Peaks of memory while a block is tuned",
        "GB are 10^9 bytes; on the device what is allocated, before the first step and from it on. The host's is the "
        "whole process.",
        _columns(
            *_BLOCK,
            ("weights_gb", "weights as f32, GB"),
            ("start_gb", "device, start, GB"),
            ("steps_gb", "device, steps, GB"),
            ("start_bytes_a_weight", "start, bytes a weight"),
            ("steps_bytes_a_weight", "steps, bytes a weight"),
            ("reserved_gb", "device, reserved, GB"),
            ("host_before_gb", "host before, GB"),
            ("host_gb", "host, GB"),
            ("activations_gb", "of it activations, GB"),
        ),
    ),
    "whole": Table(
        "A whole model",
        "`signround_edge.quantize` with the recipe `fast`, random weights. The first block's time includes embedding "
        "all samples and, on a GPU, compiling.",
        _columns(
            ("what", "model"),
            ("format", "scheme"),
            ("samples", "samples × tokens"),
            ("steps", "steps"),
            ("wall_s", "wall, s"),
            ("first_block_s", "until the first block is done, s"),
            ("block_s", "each block after, s"),
            ("outside_s", "outside the blocks, s"),
            ("device_gb", "device, GB"),
            ("host_gb", "host, GB"),
            ("last_line", "last report"),
        ),
    ),
    "peer": Table(
        "The same block through auto-round",
        "By the difference of runs with few and with more steps.",
        _columns(
            *_BLOCK,
            ("samples", "samples × tokens"),
            ("step_ms", "step, ms"),
            ("tflops", "TFLOP/s"),
            ("of_ceiling_percent", "of the ceiling, %"),
            ("besides_s", "besides the steps, s"),
            ("device_gb", "device, GB"),
            ("host_gb", "host, GB"),
            _WHY,
        ),
    ),
}
