"""docs/options.md: every option of every command, none that does not exist, and the recipes as they are."""

from __future__ import annotations

import re
from dataclasses import fields
from fractions import Fraction

import click
import pytest

from signround_edge.cli import main
from signround_edge.transforms import TRANSFORMS
from signround_edge.tuning.settings import RECIPES, TuningSettings
from tests.docs.documents import code_spans, section, table_rows, text_of

PAGE = text_of("docs/options.md")
COMMON = {"-h", "--help", "--json"}


def options_of(command: str) -> dict[str, click.Option]:
    """Name → option, short and opposite names too, without --help."""
    found = [p for p in main.commands[command].params if isinstance(p, click.Option)]
    return {name: option for option in found for name in (*option.opts, *option.secondary_opts)}


def rows_of(command: str) -> dict[str, str]:
    """Option → the row of its table, in the command's section."""
    rows = [row for row in table_rows(section(PAGE, f"## {command}")) if row[0].startswith("`-")]
    return {name: " ".join(row[1:]) for row in rows for name in code_spans(row[0])}


def test_every_command_has_a_section_and_a_row() -> None:
    headings = set(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE))
    assert headings == set(main.commands)
    listed = [code_spans(row[0])[0] for row in table_rows(PAGE.partition("\n## ")[0])]
    assert sorted(listed) == sorted(main.commands)


@pytest.mark.parametrize("command", main.commands)
def test_the_options_are_those_of_the_command(command: str) -> None:
    assert set(rows_of(command)) == set(options_of(command)) - COMMON


@pytest.mark.parametrize("command", main.commands)
def test_choices_and_defaults_are_those_of_the_command(command: str) -> None:
    for name, text in rows_of(command).items():
        option = options_of(command)[name]
        if isinstance(option.type, click.Choice):
            assert set(option.type.choices) <= set(code_spans(text)), name
        given = re.search(r"Default: `?([\w.-]+?)`?(?:[.,;)]|$| )", text)
        if given and option.default is not None and option.show_default:
            default = option.default[0] if isinstance(option.default, tuple) else option.default
            assert given[1] == str(default), name


def test_every_transform_is_described() -> None:
    assert {*TRANSFORMS, "none"} <= set(code_spans(rows_of("quantize")["--transform"]))


def test_the_common_options() -> None:
    rows = {name: row for row in table_rows(section(PAGE, "## Every command")) for name in code_spans(row[0])}
    own = {name for option in main.params for name in option.opts}
    assert set(rows) == COMMON | own
    with_json = {command for command in main.commands if "--json" in options_of(command)}
    assert set(code_spans(rows["--json"][1])) == with_json


def test_the_table_of_recipes() -> None:
    head = re.search(r"^\| setting \| (.*) \|$", PAGE, re.MULTILINE)
    assert head is not None
    recipes = [name.strip() for name in head[1].split("|")]
    assert sorted(recipes) == sorted(RECIPES)
    table = PAGE[head.start() :].partition("\n\n")[0]
    shown = {code_spans(row[0])[0]: dict(zip(recipes, row[1:], strict=True)) for row in table_rows(table)}
    default = TuningSettings()
    differing = {
        f.name for f in fields(default) if any(getattr(r, f.name) != getattr(default, f.name) for r in RECIPES.values())
    }
    assert set(shown) == differing
    for setting, cells in shown.items():
        assert {name: cell_of(getattr(RECIPES[name], setting)) for name in recipes} == cells, setting


def cell_of(value: object) -> str:
    """A setting as the table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " to ".join(f"{number:g}" for number in value)
    if isinstance(value, float) and 0 < value < 0.01:
        return str(Fraction(value).limit_denominator(1000))
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_settings_without_an_option_are_named() -> None:
    known = {option.name for option in options_of("quantize").values()}
    without = {f.name for f in fields(TuningSettings)} - known
    paragraph = PAGE.partition("All other settings")[2].partition("### ")[0]
    assert without == set(code_spans(paragraph))
