"""What an exporter is. Exporters are found through the entry points `signround_edge.exporters`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from signround_edge.errors import UserError
from signround_edge.inspection import TensorInfo

if TYPE_CHECKING:  # torch and numpy, which the command line's start can do without
    import numpy as np
    from numpy.typing import NDArray

    from signround_edge.run_directory import RunDirectory

DTYPES = ("f32", "f16")


@dataclass(frozen=True)
class ExportOptions:
    """Options of `signround-edge export` that every format has; a format with more of them has a class of its own.

    Attributes:
        dtype: None packs the integers; one of `DTYPES` writes the dequantized weights as floats instead.
        template: a file of the target format whose metadata and naming (GGUF) or graph (ONNX) to keep.
        split_max_bytes: split the model's data into files of at most so many bytes.
        log: called with one line of progress.
    Raises:
        UserError: an option has a value that there is not.
    """

    dtype: str | None = None
    template: Path | None = None
    split_max_bytes: int | None = None
    log: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise UserError(
                f"--dtype {self.dtype} is unknown; give {' or '.join(DTYPES)}, or leave it out to pack the integers"
            )


class ExpectedTensor(NamedTuple):
    """What a stored tensor should hold.

    Attributes:
        name: the artifact's name of the tensor; the runtime's `stored_tensors` gives it the same one.
        weights: makes them, f32 [rows, values a row] in the artifact's own orientation and order of rows.
    """

    name: str
    weights: Callable[[], NDArray[np.float32]]


class Exporter(Protocol):
    """Turns a complete run directory into an artifact; packs bits, never rounds a weight.

    Attributes:
        name: of the format, as `--format` has it.
        options: the class of its options: `ExportOptions`, or one derived from it. Their names are the command's flags.
    """

    name: str

    @property
    def options(self) -> type[ExportOptions]: ...

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like this exporter's format (cheap; it may still be broken)."""
        ...

    def inspect(self, path: Path) -> list[TensorInfo]:
        """Tensors of an artifact; UserError when it is truncated or broken."""
        ...

    def export(self, run: RunDirectory, out: Path, options: ExportOptions) -> Path:
        """Write the artifact at `out` (whole or not at all) and return the path that a runtime loads.

        Options of `ExportOptions` itself leave all that is the format's own at its defaults.
        """
        ...

    def iter_expected(self, run: RunDirectory, artifact: Path) -> Iterator[ExpectedTensor]:
        """What each tensor of an artifact that stems from the run should hold, computed from the run's own data.

        `verify` compares it with what the runtime's dequantizer gives; a tensor that only one of them has is a failure.

        Raises:
            UserError: the artifact is damaged.
            CheckFailed: it lacks a parameter of the run.
        """
        ...


class KnowsItsWay(Protocol):
    """An exporter that can say, before anything heavy, how it would export a model."""

    def way(self, config: Mapping[str, Any], parameters: Sequence[str]) -> str:
        """In a few words, how a run of the model gets its file; UserError where it needs a template, or gets none.

        Args:
            config: config.json of the language model.
            parameters: names of the parameters that a run of it has.
        """
        ...


class FileSizes(Protocol):
    """How large the file of a run will be, to the byte, without the run's codes."""

    def tensor_bytes(self, run: RunDirectory) -> dict[tuple[str, ...], int]:
        """Parameters that are in one tensor of the file → its bytes, padding included.

        Parameters in one tensor have one type. {} where only the bytes of all are known.
        """
        ...

    def file_bytes(self, run: RunDirectory) -> int | None:
        """Bytes of all that a runtime reads: the file, or the folder but for notes about it. None: not known before."""
        ...

    def one_node(self, run: RunDirectory) -> dict[tuple[str, ...], tuple[str, ...]]:
        """Parameters that a runtime computes much faster where they have one of some types → these types."""
        ...


class KnowsItsSize(Protocol):
    """An exporter that can say how large its files will be."""

    def sizes(self, options: ExportOptions, kept: Path) -> FileSizes:
        """The sizes of one model's files.

        Args:
            options: of the export.
            kept: a folder for what takes long and is the same for all types of a model; it may be removed at any time.
        """
        ...


def options_for(target: str, known: Mapping[str, Exporter], given: Mapping[str, object]) -> ExportOptions:
    """The options of one exporter, made of what a command was given.

    Args:
        target: the format.
        known: every format's exporter.
        given: name of an option → its value; None where it was not given.
    Raises:
        UserError: an option that is not of this format, or a value that there is not.
    """
    options = known[target].options
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in _names(options):
            raise foreign_option(name, [f for f, exporter in known.items() if name in _names(exporter.options)], target)
    return options(**chosen)  # type: ignore[arg-type]


def foreign_option(name: str, formats: Sequence[str], target: str) -> UserError:
    """The error of an option that is for other formats than the target."""
    flag = f"--{name.replace('_', '-')}"
    return UserError(f"{flag} is for --format {' or '.join(formats)}; leave it out for {target.upper()}")


def _names(options: type[ExportOptions]) -> set[str]:
    return {field.name for field in fields(options)}
