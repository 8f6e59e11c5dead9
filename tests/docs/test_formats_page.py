"""docs/formats.md says what the tables of formats and schemes say."""

from __future__ import annotations

import re

import pytest

from signround_edge.errors import UserError
from signround_edge.formats import ALIASES, GRIDS, get_grid
from signround_edge.formats.grid import Grid
from signround_edge.formats.matmul_nbits import ONNX_BITS, ONNX_BLOCKS, has_matmul_nbits_form, matmul_nbits_bytes
from signround_edge.schemes.gguf_presets import GGUF_PRESETS, ModelTraits, Place, Role
from signround_edge.schemes.scheme import PRESET_ALIASES, after_fallback, fallback, known_schemes, parse_scheme
from tests.docs.documents import code_spans, section, table_rows, text_of

PAGE = text_of("docs/formats.md")
BLOCK_TYPES = 30  # rows of the first table of that section
WIDE = 4096  # values a row, which every block divides


def grids_named(cell: str) -> list[Grid]:
    """The grids that a cell names: "Q4_0", or "w4g*N*" for every N."""
    names = [name.strip() for name in cell.split(",")]
    return [get_grid(name.replace("*N*", str(n))) for name in names for n in (ONNX_BLOCKS if "*N*" in name else (0,))]


def has_form(name: str) -> bool:
    """Whether a type can be stored as MatMulNBits."""
    return has_matmul_nbits_form(get_grid(name))


def test_gguf_schemes() -> None:
    traits = ModelTraits(layers=32)
    found = {}
    for scheme, base, others, embedding, head in table_rows(section(PAGE, "## GGUF schemes")):
        name, *aliases = (text.removeprefix("gguf:") for text in code_spans(scheme))
        preset = GGUF_PRESETS[name]
        assert [preset.base, bool(preset.rules or preset.experts)] == [base, bool(others)]
        assert preset.format_of(Place(Role.EMBEDDING), traits, WIDE) == embedding
        assert preset.format_of(Place(Role.OUTPUT), traits, WIDE) == head
        found[name] = aliases
    assert sorted(found) == sorted(GGUF_PRESETS)
    assert {alias: name for name, aliases in found.items() for alias in aliases} == PRESET_ALIASES


def test_onnx_schemes() -> None:
    sizes = [int(number) for number in re.findall(r"\d+", table_rows(section(PAGE, "## ONNX schemes"))[0][1])]
    assert sizes == [*ONNX_BITS, *ONNX_BLOCKS]
    patterns = [name for row in table_rows(section(PAGE, "## ONNX schemes")) for name in code_spans(row[0])]
    schemes = {p.replace("B", str(b)).replace("N", str(n)) for p in patterns for b in ONNX_BITS for n in ONNX_BLOCKS}
    assert schemes == {scheme for scheme in known_schemes() if scheme.startswith("onnx:")}


def test_block_types() -> None:
    seen = set()
    for name, block, multiple, codes, bits, otherwise in table_rows(section(PAGE, "## Block types"))[:BLOCK_TYPES]:
        for grid in grids_named(name):
            n = grid.block_size
            assert [text.replace("*N*", str(n)) for text in (block, multiple)] == [str(n), str(grid.row_multiple)]
            assert codes == f"{grid.code_min} to {grid.code_max}"
            if "*N*" in name:
                assert [bits, otherwise] == ["below", f"half of *N*, down to {ONNX_BLOCKS[0]}"]
                half = after_fallback(grid, n // 2, ("onnx",))
                assert (half.block_size if half else None) == (n // 2 if n > ONNX_BLOCKS[0] else None)
            else:
                assert [bits, otherwise] == [f"{grid.bits_per_weight:g}", fallback(grid.name) or ""]
            seen.add(grid.name)
    assert seen == set(GRIDS)


def test_bits_a_weight_in_onnx_files() -> None:
    rows = table_rows(section(PAGE, "## Block types"))[BLOCK_TYPES:]
    assert [row[0] for row in rows] == [str(bits) for bits in ONNX_BITS]
    for bits, *cells in rows:
        for block, cell in zip(ONNX_BLOCKS, cells, strict=True):
            for kind in ("", "-asym"):
                size = matmul_nbits_bytes(get_grid(f"w{bits}g{block}{kind}"), 256, WIDE)
                assert size is not None
                assert 8 * size / (256 * WIDE) == float(cell)


def test_what_one_run_can_feed() -> None:
    text = section(PAGE, "## One run for both files")
    joined = re.findall(r"`gguf:(\w+)` and `onnx:(\w+)`", text)
    assert {onnx: gguf.upper() for gguf, onnx in joined} == ALIASES
    for gguf, onnx in joined:
        assert parse_scheme(f"gguf:{gguf},onnx:{onnx}").targets == ("gguf", "onnx")
    with pytest.raises(UserError, match="do not share a grid"):
        parse_scheme("gguf:q4_0,onnx:w4g64")
    runs = re.search(r"Runs of\s(.*?) can be exported", text, re.DOTALL)
    assert runs is not None
    uniform = {f"gguf:{name}": preset for name, preset in GGUF_PRESETS.items() if not preset.rules}
    types = {scheme: (p.base, p.output, p.embedding or p.base, p.experts or p.base) for scheme, p in uniform.items()}
    assert code_spans(runs[1]) == [scheme for scheme, names in types.items() if all(map(has_form, names))]
    formless = set(re.findall(r"I?Q\d_\w+|\w+FP4", text.partition("Types with")[2]))
    assert formless == {name for name in GRIDS if not has_form(name)}
