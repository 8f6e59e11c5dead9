"""Our schemes, rounded and tuned, and our peers on one model: the same calibration samples, the same evaluation.

    python -m benchmarks.run                                        # all tools, the shipped tiny model, 4, 3 and 2 bits
    python -m benchmarks.run --model HF_FOLDER --calibration C.jsonl --text T.txt --tool auto-round
    python -m benchmarks.run --scheme gguf:q4_k_s --tool signround-edge --tool llama-quantize-imatrix --tool auto-round
    python -m benchmarks.run --scheme onnx:w4g32 --tool onnx-peers  # what peers have of these bits and block size
    python -m benchmarks.run --scheme plan:gguf:q2_k --tool signround-edge --tuned-only  # planned types, same bytes

Results go to benchmarks/results/<model>.json, one entry per row, and are printed at the end; a row that is there
already is not measured again unless --again is given. Where a peer cannot run, its row says why. Two of these commands
may run side by side, each pinned to a core (`taskset -c 0 …`), so that two tools are timed under the same conditions.
`python -m benchmarks.table` renders docs/benchmarks.md and the tables of docs/results.md from the results.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import auto_round, llama_quantize, olive_gptq, onnx_peers
from benchmarks.float_gguf import write_float_gguf
from benchmarks.gguf_in_torch import load_llama_gguf
from benchmarks.measure import Cost, run_measured
from benchmarks.planned_types import PlannedFile, plan_beside
from benchmarks.processor import processor
from benchmarks.rows import OURS, PLANNED, steps_of
from benchmarks.scoring import RememberingSession
from benchmarks.split_text import SPARE_TOKENS, json_lines
from benchmarks.table import sections
from exporters.gguf.imatrix.file import read_imatrix
from signround_edge.demo import calibration_text_path, evaluation_text_path, tiny_llama_path
from signround_edge.evaluation.perplexity import TorchSession, evaluate, text_windows
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.files import write_atomically
from signround_edge.inspection import inspect
from signround_edge.model.decoder import set_tensor
from signround_edge.model.tokenizer import added_bos, load_tokenizer
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import entry_bytes
from signround_edge.tuning.calibration.text import calibration_tokens, tokens_hash

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent.parent / ".cache"
TOOLS = (OURS, "auto-round", "gptq", "olive-gptq", "llama-quantize", "llama-quantize-imatrix", "onnx-peers")
ONNX_PEERS = (*(f"ort-{name}" for name in onnx_peers.QUANTIZERS), *onnx_peers.BUILDER_METHODS)
DEFAULT_SCHEMES = (
    "gguf:q4_0,onnx:w4g32",
    "gguf:q4_k_s",
    "gguf:q3_k_s",
    "gguf:q2_k_s",
    "onnx:w4g32-asym",
    "onnx:w4g128-asym",
    "onnx:w2g32-asym",
)


def main() -> None:
    """Command line."""
    args = _parser().parse_args()
    _check_text(args)
    results = RESULTS / f"{args.name or args.model.name}.json"
    planned = _planned(args)
    for row in planned:
        if not args.again and any(r["key"] == row["key"] for r in _read(results)):
            continue
        print(f"{row['key']} …", file=sys.stderr, flush=True)
        try:
            measured = _measure(args, row)
        except (llama_quantize.QuantizeFailed, subprocess.CalledProcessError) as error:
            measured = {"failed": _reason(error)}
        bos = added_bos(load_tokenizer(args.model))  # in front of each sample; rows without the key had none
        done = {**row, **measured, "calibration_bos": bos, "machine": _machine(), "commit": _commit()}
        others = [r for r in _read(results) if r["key"] != row["key"]]  # read again: another process may add rows
        write_atomically(results, (json.dumps([*others, done], indent=1) + "\n").encode())
    keys = {row["key"] for row in planned}
    print("\n".join(sections(results.stem, [r for r in _read(results) if r["key"] in keys])))


def _reason(error: llama_quantize.QuantizeFailed | subprocess.CalledProcessError) -> str:
    """Why a peer cannot run, in a line: its last one that names an error, or else its last one."""
    said = (isinstance(error, subprocess.CalledProcessError) and error.output) or str(error).replace(" | ", "\n")
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [str(error)]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines)[-1]


def _check_text(args: argparse.Namespace) -> None:
    """Rows are named by their samples, so a text that gives fewer of them is refused."""
    given = len(_samples(args))
    if given < args.samples:
        raise SystemExit(f"{args.calibration} gives {given} of {args.samples} samples; give more text or ask for less")


def _samples(args: argparse.Namespace, longer: int = 0) -> Tensor:
    """The calibration samples int64 [samples, seqlen + longer]."""
    seqlen = args.seqlen + longer
    return calibration_tokens(str(args.calibration), load_tokenizer(args.model), args.samples, seqlen)


def _machine() -> str:
    """The processor, whether it multiplies bfloat16 natively (see `compute_dtype`), and how many cores there were."""
    return processor(" (bf16)" if torch.cpu._is_avx512_bf16_supported() else " (f32)")


def _commit() -> str:
    """The commit of this checkout: rows of earlier ways to tune are told by it."""
    command = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _read(results: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.is_file() else []
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=tiny_llama_path())
    parser.add_argument("--name", help="name of the result file (default: the folder's)")
    parser.add_argument("--calibration", type=Path, default=calibration_text_path())
    parser.add_argument("--text", type=Path, default=evaluation_text_path())
    parser.add_argument("--scheme", action="append", help="repeatable")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--positions", default="fixed", help="of our tuned rows: fixed or follow")
    parser.add_argument("--start", default="gptq", help="of our tuned rows: gptq or nearest")
    parser.add_argument("--whole-model-steps", type=int, default=0, help="also of our tuned rows")
    parser.add_argument("--whole-model-lr", type=float, help="of that stage (default: the program's)")
    parser.add_argument("--whole-model-code-lr", type=float, help="of that stage (default: the program's)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--tool", action="append", choices=(*TOOLS, *ONNX_PEERS), help="repeatable (default: all)")
    parser.add_argument("--tuned-only", action="store_true", help="leave out our rows of 0 steps")
    parser.add_argument("--again", action="store_true", help="replace rows that were measured before")
    return parser


def _planned(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows to measure, each with a key that names everything that decides its figures."""
    common = f"{args.samples}x{args.seqlen}, batch {args.batch_size}, {args.calibration.name} → {args.text.name}"
    rows = []
    tools = args.tool or TOOLS
    for scheme in args.scheme or DEFAULT_SCHEMES if OURS in tools else ():
        untuned = [] if args.tuned_only else [(0, 0)]
        for steps, whole in dict.fromkeys([*untuned, (args.steps, args.whole_model_steps)]):
            special = {"whole_model_steps": whole, **_whole_model_rates(args)} if whole else {}
            if steps:
                special |= {"positions": "follow"} if args.positions == "follow" else {}
                special |= {"start": "nearest"} if args.start == "nearest" else {}
            rows.append({"tool": OURS, "scheme": scheme, "steps": steps, **special})
    for tool in (t for t in tools if t.startswith("llama-quantize")):
        presets = [s.split(",")[0] for s in args.scheme or DEFAULT_SCHEMES if s.startswith("gguf:")]
        rows += [{"tool": tool, "scheme": preset, "steps": 0} for preset in presets]
    if "gptq" in tools:
        rows += [{"tool": "gptq", "scheme": scheme, "steps": 0} for scheme in args.scheme or DEFAULT_SCHEMES]
    if "olive-gptq" in tools:
        asymmetric = [s for s in args.scheme or DEFAULT_SCHEMES if onnx_peers.block_scheme(s) and s.endswith("-asym")]
        rows += [{"tool": "olive-gptq", "scheme": scheme, "steps": 0} for scheme in asymmetric]
    peers = ONNX_PEERS if "onnx-peers" in tools else tuple(t for t in tools if t in ONNX_PEERS)
    rows += _planned_onnx_peers(args.scheme or DEFAULT_SCHEMES, peers)
    if "auto-round" in tools:
        presets = [s.split(",")[0] for s in args.scheme or DEFAULT_SCHEMES if s.startswith("gguf:")]
        rows += [{"tool": "auto-round", "scheme": preset, "steps": args.steps} for preset in presets]
    return [{"key": f"{r['tool']} {r['scheme']} {steps_of(r)} steps, {common}", **r} for r in rows]


def _whole_model_rates(args: argparse.Namespace) -> dict[str, float]:
    """Rates of the whole-model stage that were given."""
    rates = {"whole_model_lr": args.whole_model_lr, "whole_model_code_lr": args.whole_model_code_lr}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _planned_onnx_peers(schemes: list[str] | tuple[str, ...], peers: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for every peer that has the bits of a scheme; the builder has 4 bits only."""
    rows = []
    for scheme in schemes:
        kind = onnx_peers.block_scheme(scheme)
        for peer in peers if kind else ():
            if kind and kind[0] in onnx_peers.QUANTIZERS.get(peer.removeprefix("ort-"), (4,)):
                rows.append({"tool": peer, "scheme": scheme, "steps": 0})
    return rows


def _measure(args: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    tool, scheme = row["tool"], row["scheme"]
    if tool == OURS:
        return _ours(args, row)
    if tool == "auto-round":
        return _auto_round(args, scheme)
    if tool == "gptq":
        return _gptq(args, scheme)
    if tool == "olive-gptq":
        return _olive_gptq(args, scheme)
    if tool.startswith(("ort-", "genai-")):
        return _onnx_peer(args, tool, scheme)
    return _llama_quantize(args, scheme, with_imatrix=tool.endswith("-imatrix"))


def _ours(args: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    whole = row.get("whole_model_steps", 0)
    suffix = "".join(f"-{row[name]}" for name in ("start", "positions") if name in row)
    suffix = ("+" + str(whole) if whole else "") + suffix
    out = _run_folder(args, row["scheme"], f"{row['steps']}{suffix}")
    if args.again:
        shutil.rmtree(out, ignore_errors=True)
    elif (out / "manifest.json").is_file():
        raise SystemExit(f"{out} is there already, without its row; remove it to measure anew")
    plan = _plan(args, row["scheme"]) if row["scheme"].startswith(PLANNED) else None
    cost = _quantize(args, row, out, plan=plan)
    run = RunDirectory.open(out)
    beside = {} if plan is None else {"file_bytes": plan.file_bytes, "predicted_kl": plan.predicted_kl}
    return {**_size(run), **beside, **_score(args, TorchSession(load_run_model(run))), **asdict(cost)}


def _plan(args: argparse.Namespace, scheme: str) -> PlannedFile:
    folder = _made(CACHE / "plans" / f"{args.name or args.model.name}-{_samples_name(args)}")
    return plan_beside(args.model, scheme, args.calibration, args.samples, args.seqlen, folder)


def _size(run: RunDirectory) -> dict[str, Any]:
    found = inspect(run.path)
    size = {"bytes": found.total_bytes, "bits_per_weight": found.bits_per_weight}
    if "onnx" in run.manifest.targets[1:]:
        size["onnx_bytes"] = sum(entry_bytes(t, "onnx") for t in run.manifest.tensors)
    return size


def _run_folder(args: argparse.Namespace, scheme: str, steps: str) -> Path:
    name = f"{args.name or args.model.name}-{scheme.replace(':', '-').replace(',', '+')}"
    return CACHE / "runs" / f"{name}-{_samples_name(args)}-{steps}"


def _samples_name(args: argparse.Namespace) -> str:
    """Of what is kept in the cache: other tokens, another name (an earlier version cut windows without BOS)."""
    return f"{args.samples}x{args.seqlen}-{tokens_hash(_samples(args))[:8]}"


def _onnx_peer(args: argparse.Namespace, tool: str, scheme: str) -> dict[str, Any]:
    """A quantizer's decoder matrices among our run's other tensors, or the builder's folder as it comes."""
    bits, block_size = onnx_peers.block_scheme(scheme) or (0, 0)
    folder = CACHE / "onnx-peers" / (args.name or args.model.name)
    builder = onnx_peers.BUILDER_METHODS.get(tool)
    with tempfile.TemporaryDirectory(dir=_made(folder)) as temporary:
        out = Path(temporary) / "out"
        if builder is None:
            source = onnx_peers.write_float_graph(args.model, folder / "fp32")
            file = out / "model.onnx"
            cost = onnx_peers.quantize(source, file, tool.removeprefix("ort-"), bits, block_size)
        else:
            file = out
            cost = onnx_peers.build_int4(args.model, out, builder, block_size)
        peer = onnx_peers.read_weights(file, whole=builder is not None)
    run = _rounded_run(args, scheme)
    model: nn.Module = load_run_model(run)
    for name, weight in peer.weights.items():
        set_tensor(model, name, nn.Parameter(weight, requires_grad=False))
    others = [t for t in run.manifest.tensors if t.name not in peer.weights]
    size = peer.bytes + sum(entry_bytes(t, "onnx") for t in others)
    parameters = sum(math.prod(t.shape) for t in run.manifest.tensors)
    scores = _score(args, TorchSession(model))
    return {"bytes": size, "bits_per_weight": 8 * size / parameters, **scores, **asdict(cost)}


def _gptq(args: argparse.Namespace, scheme: str) -> dict[str, Any]:
    """GPTQ's decoder matrices on the grids of our run, among the run's embedding and head."""
    run = _rounded_run(args, scheme)
    with tempfile.TemporaryDirectory(dir=_made(CACHE / "gptq")) as temporary:
        weights = Path(temporary) / "weights.safetensors"
        sizes = ["--samples", str(args.samples), "--seqlen", str(args.seqlen)]
        command = [sys.executable, "-m", "benchmarks.gptq", str(run.path), "--model", str(args.model), *sizes]
        command += ["--calibration", str(args.calibration), "-o", str(weights)]
        cost = run_measured(command, Path(temporary) / "log.txt")
        return {**_size(run), **_score(args, TorchSession(_with_weights(run, weights))), **asdict(cost)}


def _olive_gptq(args: argparse.Namespace, scheme: str) -> dict[str, Any]:
    """Olive's decoder matrices, of the same layout as our run's, among the run's embedding and head."""
    run = _rounded_run(args, scheme)
    bits, block_size = onnx_peers.block_scheme(scheme) or (0, 0)
    with tempfile.TemporaryDirectory(dir=_made(CACHE / "olive")) as temporary:
        tokens = Path(temporary) / "tokens.safetensors"
        save_file({"tokens": _samples(args)}, tokens)
        python = olive_gptq.environment(CACHE / "olive-env")
        weights, cost = olive_gptq.quantize(python, args.model, tokens, bits, block_size, Path(temporary))
        return {**_size(run), **_score(args, TorchSession(_with_weights(run, weights))), **asdict(cost)}


def _with_weights(run: RunDirectory, file: Path) -> nn.Module:
    """The run's model with the weights f32 [out, in] of a safetensors file in the place of its own."""
    model: nn.Module = load_run_model(run)
    for name, weight in load_file(file).items():
        value = weight.T.contiguous() if run.entry(name).transposed else weight
        set_tensor(model, name, nn.Parameter(value, requires_grad=False))
    return model


def _rounded_run(args: argparse.Namespace, scheme: str) -> RunDirectory:
    """Our run of the scheme without tuning, for what a peer leaves alone."""
    folder = _run_folder(args, scheme, "0")
    if not (folder / "manifest.json").is_file():
        _quantize(args, {"scheme": scheme, "steps": 0}, folder)
    return RunDirectory.open(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _quantize(
    args: argparse.Namespace, row: dict[str, Any], out: Path, *more: str, plan: PlannedFile | None = None
) -> Cost:
    """Our run directory of a row, with its log beside it; SystemExit where it fails, which is no peer's fault."""
    settings = {"samples": args.samples, "seqlen": args.seqlen, "batch_size": args.batch_size}
    chosen = ("steps", "start", "positions", "whole_model_steps", "whole_model_lr", "whole_model_code_lr")
    settings |= {name: row[name] for name in chosen if name in row}
    flags = [str(x) for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", value)]
    types = ["--scheme", row["scheme"]] if plan is None else ["--plan", str(plan.file)]
    command = [sys.executable, "-m", "signround_edge.cli", "quantize", str(args.model), *types]
    command += ["-o", str(out), "--calibration", str(args.calibration), *flags, *more]
    try:
        return run_measured(command, Path(f"{out}.log"))
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)}: {error.output}") from None


def _llama_quantize(args: argparse.Namespace, scheme: str, with_imatrix: bool) -> dict[str, Any]:
    folder = CACHE / "llama-quantize" / (args.name or args.model.name)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "f32.gguf"
    if not source.is_file():
        write_float_gguf(args.model, source)
    imatrix = read_imatrix(_plain_imatrix(args, folder)) if with_imatrix else None
    preset = scheme.removeprefix("gguf:").upper()
    file = folder / f"{preset}{'-imatrix' if with_imatrix else ''}.gguf"
    cost = llama_quantize.quantize(source, file, preset, imatrix)
    found = inspect(file)
    scores = _score(args, TorchSession(load_llama_gguf(file, args.model)))
    return {"bytes": found.total_bytes, "bits_per_weight": found.bits_per_weight, **scores, **asdict(cost)}


def _plain_imatrix(args: argparse.Namespace, folder: Path) -> Path:
    """E[x²] of the same calibration samples, every token counting the same, as the llama-imatrix program has it."""
    file = folder / f"imatrix-{_samples_name(args)}.gguf"
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            row = {"scheme": "gguf:q8_0", "steps": 0}
            _quantize(args, row, Path(temporary) / "run", "--loss", "mse", "--save-imatrix", str(file))
    return file


def _auto_round(args: argparse.Namespace, scheme: str) -> dict[str, Any]:
    command = auto_round.environment(CACHE / "auto-round-env")
    out = CACHE / "auto-round" / f"{args.name or args.model.name}-{scheme.removeprefix('gguf:')}"
    lines = args.calibration if args.calibration.suffix == ".jsonl" else _as_json_lines(args)
    file, cost = auto_round.quantize(
        command, args.model, scheme, lines, out, args.samples, args.seqlen, args.steps, args.batch_size
    )
    found = inspect(file)
    scores = _score(args, TorchSession(load_llama_gguf(file, args.model)))
    return {"bytes": found.total_bytes, "bits_per_weight": found.bits_per_weight, **scores, **asdict(cost)}


def _as_json_lines(args: argparse.Namespace) -> Path:
    """The samples of a plain text as auto-round reads them, each a little longer than it takes."""
    tokenizer = load_tokenizer(args.model)
    texts = tokenizer.batch_decode(_samples(args, longer=SPARE_TOKENS), skip_special_tokens=True)
    file = _made(CACHE / "auto-round") / f"{args.calibration.stem}-{args.samples}x{args.seqlen}.jsonl"
    write_atomically(file, json_lines(texts).encode())
    return file


def _score(args: argparse.Namespace, session: TorchSession) -> dict[str, Any]:
    """Perplexity and KL divergence in torch, so that only the weights differ between rows."""
    windows = text_windows(args.model, args.text, args.n_ctx, args.windows)
    return asdict(evaluate(session, windows, _reference(args.model)))


@functools.cache
def _reference(model: Path) -> RememberingSession:
    return RememberingSession(TorchSession(load_source_model(model)))


if __name__ == "__main__":
    main()
