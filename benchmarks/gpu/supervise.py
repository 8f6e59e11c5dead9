"""Running parts one after another in a process of their own, which is watched.

A part that fails, hangs, is killed or breaks the device becomes a row, and the others go on; where the process is no
longer sound, a new one takes its place.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.parts import Options, Part, Row
from benchmarks.gpu.report import Report

# A part that takes this many times what was expected, and some seconds, is given up: others are worth the time.
_PATIENCE = 4
_PATIENCE_S = 60
_TO_END_S = 5


def run_parts(parts: list[Part], options: Options, budget_s: float, report: Report) -> None:
    """Run the parts that the budget holds, and report all of them."""
    deadline = time.monotonic() + budget_s
    worker = _Worker(options)
    try:
        for part in parts:
            began = time.monotonic()
            left = deadline - began
            expected = f"expected {part.expected_s:.0f} s, {max(0.0, left):.0f} s left"
            print(f"{part.name}: {expected}", file=sys.stderr, flush=True)
            if left < part.expected_s:
                state = f"skipped: {expected}"
                report.add(_no_figures(part, state))
            else:
                state = "done"
                for row in worker.run(part, min(left, _PATIENCE * part.expected_s + _PATIENCE_S)):
                    state = f"failed: {row['failed']}" if "failed" in row else state
                    report.add(row)
            took = {"expected_s": part.expected_s, "took_s": round(time.monotonic() - began, 1)}
            report.add({"table": "parts", "what": part.name, "state": state, **took})
            if state != "done":
                print(f"  {state}", file=sys.stderr, flush=True)
    finally:
        worker.end()


def _no_figures(part: Part, why: str, trace: str | None = None) -> Row:
    row = {"table": part.table, "what": part.name, "failed": why}
    return row if trace is None else {**row, "traceback": trace}


class _Worker:
    """The process in which parts run; it starts with the first part, and anew where it was lost."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._process: Any = None
        self._pipe: Connection | None = None

    def run(self, part: Part, limit_s: float) -> Iterator[Row]:
        """Rows of a part as they come; one that says why where it did not end well."""
        until = time.monotonic() + limit_s
        pipe = self._started()
        try:
            pipe.send(part)
            while True:
                if not pipe.poll(max(0.0, until - time.monotonic())):
                    self._kill()
                    yield _no_figures(part, f"not done within {limit_s:.0f} s")
                    return
                kind, content = pipe.recv()
                if kind == "row":
                    yield content
                elif kind == "failed":
                    yield _no_figures(part, *content)
                elif kind == "broken":
                    self._kill()
                    yield _no_figures(part, "the device does not work any more after it; a new process goes on")
                    return
                else:
                    return
        except (EOFError, OSError):
            self._process.join()
            yield _no_figures(part, f"its process ended with {self._process.exitcode}")
            self._process = None

    def end(self) -> None:
        """Let the process go."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.join(_TO_END_S)
            self._kill()

    def _started(self) -> Connection:
        if self._process is not None and not self._process.is_alive():
            self._process = None
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=work, args=(other, self._options))
            self._process.start()
            other.close()
        assert self._pipe is not None
        return self._pipe

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None


def work(pipe: Connection, options: Options) -> None:
    """Take parts from the pipe and answer with their rows; the end of the process where the device is broken."""
    bench: Any = None
    while True:
        try:
            part: Part = pipe.recv()
        except EOFError:  # nobody asks any more
            return
        try:
            if bench is None:
                bench = importlib.import_module("benchmarks.gpu.bench").Bench(options)
            module, _, name = part.function.partition(":")
            for row in getattr(importlib.import_module(module), name)(bench, **part.arguments):
                pipe.send(("row", row))
        except Exception as error:
            pipe.send(("failed", (_last_line(error), "".join(traceback.format_exception(error)))))
            del error
        sound = bench is None or bench.is_sound()
        pipe.send(("done" if sound else "broken", None))


def _last_line(error: Exception) -> str:
    """What the traceback ends with, and where in this repository it was."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"
    lines = traceback.format_exception_only(error)[-1].strip().splitlines()
    return f"{lines[0][:300]} ({where})"
