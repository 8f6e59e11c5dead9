"""Keys that llama.cpp's converter writes and gguf-py 0.19 has no function for, to be deleted with its next release.

Source: gguf-py/gguf/constants.py and gguf_writer.py of llama.cpp, build 11549.
"""

from __future__ import annotations

import gguf


def add_recurrent_layers(writer: gguf.GGUFWriter, layers: list[bool]) -> None:
    """Which layers have a state rather than keys and values."""
    writer.add_array(f"{writer.arch}.attention.recurrent_layers", layers)
