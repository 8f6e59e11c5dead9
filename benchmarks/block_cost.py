"""Memory and time of tuning one decoder block of a large model, whatever its kind, at random weights.

    python -m benchmarks.block_cost                       # every shape, at 8 × 256 tokens and few steps
    python -m benchmarks.block_cost gpt-oss-20b --scheme gguf:q4_0 --steps 20
    python -m benchmarks.block_cost llama-3-8b --layers 4 --samples 128 --seqlen 512 --batch-size 8

A checkpoint with one block (or `--layers`) of the published sizes (bf16, a vocabulary of 3,072) is tuned by the real
command as a child process: 8 texts of 256 tokens, batches of 4. The peak is of the whole process, and what `quantize`
has estimated stands beside it. With `--per-step` it is tuned again with a single step: the difference in CPU time is
the price of a step, and what remains that of everything before (loading, statistics, scale search, GPTQ's codes).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from benchmarks.gpu.models import write_random
from benchmarks.measure import Cost, run_measured
from signround_edge.demo import calibration_text_path
from signround_edge.tuning.cost.record import COSTS_FILE

_VOCABULARY = 3072  # of the tokenizer


def _config(model_type: str, **sizes: object) -> PretrainedConfig:
    shared = {"vocab_size": _VOCABULARY, "max_position_embeddings": 4096, "num_hidden_layers": 1}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return AutoConfig.for_model(model_type, **shared, **tokens, **sizes)


# Sizes as in the published config.json of each model, but for one block and the vocabulary.
SHAPES = {
    "llama-2-7b": _config(
        "llama", hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32
    ),
    "llama-3-8b": _config(
        "llama", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    ),
    "llama-3-70b": _config(
        "llama", hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8
    ),
    "gpt-oss-20b": _config(
        "gpt_oss",
        hidden_size=2880,
        intermediate_size=2880,
        num_local_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        layer_types=["full_attention"],
    ),
    "qwen3-30b-a3b": _config(
        "qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    ),
    "gemma-4-e4b": _config(
        "gemma4_text",
        hidden_size=2560,
        intermediate_size=10240,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=_VOCABULARY,
        num_kv_shared_layers=0,
        layer_types=["full_attention"],
        per_layer_config={"0": {"head_dim": 512}},
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Row:
    """What a block costs.

    Attributes:
        layers: how many blocks the model has.
        tokens: samples × tokens a sample, samples a step.
        weights: of the model, in millions.
        peak_gb: the largest resident set while it is tuned, in 10^9 bytes.
        estimated_gb: what `quantize` said before.
        cpu_s: CPU seconds of the whole command.
        wall_s, estimated_s: seconds of tuning, and what `quantize` said before.
        step_s: CPU seconds a step, where that was measured.
    """

    shape: str
    scheme: str
    layers: int
    tokens: str
    steps: int
    weights: float
    peak_gb: float
    estimated_gb: float
    cpu_s: float
    wall_s: float
    estimated_s: float
    step_s: float | None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--scheme", default="gguf:q4_k_m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-memory", help="passed on to `quantize`")
    parser.add_argument("--per-step", action="store_true", help="tune again with one step")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()
    unknown = [name for name in args.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"{unknown[0]} is none of {', '.join(SHAPES)}")
    rows = []
    for name in args.shapes or SHAPES:
        with tempfile.TemporaryDirectory(prefix="block-cost-", dir=args.folder) as folder:
            rows.append(_measure(name, args, Path(folder)))
        print(json.dumps(asdict(rows[-1])), flush=True)
    print("\n".join(_table(rows)))
    return 0


def _measure(name: str, args: argparse.Namespace, folder: Path) -> Row:
    config = copy.deepcopy(SHAPES[name])
    config.num_hidden_layers = args.layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * args.layers
    write_random(folder / "model", config)
    tuned, session = _tune(folder, args, args.steps)
    step_s = (tuned.cpu_s - _tune(folder, args, 1)[0].cpu_s) / (args.steps - 1) if args.per_step else None
    megabytes = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / 1e6
    spent, estimate = session["spent"], session["estimate"]
    return Row(
        name,
        args.scheme,
        args.layers,
        f"{args.samples} × {args.seqlen}, {args.batch_size}",
        args.steps,
        round(megabytes / 2),
        round(tuned.peak_mb / 1e3, 2),
        round(estimate["peak_bytes"] / 1e9, 2),
        round(tuned.cpu_s, 1),
        round(spent["seconds"]),
        round(estimate["seconds"]),
        None if step_s is None else round(step_s, 1),
    )


def _tune(folder: Path, args: argparse.Namespace, steps: int) -> tuple[Cost, dict[str, Any]]:
    """What the command cost, and what it says of that itself."""
    run = folder / f"run-{steps}"
    command = [sys.executable, "-m", "signround_edge.cli", "quantize", str(folder / "model"), "--scheme", args.scheme]
    command += ["-o", str(run), "--calibration", str(calibration_text_path())]
    for option in ("samples", "seqlen", "batch_size"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    command += ["--steps", str(steps), "--source-check", "off"]
    command += ["--max-memory", args.max_memory] if args.max_memory else []
    cost = run_measured(command, folder / f"steps-{steps}.log")
    return cost, json.loads((run / COSTS_FILE).read_text())["sessions"][-1]


def _table(rows: list[Row]) -> list[str]:
    head = (
        "blocks of", "layers", "weights", "scheme", "tokens, samples a step", "steps", "peak, GB", "estimated",
        "CPU s", "s of tuning", "estimated", "CPU s a step",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for r in rows:
        cells = (
            r.shape, r.layers, f"{r.weights:.0f} M", r.scheme, r.tokens, r.steps, r.peak_gb, r.estimated_gb, r.cpu_s,
            r.wall_s, r.estimated_s, r.step_s or "–",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
