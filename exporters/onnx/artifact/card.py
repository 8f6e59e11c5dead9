"""README.md of an exported folder: what it holds, at which accuracy level it computes, and how to run it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from exporters.interface import LevelCost
from exporters.onnx.artifact.reader import read_tensors

CARD = "README.md"

_LEVELS = {
    0: "0: ONNX Runtime chooses how MatMulNBits computes, which on CPUs is f32",
    1: "1: MatMulNBits computes in f32",
    4: "4: MatMulNBits rounds its inputs to int8, which is faster on most CPUs and less exact",
}


def write_card(
    folder: Path, facts: dict[str, str], accuracy_level: int, cost: LevelCost | str | None, kv_cache: bool
) -> None:
    """Write the card into the folder.

    Args:
        folder: where model.onnx is.
        facts: the provenance that `signround_edge.json` holds too.
        accuracy_level: of every MatMulNBits; without any (`--dtype`) the card does not speak of it.
        cost: what level 4 costs, or why that was not measured; None for a graph of floats.
        kv_cache: whether onnxruntime-genai runs the graph.
    """
    sections = [f"# {facts['scheme']} by signround-edge {facts['version']}", _provenance(facts), _contents(folder)]
    if cost is not None:
        sections.append(_accuracy(accuracy_level, cost))
    sections.append(_how_to_run(kv_cache))
    (folder / CARD).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _provenance(facts: dict[str, str]) -> str:
    return (
        f"Graph: {facts['graph_builder']}. Integers and scales are those of the run whose manifest has the sha256 "
        f"`{facts['manifest_sha256']}`; `signround-edge verify RUN FOLDER --text FILE` checks that."
    )


def _contents(folder: Path) -> str:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for _, kind, _, size in read_tensors(folder):
        counts[kind] += 1
        sizes[kind] += size
    lines = ["| tensors | number | bytes |", "|---|---|---|"]
    lines += [f"| {kind} | {counts[kind]} | {size:,} |" for kind, size in sizes.most_common()]
    return "\n".join([*lines, f"| all | {sum(counts.values())} | {sum(sizes.values()):,} |"])


def _accuracy(level: int, cost: LevelCost | str) -> str:
    lines = ["## Accuracy level", "", f"{_LEVELS[level]}. WebAssembly ignores it."]
    if isinstance(cost, str):
        return "\n".join([*lines, f"What level 4 costs on this model was not measured: {cost}."])
    lines += ["", "| on this model | level 0 or 1 | level 4 |", "|---|---|---|"]
    lines.append(f"| perplexity | {cost.ppl_floats:.4f} | {cost.ppl_level_4:.4f} |")
    lines.append(f"| mean KL divergence from level 1 | 0 | {cost.kld_mean:.2e} |")
    lines.append(f"| same most likely token | 100 % | {100 * cost.top1_agreement:.2f} % |")
    how = f"Measured at export: {cost.tokens:,} tokens of {cost.text}, through ONNX Runtime on the exporting x86 CPU."
    return "\n".join([*lines, "", how, "The level is an attribute of the nodes: export again to change it."])


def _how_to_run(kv_cache: bool) -> str:
    lines = ["## Running it", "", "```python"]
    if kv_cache:
        lines += [
            "import onnxruntime_genai as og",
            "",
            'model = og.Model(".")',
            "tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)",
            "params.set_search_options(max_length=64)",
            "generator = og.Generator(model, params)",
            'generator.append_tokens(tokenizer.encode("Once"))',
            "while not generator.is_done():",
            "    generator.generate_next_token()",
            "print(tokenizer.decode(generator.get_sequence(0)))",
        ]
    else:
        lines += [
            "import numpy as np",
            "import onnxruntime",
            "",
            "# No key-value cache: give the whole text for each new token.",
            'session = onnxruntime.InferenceSession("model.onnx")',
            "ids = np.array([[1, 2, 3]])",
            'logits = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]',
        ]
    return "\n".join([*lines, "```"])
