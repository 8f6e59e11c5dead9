"""README.md of an exported folder: what it holds, at which accuracy level it computes, and how to run it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from exporters.onnx.artifact.reader import open_artifact, read_tensors
from exporters.onnx.artifact.sidecar import Sidecar
from exporters.onnx.builder_classes import GENAI_CONFIG
from exporters.onnx.fused_level import FUSED_LEVEL
from exporters.onnx.options import ACCURACY_LEVELS, LevelCost
from signround_edge.errors import UserError
from signround_edge.model.tokenizer import load_tokenizer

CARD = "README.md"
NOT_MEASURED = "nobody asked for it"

_GENAI = """\
import onnxruntime_genai as og

folder = "."  # where this card lies
model = og.Model(folder)
tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model){special_tokens}
params.set_search_options(max_length=64)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
# Where the model's tokenizer puts nothing around a text the option must not be set: for a tokenizer_class such as
# LlamaTokenizer it would add BOS all the same.
_SPECIAL_TOKENS = """
tokenizer.update_options(add_special_tokens="true")  # encode leaves out BOS by itself"""

_PLAIN = """\
import numpy as np
import onnxruntime
import transformers

folder = "."  # where this card lies
# No key-value cache: give the whole text for each new token.
{session}
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = np.array([tokenizer.encode("Once")])
for _ in range(20):
    (logits,) = session.run(["logits"], {feeds})
    ids = np.append(ids, logits[:, -1:].argmax(-1), axis=1)
print(tokenizer.decode(ids[0]))
"""
_SESSION = 'session = onnxruntime.InferenceSession(f"{folder}/model.onnx")'
_FUSING_SESSION = f"""\
options = onnxruntime.SessionOptions()
options.add_session_config_entry("{FUSED_LEVEL}", "0")
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx", options)"""
_FUSED = (
    "The graph has DequantizeLinear in front of MatMul. ONNX Runtime makes MatMulNBits of both when it loads it, at "
    f"the level of the session option `{FUSED_LEVEL}`. Its own default is 4; genai_config.json, where there is one, "
    "sets this folder's level."
)
_HERE = "It runs in this folder; elsewhere, set `folder` to its path.\n\n"
_HALF = (
    "The graph computes in f16: activations, keys and values, logits. That is for GPUs; it has no accuracy level of "
    "int8 activations. `signround-edge verify` says how far its logits are from those in f32."
)
_FEEDS = {
    "input_ids": "ids",
    "attention_mask": "np.ones_like(ids)",
    "position_ids": "np.arange(ids.shape[1])[None]",
}


def render_card(folder: Path, sidecar: Sidecar, cost: LevelCost | str) -> str:
    """The card, in Markdown.

    Args:
        folder: where all other files of the export are.
        sidecar: what `signround_edge.json` says.
        cost: what level 4 costs, or why that was not measured; the card of a graph of floats, or one that computes in
            f16, does not speak of it.
    """
    graph = open_artifact(folder).graph
    sections = [_title(sidecar), _provenance(sidecar), _contents(folder)]
    if sidecar.io_dtype == "f16":
        sections.append(f"## Arithmetic\n\n{_HALF}")
    elif sidecar.dtype is None:
        sections.append(_accuracy(sidecar, cost))
    inputs = [str(value.name) for value in graph.inputs]
    sections.append(f"## Running it\n\n{_how_to_run(folder, inputs, sidecar.operators == 'qdq')}")
    return "\n\n".join(sections) + "\n"


def _title(sidecar: Sidecar) -> str:
    scheme, tool = sidecar.provenance["scheme"], f"signround-edge {sidecar.provenance['version']}"
    if sidecar.dtype is not None:
        return f"# {sidecar.dtype} floats with the values of {scheme}, by {tool}"
    return f"# {scheme}{', computing in f16,' if sidecar.io_dtype == 'f16' else ''} by {tool}"


def _provenance(sidecar: Sidecar) -> str:
    facts = sidecar.provenance
    what = "Integers and scales are those"
    if sidecar.dtype is not None:
        rounded = ", rounded to f16" if sidecar.dtype == "f16" else ""
        what = f"Its floats are integers times scales{rounded}, for comparisons: no byte is saved. They are those"
    return (
        f"Graph: {facts['graph_builder']}. {what} of the run whose manifest has the sha256 "
        f"`{facts['manifest_sha256']}`; `signround-edge verify RUN FOLDER --text FILE` checks that. "
        f"{facts['source_check'].capitalize()}."
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


def _accuracy(sidecar: Sidecar, cost: LevelCost | str) -> str:
    level = sidecar.accuracy_level
    lines = ["## Accuracy level", "", f"{level}: {ACCURACY_LEVELS[level]}. WebAssembly ignores it."]
    if sidecar.operators == "qdq":
        lines += ["", _FUSED]
    if isinstance(cost, str):
        return "\n".join([*lines, f"What level 4 costs on this model was not measured: {cost}."])
    lines += ["", "| on this model | level 0 or 1 | level 4 |", "|---|---|---|"]
    lines.append(f"| perplexity | {cost.ppl_floats:.4f} | {cost.ppl_level_4:.4f} |")
    lines.append(f"| mean KL divergence from level 1 | 0 | {cost.kld_mean:.2e} |")
    lines.append(f"| same most likely token | 100 % | {100 * cost.top1_agreement:.2f} % |")
    how = f"Measured at export: {cost.tokens:,} tokens of {cost.text}, through ONNX Runtime on the exporting x86 CPU."
    lines += ["", how]
    if sidecar.operators != "qdq":
        lines.append("The level is an attribute of the nodes: export again to change it.")
    return "\n".join(lines)


def _how_to_run(folder: Path, inputs: list[str], fuses: bool) -> str:
    """A program that runs in the folder as it stands; a template's inputs may leave none to give."""
    if set(inputs) <= set(_FEEDS):
        feeds = ", ".join(f'"{name}": {_FEEDS[name]}' for name in inputs)
        session = _FUSING_SESSION if fuses else _SESSION
        return f"{_HERE}```python\n{_PLAIN.format(feeds=f'{{{feeds}}}', session=session)}```"
    if (folder / GENAI_CONFIG).is_file():
        code = _GENAI.format(special_tokens=_SPECIAL_TOKENS if adds_special_tokens(folder) else "")
        return f"{_HERE}```python\n{code}```"
    return f"Its inputs are those of the template: {', '.join(inputs)}."


def adds_special_tokens(folder: Path) -> bool:
    """Whether the tokenizer of an export puts tokens around a text."""
    try:
        return bool(load_tokenizer(folder).num_special_tokens_to_add() > 0)
    except UserError:  # onnxruntime-genai cannot load it either
        return False
