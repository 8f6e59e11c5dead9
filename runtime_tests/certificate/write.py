"""Write a certificate: certificate.json and certificate.html, each at one moment."""

from __future__ import annotations

from pathlib import Path

from runtime_tests.certificate.document import FILE_NAME, certificate, write_document
from runtime_tests.certificate.page import page
from runtime_tests.report.report import VerifyReport
from signround_edge.errors import UserError
from signround_edge.files import write_atomically


def certificate_files(folder: Path) -> list[Path]:
    """The files of a certificate in a folder."""
    return [folder / FILE_NAME, folder / "certificate.html"]


def write_certificate(report: VerifyReport, folder: Path) -> list[Path]:
    """Write both into a folder (made when needed); their paths.

    Raises:
        UserError: the folder cannot be written; what is there then is whole files, old or new.
    """
    assert report.evidence is not None, "only what `verify` returns can be certified"
    _, html = certificate_files(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document = certificate(report, report.evidence, folder)
        write_atomically(html, page(document).encode())
        return [write_document(document, folder), html]
    except OSError as error:
        raise UserError(
            f"--report {folder} cannot be written ({error.strerror or error}); give another folder"
        ) from error
