"""Chat templates in GGUF: the default one and those with names."""

from __future__ import annotations

import re
from collections.abc import Callable

import gguf

_KEYS = gguf.Keys.Tokenizer
_DEFAULT = "default"


def add_chat_templates(writer: gguf.GGUFWriter, templates: dict[str, str], log: Callable[[str], None]) -> None:
    """Write `tokenizer.chat_template`, one `tokenizer.chat_template.<name>` for each other, and the list of names.

    llama.cpp uses the default template, and `tool_use` where a request has tools (`common_chat_templates_init`); of
    others it reads nothing. A key may hold letters, digits and `_` only.
    """
    named: dict[str, str] = {}
    for name, template in sorted(templates.items(), key=lambda item: _key(item[0]) != item[0]):
        if name == _DEFAULT:
            continue
        key = _key(name)
        if key in named:
            log(f"chat template {name!r} was left out: in GGUF its name would be that of another one, {key!r}")
            continue
        if key != name:
            log(f"chat template {name!r} is called {key!r} in the file: GGUF keys have letters, digits and _ only")
        named[key] = template
    for key, template in named.items():
        writer.add_string(_KEYS.CHAT_TEMPLATE_N.format(name=key), template)
    if named:
        writer.add_array(_KEYS.CHAT_TEMPLATES, list(named))
    if _DEFAULT in templates:
        writer.add_string(_KEYS.CHAT_TEMPLATE, templates[_DEFAULT])
    elif named:
        instead = "tool_use" if "tool_use" in named else "its own ChatML"
        log(
            f"the model's chat templates ({', '.join(named)}) have no default one; llama.cpp will use {instead} unless "
            "it is given another (--chat-template-file)"
        )


def _key(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", name)
