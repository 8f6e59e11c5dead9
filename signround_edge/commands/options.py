"""Arguments and options that several commands have, and their types."""

from __future__ import annotations

from typing import Any

import click

from signround_edge.arguments import path_of
from signround_edge.tuning.settings import choices


def choice(setting: str) -> click.Choice[str]:
    """The command line's form of a setting that names a choice."""
    return click.Choice(choices(setting))


class _Path(click.Path):
    """A path; an empty text is none, which `click.Path` would take for the folder where the command runs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        assert param is not None
        return path_of(param.opts[0], value)


PATH = _Path()
model_argument = click.argument("model")
run_argument = click.argument("run", type=PATH)
text_option = click.option("--text", type=PATH, required=True, help="UTF-8 text to score.")
windows_option = click.option("--windows", type=int, default=None, help="Windows to score at most.")
n_ctx_option = click.option("--n-ctx", type=int, default=512, show_default=True, help="Tokens a window.")
cache_type_k_option = click.option("--cache-type-k", help="llama.cpp's cache of keys: f16, q8_0 or q4_0.")
cache_type_v_option = click.option("--cache-type-v", help="llama.cpp's cache of values: f16, q8_0 or q4_0.")
reference_option = click.option("--reference", default=None, help="The full-precision model to compare with.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
