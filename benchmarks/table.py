"""docs/benchmarks.md and the tables of docs/results.md from benchmarks/results/: `python -m benchmarks.table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import summary
from benchmarks.onnx_peers import block_scheme
from benchmarks.rows import (
    IMATRIX,
    OURS,
    RESULTS,
    beside_planned,
    is_cut_off,
    is_of_today,
    is_onnx_peer,
    is_tuned,
    kl,
    measured,
    names,
    onnx_bytes,
    read,
    samples_of,
    steps_of,
    text_of,
)
from signround_edge.files import write_atomically

DECODE = RESULTS / "decode"
FORMS = RESULTS / "forms"
TARGET = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """# All measured rows

[results.md](results.md) is the summary; this is everything it is drawn from, made by `python -m benchmarks.table` from
benchmarks/results/. `python -m benchmarks.run --help` says how each row is measured, results.md what the models are:
`smollm2-135m-offgrid…` is off-grid SmolLM2, `smollm2-135m-shipped…` the same as shipped, `…-presets` its rows with 20
or 30 steps of 4 samples on 8 windows (all others: steps of 8, 24 windows).

KL divergence, top-1 agreement and perplexity compare weights alone: the dequantized weights of every tool's file run in
torch (f32) against the original model, windows scored as `llama-perplexity --kl-divergence` does. Wall time and peak
memory are of the whole quantizing process. Rows "from nearest" were tuned with `--start nearest`, rows with "codes
follow" also with `--positions follow` (codes moved with the scales): until November 2026 the only way.

Tables "presets beside llama-quantize" put side by side what each preset keeps: bytes are ours, and an importance matrix
is of the same calibration text as our tuning. "tuned" is the default way, with the whole-model stage where its steps
are named ("100 + 500").

Tables "planned types at the bytes of a scheme" hold what `signround-edge plan --target-size` makes of the bytes of the
scheme's file, tuned with the same recipe; "predicted" is what the plan said before any run.

Tables "ONNX beside ONNX Runtime's quantizers" hold rows of one number of bits and block size, best first. Rows `ort-…`
are onnxruntime's `matmul_nbits_quantizer` on the float graph that our export starts from, its decoder matrices among
our run's embedding and head; bytes differ by what each stores as zero points (none, integers, floats). Rows `genai-…`
are the folders of onnxruntime-genai's int4 builder as they come, embedding and head included. Rows `gptq` are a
reference implementation (benchmarks/gptq.py) on our grids, rows `olive-gptq` Olive 0.13.0's GPTQ pass on the same
samples, both with our embedding and head. KL is compared with the best of the peers that takes no more bytes than the
row plus 1 %.

Tables "every form of ONNX of one run" (`python -m benchmarks.onnx_forms`) hold what `export --format onnx` makes of
the same integers. Bytes are of graph and data; KL divergence is from torch with the run's dequantized weights, on four
windows of 128 tokens, the last eight of which are fed one by one; the text is 20 greedy tokens, compared with
transformers' of the same weights. Speed is of decoding alone, on one thread, the ratio the median over rounds.

Times of different processors do not compare, above all where one multiplies bfloat16 natively and the other does not;
numbers in brackets tell them apart.

The rows of tiny-llama, whose tokenizer adds BOS, were calibrated without BOS in each window, before November 28, 2026
([LOG.md](LOG.md)); SmolLM2's tokenizer adds none.
"""
CUT_OFF = """# Models cut off after their first blocks

Made to compare times and ideas at a fraction of the cost. What such a model says is no language, so its perplexity
(left out here) means nothing; KL divergence from the same blocks in full precision does.
"""


def main() -> None:
    """Command line."""
    write_atomically(TARGET, document().encode())
    for page in summary.PAGES:
        write_atomically(page, summary.filled(page.read_text(encoding="utf-8")).encode())


def document() -> str:
    """docs/benchmarks.md: models in the order of `rows.ORDER`, decoding, and models cut off at the end."""
    whole = [name for name in names() if not is_cut_off(name)]
    cut_off = [name for name in names() if is_cut_off(name)]
    parts = [HEAD, *(section for name in whole for section in sections(name, read(name)))]
    parts += [_decode_section(file.stem, json.loads(file.read_text())) for file in sorted(DECODE.glob("*.json"))]
    parts += [forms_section(file.stem, json.loads(file.read_text())) for file in sorted(FORMS.glob("*.json"))]
    parts += [CUT_OFF] if cut_off else []
    return "\n".join([*parts, *(section for name in cut_off for section in sections(name, read(name)))])


def sections(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """All tables of a result file's rows."""
    found = measured(rows)
    of_files = [r for r in found if not is_onnx_peer(r)]
    parts = [_section(name, of_files)] if of_files else []
    parts += [*preset_sections(name, found), *planned_sections(name, found), *_onnx_sections(name, found)]
    return [*parts, *_failures(name, rows)]


def _failures(name: str, rows: list[dict[str, Any]]) -> list[str]:
    rows = [r for r in rows if "failed" in r]
    if not rows:
        return []
    lines = [f"### {name}: peers that could not run", "", "| tool | scheme | why |", "|---|---|---|"]
    lines += [f"| {r['tool']} | {r['scheme']} | {r['failed']} |" for r in rows]
    return ["\n".join([*lines, ""])]


def _decode_section(name: str, found: dict[str, Any]) -> str:
    lines = [f"## {name}: decoding in onnxruntime-genai", ""]
    lines += ["| folder | bytes | tokens a CPU second | beside genai-int4 | resident MB | loading, CPU s |"]
    lines += ["|---|---|---|---|---|---|"]
    for r in found["rows"]:
        speed = f"{r['tokens_per_cpu_s']:.1f} | {r['ratio']:.2f} ×"
        lines.append(f"| {r['folder']} | {r['bytes']:,} | {speed} | {r['resident_mb']:.0f} | {r['load_cpu_s']:.2f} |")
    return "\n".join(
        [*lines, "", f"{found['what']}; the best round of each, rounds alternating between the folders.", ""]
    )


def forms_section(name: str, found: dict[str, Any]) -> str:
    """The forms of ONNX of one run (`benchmarks.onnx_forms`)."""
    lines = [f"## {name}: every form of ONNX of one run", ""]
    lines += [
        "| export | bytes | runtime | loads | KL from torch | tokens a CPU second | beside the first |"
        " greedy text as transformers' |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in found["rows"]:
        kl = f"{r['kld_mean']:.0e}" if "kld_mean" in r else "–"
        figures = f"{r['tokens_per_cpu_s']:.1f} | {r['ratio']:.2f} ×" if "ratio" in r else "– | –"
        cells = f"{r['form']}`", f"{r['bytes']:,}", r["runtime"], r["loads"], kl, figures, _text_cell(r)
        lines.append(f"| `{' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{found['scheme']}`. {found['what']}.", ""])


def _text_cell(row: dict[str, Any]) -> str:
    """Whether transformers writes the same greedy text with the run's dequantized weights."""
    if "same_tokens" not in row:
        return "–"
    return "yes" if row["same_tokens"] == row["text_tokens"] else f"the first {row['same_tokens']} tokens"


def _section(name: str, rows: list[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda r: (r["scheme"], r["steps"], r.get("whole_model_steps", 0), r["tool"]))
    cut_off = is_cut_off(name)
    lines = [f"## {name}" + ("" if cut_off else f" (perplexity of the original: {rows[0]['ppl_reference']:.3f})"), ""]
    lines += [
        "| tool | scheme | samples | steps | bytes | bits/weight | PPL | mean KL | same top-1 | wall s | CPU s |"
        " peak MB |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
    machines = list(dict.fromkeys(r["machine"] for r in rows))
    for r in rows:
        ppl = "–" if cut_off else f"{r['ppl']:.3f}"
        figures = f"{ppl} | {r['kld_mean']:.4f} ± {r['kld_stderr']:.4f} | {100 * r['top1_agreement']:.1f} %"
        mark = f" [{1 + machines.index(r['machine'])}]" if len(machines) > 1 else ""
        cost = f"{r['wall_s']:.0f} | {r['cpu_s']:.0f}{mark} | {_peak(r['peak_mb'])}"
        size = f"{r['bytes']:,} | {r['bits_per_weight']:.3f}"
        samples = " × ".join(map(str, samples_of(r)))
        lines.append(f"| {r['tool']} | {r['scheme']} | {samples} | {steps_of(r)} | {size} | {figures} | {cost} |")
    settings = sorted({text_of(r) for r in rows})
    named = [f"[{i}] {m}" for i, m in enumerate(machines, 1)] if len(machines) > 1 else machines
    return "\n".join([*lines, "", f"Calibration → evaluation: {'; '.join(settings)}. {'; '.join(named)}.", ""])


def preset_sections(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A table for every calibration text with which llama-quantize's presets were measured."""
    texts = sorted({text_of(r) for r in rows if r["tool"] == IMATRIX})
    return [_preset_section(name, text, [r for r in rows if text_of(r) == text]) for text in texts]


def _preset_section(name: str, text: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"### {name}: presets beside llama-quantize, mean KL", ""]
    lines += [
        "| preset | bytes | bits/weight | llama-quantize | with imatrix | ours, 0 steps | ours, tuned | over imatrix |"
        " PPL, imatrix → tuned | same top-1, imatrix → tuned |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for scheme in sorted({r["scheme"] for r in rows if r["tool"] == IMATRIX}):
        of_preset = [r for r in rows if r["scheme"] == scheme]
        of = {r["tool"]: r for r in of_preset if r["tool"] != OURS}
        ours = [r for r in of_preset if r["tool"] == OURS and is_of_today(r)]
        ours.sort(key=lambda r: (int(r["steps"]), int(r.get("whole_model_steps", 0))))
        if not ours:
            continue
        rounded, tuned = None if is_tuned(ours[0]) else ours[0], ours[-1] if is_tuned(ours[-1]) else None
        imatrix, bytes_ = of[IMATRIX], ours[0]["bytes"]
        kls = " | ".join(_kl_beside(r, bytes_) for r in (of.get("llama-quantize"), imatrix, rounded, tuned))
        ratio, ppl, top1 = ("–",) * 3
        if tuned:
            ratio = f"{tuned['kld_mean'] / imatrix['kld_mean']:.2f} ×"
            ppl = f"{imatrix['ppl']:.2f} → {tuned['ppl']:.2f}"
            top1 = f"{100 * imatrix['top1_agreement']:.1f} → {100 * tuned['top1_agreement']:.1f} %"
        size = f"{bytes_:,} | {ours[0]['bits_per_weight']:.3f}"
        lines.append(f"| {scheme} | {size} | {kls} | {ratio} | {ppl} | {top1} |")
    return "\n".join([*lines, "", f"Calibration → evaluation: {text}.", ""])


def planned_sections(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A table of planned types, each beside the scheme whose bytes they keep, with the same steps and text."""
    lines = []
    for scheme, planned in beside_planned(rows):
        kls = f"{kl(scheme['kld_mean'])} | {kl(planned['kld_mean'])} | {planned['predicted_kl']:.4f}"
        sizes = f"{scheme['bytes']:,} | {planned['bytes']:,}"
        ratio = planned["kld_mean"] / scheme["kld_mean"]
        lines.append(f"| {scheme['scheme']} | {steps_of(planned)} | {sizes} | {kls} | {ratio:.2f} × |")
    head = [f"### {name}: planned types at the bytes of a scheme, mean KL", ""]
    head += ["| scheme | steps | bytes of tensors | planned | KL | planned | predicted | planned over the scheme |"]
    head += ["|---|---|---|---|---|---|---|---|"]
    return ["\n".join([*head, *lines, ""])] if lines else []


def _kl_beside(row: dict[str, Any] | None, size: int) -> str:
    """Mean KL of a file; in brackets `steps_of` where a whole-model stage followed, and bytes that are not `size`."""
    if row is None:
        return "–"
    more = 100 * (row["bytes"] / size - 1)
    notes = [steps_of(row)] if "whole_model_steps" in row else []
    notes += [f"{more:+.2f} % bytes"] if row["bytes"] != size else []
    return kl(row["kld_mean"]) + (f" ({', '.join(notes)})" if notes else "")


def _onnx_sections(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A table for every number of bits and block size that a peer was measured with."""
    kinds = sorted({kind for r in rows if is_onnx_peer(r) and (kind := block_scheme(r["scheme"]))}, reverse=True)
    return [_onnx_section(name, kind, [r for r in rows if block_scheme(r["scheme"]) == kind]) for kind in kinds]


def _onnx_section(name: str, kind: tuple[int, int], rows: list[dict[str, Any]]) -> str:
    lines = [f"### {name}: ONNX beside ONNX Runtime's quantizers, {kind[0]} bits in blocks of {kind[1]}", ""]
    lines += ["| tool | scheme | steps | bytes | PPL | mean KL | same top-1 | KL over the best peer's |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: float(r["kld_mean"])):
        scheme = "" if is_onnx_peer(r) else r["scheme"]  # GPTQ's are on our grids
        figures = f"{r['ppl']:.3f} | {r['kld_mean']:.4f} ± {r['kld_stderr']:.4f} | {100 * r['top1_agreement']:.1f} %"
        ratio = _ratio(r, rows) if r["tool"] == OURS else ""
        lines.append(f"| {r['tool']} | {scheme} | {steps_of(r)} | {onnx_bytes(r):,} | {figures} | {ratio} |")
    return "\n".join([*lines, ""])


def _ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    peers = [r for r in rows if r["tool"] != OURS and onnx_bytes(r) <= 1.01 * onnx_bytes(row)]
    if not peers:
        return "–"
    best = min(peers, key=lambda r: float(r["kld_mean"]))
    return f"{row['kld_mean'] / best['kld_mean']:.2f} × {best['tool']}"


def _peak(megabytes: float | None) -> str:
    """A dash for rows of before the peak was measured apart from the parent's memory."""
    return "–" if megabytes is None else f"{megabytes:.0f}"


if __name__ == "__main__":
    main()
