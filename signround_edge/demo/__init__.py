"""The tiny trained Llama and its two texts, shipped as package data.

`signround-edge demo` and the tests run on them, so both work from an installed wheel and without a network.
`train_tiny_llama.py` made all of it. Nothing heavy is imported here.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def tiny_llama_path() -> Path:
    """Folder of the tiny model in Hugging Face layout (float16 safetensors, byte-level BPE tokenizer)."""
    return _HERE / "tiny-llama"


def calibration_text_path() -> Path:
    """About 200 kB of the text that the tiny model was trained on (UTF-8)."""
    return _HERE / "speeches-train.txt"


def evaluation_text_path() -> Path:
    """About 40 kB of speeches that the tiny model has never seen (UTF-8)."""
    return _HERE / "speeches-test.txt"
