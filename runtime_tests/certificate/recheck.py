"""`verify --check certificate.json`: are its inputs still the ones that were verified? Nothing is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime_tests.certificate.document import KIND, SCHEMA_VERSION, digest_of
from signround_edge.errors import CheckFailed, UserError
from signround_edge.files import sha256_of


def recheck(path: Path) -> str:
    """Compare a certificate and its inputs with the hashes in it.

    Returns:
        one sentence: what was compared, and the verdict that still stands.
    Raises:
        CheckFailed: the certificate or an input was changed or is missing, a file was added, or its verdict is no pass.
        UserError: not a certificate.
    """
    document = _read(path)
    if document.get("digest") != digest_of(document):
        raise CheckFailed(f"{path} was changed after `verify` wrote it; verify again")
    files = 0
    for entry in document["inputs"]:
        base = _base(entry, path)
        for name, recorded in entry["files"].items():
            _check_file(entry, base / name, recorded)
            files += 1
        if entry["role"] == "artifact":
            _check_nothing_added(entry, base)
    if document["verdict"] != "pass":
        raise CheckFailed(f"{path}: its {files} input files are unchanged, but its verdict is {document['verdict']}")
    return f"{path}: verdict pass of {document['created']}; all {files} input files are unchanged"


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the certificate.json that `verify --report` wrote") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); give the certificate.json that `verify --report` wrote"
        ) from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise UserError(f"{path} is not a certificate; give the certificate.json that `verify --report` wrote")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {document.get('schema_version')}; verify again")
    return document


def _base(entry: dict[str, Any], certificate: Path) -> Path:
    """Where the files are now: beside the certificate as they were, or where they were at first."""
    beside = certificate.parent / entry["relative_base"]
    first = next(iter(entry["files"]), "")
    return beside if (beside / first).exists() else Path(entry["base"])


def _check_file(entry: dict[str, Any], file: Path, recorded: dict[str, Any]) -> None:
    if not file.is_file():
        raise CheckFailed(f"the {entry['role']} has changed since the verification: {file} is missing")
    if file.stat().st_size != recorded["bytes"]:
        what = f"it has {file.stat().st_size} bytes, not {recorded['bytes']}"
    elif sha256_of(file) != recorded["sha256"]:
        what = "its sha256 is another"
    else:
        return
    raise CheckFailed(f"the {entry['role']} has changed since the verification: {file} ({what}); verify again")


def _check_nothing_added(entry: dict[str, Any], base: Path) -> None:
    """A folder that holds more files than were verified is another artifact."""
    if Path(entry["path"]).name != base.name:  # a single file: what else lies beside it does not matter
        return
    found = {file.relative_to(base).as_posix() for file in base.rglob("*") if file.is_file()}
    for name in sorted(found - set(entry["files"])):
        raise CheckFailed(f"the artifact has changed since the verification: {base / name} was added; verify again")
