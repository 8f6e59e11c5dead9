"""The bytes of runs and exports before and after a change of the code: sha256 of every file.

    python -m benchmarks.same_bytes before.json MODEL...       # MODEL: folders of small models, besides tiny-llama
    python -m benchmarks.same_bytes after.json MODEL... --against before.json

tiny-llama is tuned for a few steps on every grid, and each run is exported in each of its formats, packed and in
floats, built in, from a template, in shards and as `.ort`; each further MODEL is rounded once and exported to both
formats, as far as it can be: a refusal is recorded by its sentence. Only the command line is used, in this process, so
the code of any commit can be measured (`PYTHONPATH=<checkout> python -m benchmarks.same_bytes`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

DEMO = Path(__file__).parents[1] / "signround_edge" / "demo"
TINY, TEXT = DEMO / "tiny-llama", DEMO / "speeches-test.txt"

GGUF_SCHEMES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_0", "q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m",
    "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
ONNX_SCHEMES = (
    "w2g32", "w3g64", "w4g16", "w4g128", "w8g32", "w2g32-asym", "w3g32-asym", "w4g64-asym", "w4g256-asym",
    "w8g128-asym", "w4", "w4-asym",
)  # fmt: skip
TUNED = ("--steps", "3", "--samples", "8", "--seqlen", "32", "--batch-size", "4", "--calibration", str(TEXT))
ROUNDED = ("--steps", "0", "--samples", "2", "--seqlen", "16", "--calibration", str(TEXT))
OTHER_SETTINGS: dict[str, tuple[str, ...]] = {
    "nearest-follow": ("--start", "nearest", "--positions", "follow"),
    "layer-adam": ("--granularity", "layer", "--optimizer", "adam", "--loss", "mse", "--scale-init", "absmax"),
    "whole-model": ("--whole-model-steps", "2",),
    "channel-scales": ("--transform", "channel-scales"),
    "types": ("--tensor-type", "ffn_down=Q6_K", "--token-embedding-type", "Q4_0"),
}  # fmt: skip


def main() -> int:
    """Command line; exit code 1 when a file differs from `--against`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON document to write")
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--against", type=Path, help="an earlier document to compare with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.gettempdir()) / "signround-edge-same-bytes"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    found: dict[str, str] = {}
    try:
        for name, target in [*((s, "gguf") for s in GGUF_SCHEMES), *((s, "onnx") for s in ONNX_SCHEMES)]:
            _tune(found, work, f"{target}:{name}", target)
        _tune(found, work, "gguf:q4_0,onnx:w4g32", "both", more=True)
        for name, settings in OTHER_SETTINGS.items():
            _tune(found, work, "gguf:q4_k_m", "gguf", settings, name)
        for model in args.models:
            _round(found, work, model)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    args.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(found)} files of {len({name.split('/')[0] for name in found})} runs and exports: {args.out}")
    return 0 if args.against is None else _compare(json.loads(args.against.read_text(encoding="utf-8")), found)


def _tune(
    found: dict[str, str], work: Path, scheme: str, target: str, settings: tuple[str, ...] = (), label: str = "",
    more: bool = False,
) -> None:  # fmt: skip
    key, run = f"{scheme.replace(':', '-').replace(',', '+')}{'-' if label else ''}{label}", work / "run"
    if not _step(found, f"{key}-run", run, "quantize", TINY, "--scheme", scheme, "-o", run, *TUNED, *settings):
        return
    for kind in ("gguf", "onnx") if target == "both" else (target,):
        _export(found, work, f"{key}-{kind}", kind)
    if more:
        _export_in_all_ways(found, work, key)
    shutil.rmtree(run)


def _export_in_all_ways(found: dict[str, str], work: Path, key: str) -> None:
    """Floats, templates, shards, `.ort`, f16 scales of the run in `work`."""
    floats, traced = work / "floats.gguf", work / "floats-onnx"
    for dtype in ("f16", "f32"):
        _export(found, work, f"{key}-gguf-{dtype}", "gguf", "--dtype", dtype)
        _export(found, work, f"{key}-onnx-{dtype}", "onnx", "--dtype", dtype)
    _invoke("export", work / "run", "--format", "gguf", "-o", floats, "--dtype", "f16")
    _export(found, work, f"{key}-gguf-template", "gguf", "--template", floats)
    _export(found, work, f"{key}-gguf-split", "gguf", "--split-max-size", "1M")
    _invoke("export", work / "run", "--format", "onnx", "-o", traced, "--dtype", "f32")
    _export(found, work, f"{key}-onnx-template", "onnx", "--template", traced / "model.onnx")
    _export(found, work, f"{key}-onnx-all", "onnx", "--accuracy-level", "4", "--scale-dtype", "f16", "--ort-format")
    _export(found, work, f"{key}-onnx-shards", "onnx", "--max-shard-size", "1M")


def _round(found: dict[str, str], work: Path, model: Path) -> None:
    run = work / "run"
    # w8g32 = Q8_0 leaves both targets open, and divides the rows of every small model.
    arguments = ("quantize", model, "--scheme", "gguf:q8_0,onnx:w8g32", "-o", run, "--float-fallback", *ROUNDED)
    if not _step(found, f"{model.name}-run", run, *arguments):
        return
    for kind in ("gguf", "onnx"):
        _export(found, work, f"{model.name}-{kind}", kind)
    shutil.rmtree(run)


def _export(found: dict[str, str], work: Path, key: str, kind: str, *more: str | Path) -> None:
    # A GGUF file lies in a folder of its own, so that all parts of a split one are found.
    folder = work / "out"
    out = folder / "model.gguf" if kind == "gguf" else folder
    if kind == "gguf":
        folder.mkdir()
    _step(found, key, folder, "export", work / "run", "--format", kind, "-o", out, *more)
    shutil.rmtree(folder, ignore_errors=True)


def _step(found: dict[str, str], key: str, out: Path, *arguments: str | Path) -> bool:
    """Run one command and note the hashes of what it wrote, or the sentence with which it refused."""
    sentence = _invoke(*arguments)
    if sentence is not None:
        found[f"{key}/refused"] = sentence
        shutil.rmtree(out, ignore_errors=True)
        return False
    for file in sorted(out.rglob("*")):
        if file.is_file():
            found[f"{key}/{file.relative_to(out)}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return True


def _invoke(*arguments: str | Path) -> str | None:
    """The command in this process; the last line that it printed when it fails."""
    from signround_edge.cli import main as command

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        code = command([str(argument) for argument in arguments], standalone_mode=False)
    return printed.getvalue().strip().splitlines()[-1] if code else None


def _compare(before: dict[str, str], after: dict[str, str]) -> int:
    differing = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    for name in differing:
        print(f"differs: {name}: {before.get(name, 'not there')} before, {after.get(name, 'not there')} now")
    print(
        f"{len(before.keys() & after.keys()) - sum(n in before and n in after for n in differing)} files are the same"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
