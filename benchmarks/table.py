"""Render docs/benchmarks.md from benchmarks/results/*.json: `python -m benchmarks.table`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.onnx_peers import block_scheme

RESULTS = Path(__file__).parent / "results"
DECODE = RESULTS / "decode"
OURS = "signround-edge"
IMATRIX = "llama-quantize-imatrix"
TARGET = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """# Measured results

Made by `python -m benchmarks.table` from benchmarks/results/; `python -m benchmarks.run --help` says how each row is
measured. KL divergence, top-1 agreement and perplexity compare weights alone: the dequantized weights of every tool's
file run in torch (f32) against the original model, windows scored as `llama-perplexity --kl-divergence` does. Wall time
and peak memory are of the whole quantizing process. Rows "from nearest" were tuned with `--start nearest`, rows with
"codes follow" also with `--positions follow` (codes moved with the scales): until November 2026 the only way.

Tables "presets beside llama-quantize" put side by side what each preset keeps: bytes are ours, and an importance matrix
is of the same calibration text as our tuning. "tuned" is the default way, with the whole-model stage where its steps
are named ("100 + 500").

Tables "ONNX beside ONNX Runtime's quantizers" hold rows of one number of bits and block size, best first. Rows `ort-…`
are onnxruntime's `matmul_nbits_quantizer` on the float graph that our export starts from, its decoder matrices among
our run's embedding and head; bytes differ by what each stores as zero points (none, integers, floats). Rows `genai-…`
are the folders of onnxruntime-genai's int4 builder as they come, embedding and head included. Rows `gptq` are a
reference implementation (benchmarks/gptq.py) on our grids, rows `olive-gptq` Olive 0.13.0's GPTQ pass on the same
samples, both with our embedding and head. KL is compared with the best of the peers that takes no more bytes than the
row plus 1 %.

Times of different processors do not compare, above all where one multiplies bfloat16 natively and the other does not;
numbers in brackets tell them apart.
"""


def main() -> None:
    """Command line."""
    parts = [HEAD]
    for file in sorted(RESULTS.glob("*.json")):
        parts += sections(file.stem, json.loads(file.read_text()))
    parts += [_decode_section(file.stem, json.loads(file.read_text())) for file in sorted(DECODE.glob("*.json"))]
    TARGET.write_text("\n".join(parts), encoding="utf-8")


def sections(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """All tables of a result file's rows."""
    found = measured(rows)
    of_files = [r for r in found if not _is_onnx_peer(r)]
    parts = [_section(name, of_files)] if of_files else []
    return [*parts, *preset_sections(name, found), *_onnx_sections(name, found), *_failures(name, rows)]


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with figures, which those of peers that could not run do not have."""
    return [r for r in rows if "failed" not in r]


def _failures(name: str, rows: list[dict[str, Any]]) -> list[str]:
    rows = [r for r in rows if "failed" in r]
    if not rows:
        return []
    lines = [f"### {name}: peers that could not run", "", "| tool | scheme | why |", "|---|---|---|"]
    lines += [f"| {r['tool']} | {r['scheme']} | {r['failed']} |" for r in rows]
    return ["\n".join([*lines, ""])]


def steps_of(row: dict[str, Any]) -> str:
    """Steps a block, and those of the whole-model stage where there is one, with its rates if given: "100 + 300"."""
    marks = {"nearest": "from nearest", "follow": "codes follow"}
    marked = [marks[row[name]] for name in ("start", "positions") if row.get(name) in marks]
    blocks = str(row["steps"]) + (f" ({', '.join(marked)})" if marked else "")
    whole = row.get("whole_model_steps")
    if whole is None:
        return blocks
    rates = [f"{row[rate]:g}" for rate in ("whole_model_lr", "whole_model_code_lr") if rate in row]
    return f"{blocks} + {whole}" + (f" at {', '.join(rates)}" if rates else "")


def samples_of(row: dict[str, Any]) -> tuple[int, int]:
    """(calibration samples, their tokens), as a row's key has them."""
    match = re.search(r" steps, (\d+)x(\d+),", row["key"])
    assert match is not None, row["key"]
    return int(match[1]), int(match[2])


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


def _section(name: str, rows: list[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda r: (r["scheme"], r["steps"], r.get("whole_model_steps", 0), r["tool"]))
    reference = rows[0]["ppl_reference"]
    lines = [f"## {name} (perplexity of the original: {reference:.3f})", ""]
    lines += [
        "| tool | scheme | samples | steps | bytes | bits/weight | PPL | mean KL | same top-1 | wall s | CPU s |"
        " peak MB |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
    machines = list(dict.fromkeys(r["machine"] for r in rows))
    for r in rows:
        figures = f"{r['ppl']:.3f} | {r['kld_mean']:.4f} ± {r['kld_stderr']:.4f} | {100 * r['top1_agreement']:.1f} %"
        mark = f" [{1 + machines.index(r['machine'])}]" if len(machines) > 1 else ""
        cost = f"{r['wall_s']:.0f} | {r['cpu_s']:.0f}{mark} | {_peak(r['peak_mb'])}"
        size = f"{r['bytes']:,} | {r['bits_per_weight']:.3f}"
        samples = " × ".join(map(str, samples_of(r)))
        lines.append(f"| {r['tool']} | {r['scheme']} | {samples} | {steps_of(r)} | {size} | {figures} | {cost} |")
    settings = sorted({_text_of(r) for r in rows})
    named = [f"[{i}] {m}" for i, m in enumerate(machines, 1)] if len(machines) > 1 else machines
    return "\n".join([*lines, "", f"Calibration → evaluation: {'; '.join(settings)}. {'; '.join(named)}.", ""])


def _text_of(row: dict[str, Any]) -> str:
    """Calibration and evaluation of a row, as its key ends."""
    return str(row["key"]).split(" steps, ", 1)[1]


def preset_sections(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A table for every calibration text with which llama-quantize's presets were measured."""
    texts = sorted({_text_of(r) for r in rows if r["tool"] == IMATRIX})
    return [_preset_section(name, text, [r for r in rows if _text_of(r) == text]) for text in texts]


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
        ours = [r for r in of_preset if r["tool"] == OURS and not r.keys() & {"start", "positions"}]
        ours.sort(key=lambda r: (int(r["steps"]), int(r.get("whole_model_steps", 0))))
        if not ours or _is_tuned(ours[0]):
            continue
        rounded, tuned = ours[0], ours[-1] if _is_tuned(ours[-1]) else None
        imatrix, bytes_ = of[IMATRIX], rounded["bytes"]
        kls = " | ".join(_kl_beside(r, bytes_) for r in (of.get("llama-quantize"), imatrix, rounded, tuned))
        ratio, ppl, top1 = ("–",) * 3
        if tuned:
            ratio = f"{tuned['kld_mean'] / imatrix['kld_mean']:.2f} ×"
            ppl = f"{imatrix['ppl']:.2f} → {tuned['ppl']:.2f}"
            top1 = f"{100 * imatrix['top1_agreement']:.1f} → {100 * tuned['top1_agreement']:.1f} %"
        size = f"{bytes_:,} | {rounded['bits_per_weight']:.3f}"
        lines.append(f"| {scheme} | {size} | {kls} | {ratio} | {ppl} | {top1} |")
    return "\n".join([*lines, "", f"Calibration → evaluation: {text}.", ""])


def _is_tuned(row: dict[str, Any]) -> bool:
    return steps_of(row) != "0"


def _kl_beside(row: dict[str, Any] | None, size: int) -> str:
    """Mean KL of a file; in brackets `steps_of` where a whole-model stage followed, and bytes that are not `size`."""
    if row is None:
        return "–"
    kl, more = row["kld_mean"], 100 * (row["bytes"] / size - 1)
    notes = [steps_of(row)] if "whole_model_steps" in row else []
    notes += [f"{more:+.2f} % bytes"] if row["bytes"] != size else []
    return (f"{kl:.4f}" if kl >= 5e-4 else f"{kl:.1e}") + (f" ({', '.join(notes)})" if notes else "")


def _is_onnx_peer(row: dict[str, Any]) -> bool:
    return str(row["tool"]).startswith(("ort-", "genai-"))


def _onnx_sections(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A table for every number of bits and block size that a peer was measured with."""
    kinds = sorted({kind for r in rows if _is_onnx_peer(r) and (kind := block_scheme(r["scheme"]))}, reverse=True)
    return [_onnx_section(name, kind, [r for r in rows if block_scheme(r["scheme"]) == kind]) for kind in kinds]


def _onnx_section(name: str, kind: tuple[int, int], rows: list[dict[str, Any]]) -> str:
    lines = [f"### {name}: ONNX beside ONNX Runtime's quantizers, {kind[0]} bits in blocks of {kind[1]}", ""]
    lines += ["| tool | scheme | steps | bytes | PPL | mean KL | same top-1 | KL over the best peer's |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: float(r["kld_mean"])):
        scheme = "" if _is_onnx_peer(r) else r["scheme"]  # GPTQ's are on our grids
        figures = f"{r['ppl']:.3f} | {r['kld_mean']:.4f} ± {r['kld_stderr']:.4f} | {100 * r['top1_agreement']:.1f} %"
        ratio = _ratio(r, rows) if r["tool"] == OURS else ""
        lines.append(f"| {r['tool']} | {scheme} | {steps_of(r)} | {_onnx_bytes(r):,} | {figures} | {ratio} |")
    return "\n".join([*lines, ""])


def _ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    peers = [r for r in rows if r["tool"] != OURS and _onnx_bytes(r) <= 1.01 * _onnx_bytes(row)]
    if not peers:
        return "–"
    best = min(peers, key=lambda r: float(r["kld_mean"]))
    return f"{row['kld_mean'] / best['kld_mean']:.2f} × {best['tool']}"


def _onnx_bytes(row: dict[str, Any]) -> int:
    """Bytes of a row as ONNX; `bytes` is the first target's, which is GGUF where one run feeds both."""
    return int(row.get("onnx_bytes", row["bytes"]))


def _peak(megabytes: float | None) -> str:
    """A dash for rows of before the peak was measured apart from the parent's memory."""
    return "–" if megabytes is None else f"{megabytes:.0f}"


if __name__ == "__main__":
    main()
