"""docs/run-directory.md lists every format with the codes and fields that a run directory stores."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

from signround_edge.formats import ALIASES, GRIDS, get_grid
from signround_edge.formats.ggml_codebook import E2M1_TABLE, IQ4_TABLE
from signround_edge.formats.ggml_vectors import VectorGrid
from signround_edge.formats.grid import Grid
from signround_edge.formats.matmul_nbits import ONNX_BLOCKS
from signround_edge.manifest import Manifest
from signround_edge.run_directory import dtype_name
from tests.docs.documents import section, table_rows, text_of

PAGE = text_of("docs/run-directory.md")
ROWS = [row for row in table_rows(section(PAGE, "## Part files")) if len(row) == 4]
R, K = 3, 1024


def names_in(cell: str) -> list[str]:
    """The formats that a cell names: "Q4_0 (= w4g32)", or "w4g*N*" for every N that is no other format's."""
    found = []
    for name in re.sub(r" \(= \w+\)", "", cell).split(", "):
        each = [name.replace("*N*", str(n)) for n in ONNX_BLOCKS] if "*N*" in name else [name]
        found += [name for name in each if name not in ALIASES]
    return found


def fields_in(cell: str, grid: Grid) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Field → shape and dtype for a [R, K] matrix, as a cell gives them: names, dtype, shape; dtypes before a shape."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for group in re.findall(r"[^\[]*\[R, K/[^\]]*\]", cell):
        block = int(group.partition("K/")[2].rstrip("]").replace("*N*", str(grid.block_size)))
        for names, dtype in re.findall(r"((?:`\w+`(?:, )?)+) (\w+)", group):
            for name in re.findall(r"\w+", names):
                found[name] = (R, K // block), getattr(torch, dtype)
    return found


def ranges_in(cell: str, grid: Grid) -> dict[str, tuple[int, int]]:
    """Field → the range that follows its shape."""
    found = {}
    for names, low, high in re.findall(r"([^\[;]*) \[[^\]]*\], (-?\d+) to (2\^bits − 1|-?\d+)", cell):
        last = grid.code_max if "bits" in high else int(high)
        integers = [name for name in re.findall(r"`(\w+)`", names) if name.startswith(("sub", "zero", "scale_code"))]
        found |= {name: (int(low), last) for name in integers}
    return found


def test_every_format_is_listed_once() -> None:
    assert sorted(name for row in ROWS for name in names_in(row[0])) == sorted(GRIDS)
    aliases = [re.search(r"(\w+) \(= (\w+)\)", row[0]) for row in ROWS]
    assert {found[2]: found[1] for found in aliases if found} == ALIASES


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_codes_fields_and_ranges(row: list[str]) -> None:
    for name in names_in(row[0]):
        grid = get_grid(name)
        assert row[1] == dtype_name(grid.code_dtype)
        assert fields_in(row[2], grid) == grid.field_shapes(R, K), name
        assert ranges_in(row[2], grid) == dict(grid.field_ranges), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_weight_is_what_the_formula_says(row: list[str]) -> None:
    matrix = torch.randn(R, K, generator=torch.Generator().manual_seed(0))
    for name in names_in(row[0]):
        grid = get_grid(name)
        tensor = grid.quantize(matrix, grid.search(grid.blocked(matrix), torch.ones(1)))
        values = {field: spread(value, K) for field, value in tensor.fields.items()}
        bits = re.match(r"w(\d)", name)
        formula = row[3].replace("2^(bits−1)", str(1 << int(bits[1]) - 1) if bits else "")
        formula = formula.replace("·", "*").replace("−", "-").replace("^", "**")
        weight = eval(formula, {"code": tensor.codes.float(), **TABLES, **values})
        torch.testing.assert_close(weight, tensor.dequantize(), rtol=0, atol=0)


class Table:
    """The levels of codes that come as floats."""

    def __init__(self, levels: torch.Tensor) -> None:
        self.levels = levels.float()

    def __getitem__(self, codes: torch.Tensor) -> torch.Tensor:
        return self.levels[codes.long()]


def levels_shown(name: str) -> list[int]:
    """The levels that the page lists as `name`."""
    shown = re.search(rf"`{name}`\s+is\s+(?:llama\.cpp's )?(?:`\w+`(?: in order)?: )?([-\d,\s]+)\.", PAGE)
    assert shown is not None, name
    return [int(level) for level in shown[1].split(",")]


TABLES = {name: Table(torch.tensor(levels_shown(name))) for name in ("table", "e2m1", "iq2", "iq3")}
TABLES["e4m3"] = Table(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn))


def spread(field: torch.Tensor, columns: int) -> torch.Tensor:
    """A field [R, blocks] as f32 [R, columns], each value once for every column of its block."""
    return field.float().repeat_interleave(columns // field.shape[1], dim=1)


def test_the_tables_of_levels() -> None:
    assert levels_shown("table") == list(IQ4_TABLE)
    assert levels_shown("e2m1") == list(E2M1_TABLE)
    for name, grid in (("iq2", "IQ2_XXS"), ("iq2", "IQ2_S"), ("iq3", "IQ3_XXS")):
        vectors = get_grid(grid)
        assert isinstance(vectors, VectorGrid)
        assert levels_shown(name) == list(vectors.table)


def test_fields_of_the_manifest() -> None:
    rows = table_rows(section(PAGE, "## manifest.json (schema version 1)"))
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert documented == {field.name for field in fields(Manifest)} | {"state"}
