"""`signround-edge verify`: proof on real runtimes."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click

from signround_edge.commands.group import EXIT_INTERRUPTED
from signround_edge.commands.options import (
    PATH,
    cache_type_k_option,
    cache_type_v_option,
    json_option,
    n_ctx_option,
    reference_option,
    windows_option,
)
from signround_edge.commands.output import print_json, say, show
from signround_edge.errors import CheckFailed


@click.command()
@click.argument("run", required=False, type=PATH)
@click.argument("artifacts", nargs=-1, type=PATH)
@click.option("--text", type=PATH, help="UTF-8 text to score.  [required]")
@click.option("--device", "devices", multiple=True, default=("cpu-x86",), show_default=True, help="Device profile.")
@reference_option
@click.option("--llama-bin", type=PATH, help="Folder of llama.cpp binaries for the device.")
@click.option("--report", type=PATH, help="Folder for certificate.json and certificate.html.")
@click.option("--check", "certificate", type=PATH, help="Re-check a certificate.json; run nothing.")
@windows_option
@n_ctx_option
@cache_type_k_option
@cache_type_v_option
@json_option
def verify(
    run: Path | None, artifacts: tuple[Path, ...], text: Path | None, devices: tuple[str, ...], reference: str | None,
    llama_bin: Path | None, report: Path | None, certificate: Path | None, windows: int | None, n_ctx: int,
    cache_type_k: str | None, cache_type_v: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Prove on the real runtime that ARTIFACTS hold RUN's weights exactly and behave like them."""
    if certificate is not None:
        if run is not None or text is not None:
            raise click.UsageError("--check takes a certificate.json and nothing else: it runs nothing")
        _check_certificate(certificate, as_json)
        return
    if run is None or not artifacts or text is None:
        missing = "argument 'RUN'" if run is None else "argument 'ARTIFACTS...'" if not artifacts else "option '--text'"
        raise click.UsageError(f"Missing {missing}.")
    from signround_edge import api
    from signround_edge.terminal.progress import terminal_progress
    from signround_edge.terminal.verification import render

    try:
        with terminal_progress("verifying") as progress, _interrupted_by_signals():
            result = api.verify(
                run, artifacts, text, devices=devices, reference=reference, llama_bin=llama_bin, windows=windows,
                n_ctx=n_ctx, cache_type_k=cache_type_k, cache_type_v=cache_type_v, report=report, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        say("interrupted; nothing was verified, and nothing is left running")
        sys.exit(EXIT_INTERRUPTED)
    if as_json:
        print_json(result.to_json())
    else:
        show(render(result))
    if not result.passed:
        raise CheckFailed("verification failed or could not be made; see the reasons above")


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, so that temporary files go and workers end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    before = {getattr(signal, name): signal.signal(getattr(signal, name), interrupt) for name in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_certificate(certificate: Path, as_json: bool) -> None:
    from runtime_tests.certificate.recheck import recheck

    sentence = recheck(certificate)
    if as_json:
        print_json({"status": "pass", "certificate": str(certificate), "reason": sentence})
    else:
        click.echo(sentence)
