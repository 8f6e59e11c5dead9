"""Memory and time of tuning one decoder block of a large model, whatever its kind, at random weights.

    python -m benchmarks.block_cost                       # every shape, at 8 × 256 tokens and few steps
    python -m benchmarks.block_cost gpt-oss-20b --scheme gguf:q4_0 --steps 20

A checkpoint with one block of the published sizes (bf16, a vocabulary of 3,072) is tuned by the real command as a child
process: 8 texts of 256 tokens, batches of 4. The peak is of the whole process. Time is CPU time, since machines are
shared. With `--per-step` it is tuned again with a single step: the difference is the price of a step, and what remains
that of everything before (loading, statistics, scale search, GPTQ's codes).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from benchmarks.gpu.models import write_random
from benchmarks.measure import Cost, run_measured
from signround_edge.demo import calibration_text_path

_VOCABULARY = 3072  # of the tokenizer
_SAMPLES, _SEQLEN, _BATCH = 8, 256, 4


def _config(model_type: str, **sizes: object) -> PretrainedConfig:
    shared = {"vocab_size": _VOCABULARY, "max_position_embeddings": 4096, "num_hidden_layers": 1}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return AutoConfig.for_model(model_type, **shared, **tokens, **sizes)


# Sizes as in the published config.json of each model, but for one block and the vocabulary.
SHAPES = {
    "llama-2-7b": _config(
        "llama", hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32
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
        weights: of the block, in millions.
        peak_gb: the largest resident set while it is tuned, in 10^9 bytes.
        cpu_s: CPU seconds of the whole command.
        step_s: CPU seconds a step, where that was measured.
    """

    shape: str
    scheme: str
    steps: int
    weights: float
    peak_gb: float
    cpu_s: float
    step_s: float | None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--scheme", default="gguf:q4_k_m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--per-step", action="store_true", help="tune again with one step")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()
    unknown = [name for name in args.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"{unknown[0]} is none of {', '.join(SHAPES)}")
    rows = []
    for name in args.shapes or SHAPES:
        with tempfile.TemporaryDirectory(prefix="block-cost-", dir=args.folder) as folder:
            rows.append(_measure(name, args.scheme, args.steps, args.per_step, Path(folder)))
        print(json.dumps(asdict(rows[-1])), flush=True)
    print("\n".join(_table(rows)))
    return 0


def _measure(name: str, scheme: str, steps: int, per_step: bool, folder: Path) -> Row:
    write_random(folder / "model", SHAPES[name])
    tuned = _tune(folder, scheme, steps)
    step_s = (tuned.cpu_s - _tune(folder, scheme, 1).cpu_s) / (steps - 1) if per_step else None
    megabytes = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / 1e6
    return Row(
        name,
        scheme,
        steps,
        round(megabytes / 2),
        round(tuned.peak_mb / 1e3, 2),
        round(tuned.cpu_s, 1),
        None if step_s is None else round(step_s, 1),
    )


def _tune(folder: Path, scheme: str, steps: int) -> Cost:
    command = [sys.executable, "-m", "signround_edge.cli", "quantize", str(folder / "model"), "--scheme", scheme]
    command += ["-o", str(folder / f"run-{steps}"), "--calibration", str(calibration_text_path())]
    command += ["--samples", str(_SAMPLES), "--seqlen", str(_SEQLEN), "--batch-size", str(_BATCH)]
    command += ["--steps", str(steps), "--source-check", "off"]
    return run_measured(command, folder / f"steps-{steps}.log")


def _table(rows: list[Row]) -> list[str]:
    head = ["| block of | weights | scheme | steps | peak | CPU s | CPU s a step |", "|---|---|---|---|---|---|---|"]
    return head + [
        f"| {r.shape} | {r.weights:.0f} M | {r.scheme} | {r.steps} | {r.peak_gb} GB | {r.cpu_s} | {r.step_s or '–'} |"
        for r in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
