"""Mutated GGUF files through `inspect` and `verify`: no traceback, no hang, no memory blow-up, one sentence each.

    python -m tests.fuzz.fuzz_gguf --cases 2000               # an hour on one core
    python -m tests.fuzz.fuzz_gguf --first 1234 --cases 1 --keep folder     # one case again, its files kept

The base files are exports of tiny-llama: of each scheme a whole file, a split one and one made with a template. A
case's number decides its base and its damage (with the same --schemes). What must hold for every command:

- exit code 0, 1 or 2, within the time and memory limits, no process left running, no temporary file left behind;
- no traceback, no "unexpected" error, nothing on stderr but progress and, unless the code is 0, one line "error: …";
- a certificate of `verify` that is strict JSON and says why it failed;
- `verify` exits 0 only where every weight and (without template) every metadata value is still the run's.

`inspect` reads heads only, so it rightly exits 0 where the damage is in metadata values or in the data of a tensor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from signround_edge.demo import calibration_text_path, evaluation_text_path, tiny_llama_path
from tests.fuzz.command import Outcome, run_forked, run_really
from tests.fuzz.gguf_meaning import differences
from tests.fuzz.gguf_mutations import Model, mutate

SCHEMES = ("q4_0", "q4_k_m", "q2_k_s", "iq4_xs")
LIMIT_S = 120.0
LIMIT_MB = 500.0  # above what the same command takes for the intact file
_SPLIT = "1M"
# What takes seconds to import, once here instead of in every forked command that makes a base.
_IMPORTED_ONCE = ("signround_edge.tuning.quantize", "transformers.models.llama.modeling_llama", "exporters.gguf")
_PROGRESS = re.compile(
    r"hashing the run, the artifacts and the text|.*: comparing stored weights with .*|window \d+ of \d+"
    r"|comparing hidden states, layer by layer|wrote .*certificate\.(json|html)"
)


@dataclass(frozen=True)
class Base:
    """An intact model: its run directory and its files, the one to load first."""

    name: str
    run: Path
    model: Model


@dataclass
class Result:
    """What one case led to; `problems` is empty when all is as it should be."""

    case: int
    base: str
    damage: str
    inspect: int | None = None
    verify: int | None = None
    compared: bool = False
    runtime: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """Where cases run: the bases, the text to verify with, and the peak memory of commands on intact files."""

    folder: Path
    bases: list[Base]
    text: Path
    idle_mb: dict[str, float] = field(default_factory=dict)

    def commands(self, base: Base, path: Path, case: int) -> dict[str, list[str]]:
        """Both commands; every second case asks for JSON."""
        flags = ["--json"] if case % 2 else []
        sizes = ["--text", str(self.text), "--n-ctx", "16", "--windows", "1", "--report", str(self.report)]
        return {
            "inspect": ["inspect", str(path), *flags],
            "verify": ["verify", str(base.run), str(path), *sizes, *flags],
        }

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def temporary(self) -> Path:
        return self.folder / "temporary"


def main() -> int:
    """Command line; exit code 1 when anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--really", type=int, default=20, help="cases that are run by new interpreters too")
    parser.add_argument("--keep", type=Path, help="keep the files of all cases with problems (or of a single one) here")
    parser.add_argument("--out", type=Path, help="append each result here, as a line of JSON")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the fork
    with tempfile.TemporaryDirectory(prefix="fuzz-gguf-") as folder:
        bench = _prepare(Path(folder), args.schemes.split(","))
        results = []
        for case in range(args.first, args.first + args.cases):
            really = args.really > 0 and (case - args.first) % max(1, args.cases // args.really) == 0
            result = run_case(bench, case, really)
            results.append(result)
            if args.out:
                with args.out.open("a") as out:
                    print(json.dumps(asdict(result)), file=out)
            if result.problems:
                _say(f"case {case} (--schemes {args.schemes}), {result.base}, {result.damage}: {result.problems}")
            if args.keep and (result.problems or args.cases == 1):
                shutil.copytree(bench.folder / "case", args.keep / str(case), dirs_exist_ok=True)
            if (len(results)) % 100 == 0:
                _say(f"{len(results)} cases, {sum(bool(r.problems) for r in results)} with problems")
        print(json.dumps(summary(results), indent=1))
    return int(any(r.problems for r in results))


def _prepare(folder: Path, schemes: Sequence[str]) -> Bench:
    """Export all base files, and run each command once on them, here (to import everything) and forked."""
    text = folder / "text.txt"
    text.write_text(evaluation_text_path().read_text(encoding="utf-8")[:400], encoding="utf-8")
    (folder / "temporary").mkdir()
    tempfile.tempdir = str(folder / "temporary")
    bench = Bench(folder, [], text)
    for module in _IMPORTED_ONCE:
        importlib.import_module(module)
    for scheme in schemes:
        bench.bases += _make_bases(folder, scheme)
    for base in bench.bases:
        path = _write(base.model, folder / "case")
        for name, arguments in bench.commands(base, path, 0).items():
            outcome = _succeed(arguments, here=base is bench.bases[0])
            bench.idle_mb[name] = max(bench.idle_mb.get(name, 0.0), outcome.peak_mb)
    _say(f"{len(bench.bases)} base files; peak memory on them, in MB: {bench.idle_mb}")
    return bench


def _make_bases(folder: Path, scheme: str) -> list[Base]:
    run, out = folder / f"run-{scheme}", folder / f"base-{scheme}"
    sizes = ["--steps", "0", "--samples", "2", "--seqlen", "32", "--calibration", str(calibration_text_path())]
    _succeed(["quantize", str(tiny_llama_path()), "--scheme", f"gguf:{scheme}", "-o", str(run), *sizes])
    whole = out / "whole" / "model.gguf"
    flags = {"whole": [], "split": ["--split-max-size", _SPLIT], "template": ["--template", str(whole)]}
    bases = []
    for name, more in flags.items():
        _succeed(["export", str(run), "--format", "gguf", "-o", str(out / name / "model.gguf"), *more])
        files: Model = {path.name: path.read_bytes() for path in sorted((out / name).iterdir())}
        bases.append(Base(f"{scheme} {name}", run, files))
    return bases


def _succeed(arguments: list[str], here: bool = False) -> Outcome:
    if here:
        _run_here(arguments)
    outcome = run_forked(arguments, 10 * LIMIT_S)
    if outcome.code != 0:
        raise SystemExit(f"{arguments} ended with {outcome.code}: {outcome.stderr[-2000:]}{outcome.stdout[-2000:]}")
    return outcome


def _run_here(arguments: list[str]) -> None:
    """For the imports that a command makes on its way."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from signround_edge.cli import main as command

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        command(arguments, standalone_mode=False)


def run_case(bench: Bench, case: int, really: bool = False) -> Result:
    """Make the damage of that number and put it through both commands."""
    rng = Random(case)
    base = rng.choice(bench.bases)
    model = dict(base.model)
    result = Result(
        case, base.name, mutate(model, [b.model for b in bench.bases if b is not base] or [base.model], rng)
    )
    path = _write(model, bench.folder / "case")
    for name, arguments in bench.commands(base, path, case).items():
        shutil.rmtree(bench.report, ignore_errors=True)
        outcome = run_forked(arguments, LIMIT_S)
        setattr(result, name, outcome.code)
        result.seconds = max(result.seconds, outcome.seconds)
        result.peak_mb = max(result.peak_mb, outcome.peak_mb - bench.idle_mb[name])
        problems = _problems(outcome, outcome.peak_mb - bench.idle_mb[name])
        if name == "verify":
            problems += _judge_verify(bench, base, model, outcome, result)
        left = [p.name for p in bench.temporary.iterdir() if not p.name.startswith("torchinductor")]  # torch's cache
        if left:
            problems.append(f"left behind: {left}")
            _empty(bench.temporary)
        if really:
            shutil.rmtree(bench.report, ignore_errors=True)
            problems += _disagreement(outcome, run_really(arguments, 5 * LIMIT_S))  # imports take their time
        result.problems += [f"{name}: {problem}" for problem in problems]
    return result


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write(model: Model, folder: Path) -> Path:
    """The files in an empty folder; the path to load."""
    _empty(folder)
    for name, content in model.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
    return folder / next(iter(model))


def _problems(outcome: Outcome, more_mb: float) -> list[str]:
    """What is wrong with how a command ended, whatever the file."""
    lines = [line for line in outcome.stderr.splitlines() if not _PROGRESS.fullmatch(line)]
    found = []
    if outcome.code is None:
        found.append(f"did not end within {LIMIT_S:g} s")
    elif outcome.code not in (0, 1, 2):
        found.append(f"ended with {outcome.code}")
    elif outcome.code == 0 and lines:
        found.append(f"exit code 0, and on stderr: {lines}")
    elif outcome.code and (len(lines) != 1 or not lines[0].startswith("error: ")):
        found.append(f"not one sentence on stderr: {lines}")
    if "Traceback" in outcome.stderr + outcome.stdout or "unexpected" in outcome.stderr:
        found.append(f"a traceback or an unexpected error: {outcome.stderr[-600:]}")
    if more_mb > LIMIT_MB:
        found.append(f"took {more_mb:.0f} MB more than for the intact file")
    if outcome.left:
        found.append("left a process running")
    return found


def _judge_verify(bench: Bench, base: Base, model: Model, outcome: Outcome, result: Result) -> list[str]:
    """What is wrong with the certificate, or with an exit code of 0."""
    file = bench.report / "certificate.json"
    if not file.is_file():
        return [] if outcome.code == 2 else ["no certificate was written"]
    try:
        document = json.loads(file.read_text(), parse_constant=_refuse)
    except ValueError as error:
        return [f"the certificate is not strict JSON ({error})"]
    reasons = [part["reason"] for part in (*document["artifacts"], *document["runtimes"]) if part["reason"]]
    result.compared = document["tensors_checked"] > 0
    result.runtime = _runtime_said(document) if result.compared else ""
    if any("\n" in reason or len(reason) > 2000 for reason in reasons):
        return [f"a reason that is no sentence: {reasons}"]
    if outcome.code == 1:
        return [] if reasons else ["it failed without a reason"]
    if outcome.code == 0:
        wrong = differences(base.model, model)
        return [f"it passed although {wrong}"] if wrong else []
    return []


def _runtime_said(document: dict[str, Any]) -> str:
    """How llama.cpp took the file."""
    reason = document["runtimes"][0]["reason"] or ""
    ended = re.search(r"was ended by SIG\w+|gave no answer|failed in '\w+'", reason)
    if ended:
        return ended[0]
    return "refused it" if "llama.cpp refuses" in reason else "ran it"


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _disagreement(forked: Outcome, real: Outcome) -> list[str]:
    """What a new interpreter did otherwise."""
    pairs = {"exit code": (forked.code, real.code), "stdout": (forked.stdout, real.stdout)}
    pairs["stderr"] = (forked.stderr, real.stderr)
    return [f"a new interpreter gives another {what}: {b!r}, not {a!r}" for what, (a, b) in pairs.items() if a != b]


def summary(results: list[Result]) -> dict[str, Any]:
    """Counts over all cases, the slowest and the largest."""
    slowest = max(results, key=lambda r: r.seconds)
    largest = max(results, key=lambda r: r.peak_mb)
    return {
        "cases": len(results),
        "problems": sum(bool(r.problems) for r in results),
        "inspect_exit_codes": dict(Counter(str(r.inspect) for r in results)),
        "verify_exit_codes": dict(Counter(str(r.verify) for r in results)),
        "inspect_0": dict(Counter(_kind(r) for r in results if r.inspect == 0).most_common()),
        "verify_0": dict(Counter(_kind(r) for r in results if r.verify == 0).most_common()),
        "weights_compared": sum(r.compared for r in results),
        "llama_cpp": dict(Counter(r.runtime for r in results if r.runtime).most_common()),
        "slowest": {"case": slowest.case, "seconds": round(slowest.seconds, 2), "damage": slowest.damage},
        "largest": {"case": largest.case, "mb_more_than_intact": round(largest.peak_mb), "damage": largest.damage},
    }


def _kind(result: Result) -> str:
    return " + ".join(part.split(": ")[0] for part in result.damage.split("; and "))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
