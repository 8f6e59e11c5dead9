"""certificate.html: one file with the verdict, the figures and their pictures, made from the JSON document alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from runtime_tests.certificate.charts import divergence_histogram, layer_errors, loss_differences

_WORDS = {
    "pass": "Every stored weight is the run's, and every runtime computes what torch computes with these weights.",
    "fail": "Something is not what it should be:",
    "incomplete": "Something could not be run, so nothing is proved:",
}
_GATES = {
    "kld_mean": "mean KL divergence",
    "ln_ppl_difference": "difference of ln(perplexity)",
    "layer_error": "error of hidden states",
    "control_kld_mean": "mean KL divergence of the control",
    "known_difference_kld_mean": "mean KL divergence of what the runtime is known to compute",
}
Entry = dict[str, Any]


def page(document: Entry) -> str:
    """The page of a certificate."""
    css = (files(__package__) / "page.css").read_text(encoding="utf-8")
    body = "".join(
        (
            _head(document),
            "".join(_device(document, device) for device in document["devices"]),
            _weights(document),
            _sizes(document),
            "".join(_pictures(document, runtime) for runtime in document["runtimes"]),
            _inputs(document),
        )
    )
    title = f"{document['verdict']}: parity certificate"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f'{escape(title)}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{css}</style></head><body><main>{body}</main></body></html>\n"
    )


def _head(document: Entry) -> str:
    verdict = document["verdict"]
    reasons = [
        f"{_name(a['path'])}: {a['reason']}" for a in document["artifacts"] if a["reason"] and a["status"] != "pass"
    ] + [
        f"{_name(r['artifact'])} on {r['name']}, {r['device']} ({r['status']}): {r['reason']}"
        for r in document["runtimes"]
        if r["reason"]
    ]
    notes = [
        f"note: {_name(r['artifact'])} on {r['name']}, {r['device']}: {n}"
        for r in document["runtimes"]
        for n in r["notes"]
    ]
    reasons += [document["changed"]] if document["changed"] else []
    listed = "".join(f"<li>{escape(text)}</li>" for text in reasons + notes)
    model, scoring = document["model"], document["scoring"]
    return (
        f'<h1>Parity certificate</h1><p class="soft">{escape(_name(str(model["source"].get("model", ""))))}, '
        f"{escape(model['scheme'])} · {escape(document['created'])} · {escape(model.get('source_check', ''))}</p>"
        f'<section class="verdict {verdict}"><strong>{verdict.upper()}</strong><p>{_WORDS[verdict]}</p>'
        f'<ul class="reasons">{listed}</ul></section>'
        f"<p>Scored: {scoring['windows']} windows of {scoring['n_ctx']} tokens of {escape(_name(document['text']))}, "
        "the second half of each, as llama-perplexity does. PPL: perplexity. KL: mean Kullback–Leibler divergence from "
        "torch with the same weights, in nats. Control: the same graph computing in floats.</p>"
    )


def _device(document: Entry, device: Entry) -> str:
    rows = []
    for r in document["runtimes"]:
        if r["device"] != device["name"]:
            continue
        original = r["fidelity"] or {}
        rows.append(
            [
                ("artifact", escape(_name(r["artifact"]))),
                ("runtime", escape(r["name"])),
                ("status", f'<b class="{r["status"]}">{r["status"]}</b>'),
                ("#PPL", _with_error(r["ppl"], r["ppl_stderr"])),
                ("#PPL torch", _fixed(r["ppl_reference"])),
                ("#KL", _with_error(r["kld_mean"], r["kld_stderr"], small=True)),
                ("#KL control", _small(r["control_kld_mean"])),
                ("#same top-1", _percent(r["top1_agreement"])),
                ("#KL to original", _small(original.get("kld_mean"))),
                ("#seconds", _fixed(r["seconds"], 1)),
            ]
        )
    return (
        f'<h2>{escape(device["name"])}</h2><p class="soft">{escape(device["description"])}; '
        f"transport {escape(device['transport'])}</p>{_table(rows)}{_gates(document, device)}"
    )


def _gates(document: Entry, device: Entry) -> str:
    made = [(r, gate) for r in document["runtimes"] if r["device"] == device["name"] for gate in r["gates"]]
    rows = [
        [
            ("artifact", escape(_name(r["artifact"]))),
            ("runtime", escape(r["name"])),
            ("gate", _GATES[gate["name"]]),
            ("#figure", _small(gate["figure"])),
            ("#at most", _small(gate["limit"])),
            ("passed", f'<b class="{"pass" if gate["passed"] else "fail"}">{"yes" if gate["passed"] else "no"}</b>'),
        ]
        for r, gate in made
    ]
    passed = sum(gate["passed"] for _, gate in made)
    state = "" if passed == len(rows) else " open"
    return f"<details{state}><summary>Gates: {passed} of {len(rows)} passed</summary>{_table(rows)}</details>"


def _weights(document: Entry) -> str:
    rows = [
        [
            ("artifact", escape(_name(a["path"]))),
            ("format", escape(a["format"])),
            ("#tensors", f"{a['tensors_checked']:,}"),
            ("#values", f"{a['values_checked']:,}"),
            ("#differing", f"{a['values_differing']:,}"),
            ("exact", f'<b class="{a["status"]}">{"yes" if a["status"] == "pass" else a["status"]}</b>'),
        ]
        for a in document["artifacts"]
    ]
    return f"<h2>Stored weights, through the runtime's own dequantizer</h2>{_table(rows)}"


def _sizes(document: Entry) -> str:
    sizes = {f["path"]: f["total_bytes"] for f in document["inputs"] if f["role"] == "artifact"}
    devices = {device["name"]: device for device in document["devices"]}
    rows = []
    for r in document["runtimes"]:
        budget = devices[r["device"]]["memory_budget_mb"]
        size, peak = sizes[r["artifact"]], r["peak_memory_bytes"]
        share = max(size, peak or 0) / (budget * 1e6) if budget else None
        meter = "no budget is set"
        if share is not None:
            width, over = min(share, 1.0) * 100, ' class="over"' if share > 1 else ""
            meter = f'<div class="meter" title="{share:.1%}"><div{over} style="width:{width:.1f}%"></div></div>'
            meter += f" {share:.1%}" + (" – over budget" if share > 1 else "")
        rows.append(
            [
                ("device", escape(r["device"])),
                ("runtime", escape(r["name"])),
                ("artifact", escape(_name(r["artifact"]))),
                ("#bytes", f"{size:,}"),
                ("#peak memory, MB", "–" if not peak else f"{peak / 1e6:,.0f}"),
                ("#budget, MB", "–" if not budget else f"{budget:,}"),
                ("share", meter),
            ]
        )
    return f"<h2>Sizes against memory budgets</h2>{_table(rows)}"


def _pictures(document: Entry, runtime: Entry) -> str:
    figures = runtime["per_token"]
    if figures is None:
        return ""
    limit = next((gate["limit"] for gate in runtime["gates"] if gate["name"] == "kld_mean"), None)
    pictures = [
        (
            "Loss of each token, minus torch's",
            loss_differences(figures["nll"], figures["nll_reference"], document["scoring"]["windows"]),
        ),
        ("KL divergence of each token", divergence_histogram(figures["kld"], limit)),
    ]
    found = runtime["divergence"]
    if found is not None:
        layers = found["layers"]
        picture = layer_errors([e["name"] for e in layers], [e["error"] for e in layers], found["tolerance"])
        pictures.append(("Layers in floats", picture))
    start = f"<figure><figcaption>Where divergence starts</figcaption><p>{_start(document, runtime)}</p></figure>"
    drawn = start + "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in pictures
    )
    title = f"{_name(runtime['artifact'])} on {runtime['name']}, {runtime['device']}"
    return f'<h2>{escape(title)}</h2><div class="pictures">{drawn}</div>'


def _start(document: Entry, runtime: Entry) -> str:
    """Where divergence starts: the layer, and the token."""
    found, sentences = runtime["divergence"], []
    if found is None:
        sentences.append("This runtime does not show its layers.")
    elif found["first_layer"] is None:
        sentences.append("In floats every layer's hidden states are torch's.")
    else:
        after = f"; the last place that agrees is {found['last_agreeing']}" if found["last_agreeing"] else ""
        sentences.append(f"The first layer that is off is {found['first_layer']}{after}.")
    kld, n_ctx = runtime["per_token"]["kld"], document["scoring"]["n_ctx"]
    worst = max(range(len(kld)), key=lambda i: math.inf if kld[i] is None else kld[i])
    limit = next((gate["limit"] for gate in runtime["gates"] if gate["name"] == "kld_mean"), math.inf)
    first = next((i for i, value in enumerate(kld) if value is None or value > limit), None)
    if first is None:
        sentences.append(
            f"No single token diverges by more than the gate of the mean; the worst is {_place(worst, n_ctx)}."
        )
    else:
        above = sum(value is None or value > limit for value in kld)
        sentences.append(
            f"{above:,} of {len(kld):,} tokens diverge by more than the gate of the mean: "
            f"the first is {_place(first, n_ctx)}, the worst {_place(worst, n_ctx)}."
        )
    return escape(" ".join(sentences))


def _place(index: int, n_ctx: int) -> str:
    """Window and position of a scored token: the second half of each window is scored."""
    scored = n_ctx - 1 - n_ctx // 2
    return f"token {n_ctx // 2 + 1 + index % scored} of window {index // scored + 1}"


def _inputs(document: Entry) -> str:
    blocks = []
    for entry in document["inputs"]:
        lines = "<br>".join(f"{escape(f['sha256'])} {escape(name)}" for name, f in entry["files"].items())
        blocks.append(
            f"<details><summary>{entry['role']}: {escape(entry['path'])} ({len(entry['files'])} files, "
            f'{entry["total_bytes"]:,} bytes)</summary><p class="hash">{lines}</p></details>'
        )
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in document["versions"].items())
    return (
        f"<h2>What was verified</h2>{''.join(blocks)}<p class='soft'>{versions}</p>"
        "<p>Are these still the files that were verified? "
        "<code>signround-edge verify --check certificate.json</code></p>"
        f'<p class="hash soft">digest of certificate.json {document["digest"]}</p>'
    )


def _table(rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Rows of (heading, HTML); a heading that starts with # is a number's. Columns without any figure are left out."""
    if not rows:
        return '<p class="soft">nothing</p>'
    kept = [i for i in range(len(rows[0])) if any(row[i][1] != "–" for row in rows)]
    heads = "".join(f"<th{_class(rows[0][i][0])}>{rows[0][i][0].removeprefix('#')}</th>" for i in kept)
    lines = ""
    for row in rows:
        cells = "".join(
            f'<td{_class(row[i][0])} data-label="{row[i][0].removeprefix("#")}">{row[i][1]}</td>' for i in kept
        )
        lines += f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"


def _class(heading: str) -> str:
    return ' class="number"' if heading.startswith("#") else ""


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def _fixed(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def _with_error(value: float | None, error: float | None, small: bool = False) -> str:
    if value is None:
        return "–"
    shown = _small if small else _fixed
    return shown(value) + ("" if error is None else f" ± {error:.1e}" if small else f" ± {error:.3f}")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
