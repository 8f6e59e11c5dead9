"""What accuracy level 4 costs on a model: the same graph with activations rounded to int8 and without."""

from __future__ import annotations

from pathlib import Path

from exporters.onnx.options import LevelCost
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.worker.onnxruntime_engine import model_file
from signround_edge.arguments import read_text
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import Windows

N_CTX, WINDOWS = 256, 8
# Measuring holds the model twice in memory; above this it waits to be asked for, since export itself needs little.
UNASKED_BYTES = 1_000_000_000
_FLAG = "--card-text"


def check_card_text(text: Path | None, config_dir: Path | None = None) -> None:
    """UserError when level 4 cannot be measured on a text: to be known before a long export.

    Args:
        text: as `level_4_cost` takes it.
        config_dir: folder with the tokenizer; None leaves it open whether the text is long enough.
    """
    if text is not None:
        read_text(_FLAG, text)
        if config_dir is not None:
            _windows(config_dir, text, N_CTX, WINDOWS)


def level_4_cost(folder: Path, config_dir: Path, text: Path | None) -> LevelCost | str:
    """What the card of an exported folder says of level 4: its cost, or why that was not measured.

    Args:
        folder: the exported folder.
        config_dir: folder with the tokenizer.
        text: what to measure on; None for the shipped speeches, and only as far as that is quick and possible.
    Raises:
        UserError: it cannot be measured on the given text.
    """
    if text is not None:
        return measure_level_4(folder, config_dir, text)
    model = model_file(folder)
    size = sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))
    if size > UNASKED_BYTES:
        return f"the model has {size / 1e9:.1f} GB, and measuring holds it twice in memory; export with --card-text"
    from signround_edge.demo import evaluation_text_path

    try:
        return measure_level_4(folder, config_dir, evaluation_text_path())
    except UserError as error:
        return str(error)


def measure_level_4(
    folder: Path, config_dir: Path, text: Path, n_ctx: int = N_CTX, windows: int = WINDOWS
) -> LevelCost:
    """Score an exported graph at level 4 against itself at level 1, both through ONNX Runtime on this CPU.

    Args:
        folder: the exported folder.
        config_dir: folder with the tokenizer.
        text: UTF-8 text; `windows` windows of `n_ctx` tokens of it, or of as many as the model can see.
    Raises:
        UserError: the text is too short, or ONNX Runtime refuses the graph.
    """
    from signround_edge.evaluation.perplexity import evaluate

    cut = _windows(config_dir, text, n_ctx, windows)
    with OnnxRuntime().open(folder, accuracy_level=1) as floats, OnnxRuntime().open(folder, accuracy_level=4) as int8:
        scores = evaluate(int8, cut, floats)
    assert scores.kld_mean is not None
    assert scores.ppl_reference is not None
    assert scores.top1_agreement is not None
    return LevelCost(scores.ppl_reference, scores.ppl, scores.kld_mean, scores.top1_agreement, scores.tokens, text.name)


def _windows(config_dir: Path, text: Path, n_ctx: int, windows: int) -> Windows:
    """Windows of `n_ctx` tokens, or of as many as the model can see."""
    from signround_edge.evaluation.perplexity import text_windows
    from signround_edge.model.config import longest_window

    return text_windows(config_dir, text, min(n_ctx, longest_window(config_dir) or n_ctx), windows, _FLAG)
