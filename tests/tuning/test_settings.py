"""Settings are checked where they are made, from Python as from the command line."""

from __future__ import annotations

import re

import pytest

from signround_edge.cli import quantize as quantize_command
from signround_edge.errors import UserError
from signround_edge.tuning.settings import RECIPES, TuningSettings, choices, settings_from

NAMES = [name for name in vars(TuningSettings()) if choices(name)]


def test_the_settings_that_name_a_choice() -> None:
    assert NAMES == [
        "start", "positions", "scale_init", "loss", "granularity", "optimizer", "compute_dtype", "hidden_dtype",
        "transforms",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_choice_is_refused_with_the_choices(name: str) -> None:
    value = ("gpqt",) if name == "transforms" else "gpqt"
    with pytest.raises(UserError, match=f"gpqt is unknown; known are {choices(name)[0]}"):
        TuningSettings(**{name: value})
    with pytest.raises(UserError, match="gpqt is unknown"):
        settings_from("fast", {name: value})


@pytest.mark.parametrize("name", NAMES)
def test_docstring_and_command_line_have_the_same_choices(name: str) -> None:
    options = {parameter.name: parameter for parameter in quantize_command.params}
    if name == "transforms":  # several at once, and "none" on the command line: it is no click.Choice
        assert (options[name].help or "").startswith(f"{', '.join(choices(name))}, none: ")  # type: ignore[attr-defined]
        return  # the docstring refers to `signround_edge.transforms`
    assert tuple(options[name].type.choices) == choices(name)  # type: ignore[attr-defined]
    text = re.search(rf"^        {name}: (.*?)(?=^        \w+(, \w+)*: |\Z)", TuningSettings.__doc__ or "", re.M | re.S)
    assert text is not None
    assert all(f'"{choice}"' in text[1] for choice in choices(name))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": -1}, "--steps -1 must be at least 0"),
        ({"steps": 1.5}, "--steps 1.5 must be a whole number"),
        ({"samples": True}, "--samples True must be a whole number"),
        ({"lr": 0.0}, "--lr 0.0 must be above 0"),
        ({"held_out": 1.0}, "held_out 1.0 must be above 0 and below 1"),
        ({"scale_range": (1.2, 1.5)}, "scale_range"),
        ({"seed": 2**32}, "--seed 4294967296 must be at least 0 and at most 4294967295"),
        ({"seed": 10**23}, "--seed 100000000000000000000000 must be at least 0 and at most 4294967295"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
        ({"seed": "1"}, "--seed 1 must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        TuningSettings(**settings)  # type: ignore[arg-type]


def test_recipes_are_settings() -> None:
    assert settings_from("fast", {"steps": 3, "lr": None}).steps == 3
    assert all(isinstance(recipe, TuningSettings) for recipe in RECIPES.values())
