"""What accuracy level 4 costs on a model: the same graph with activations rounded to int8 and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exporters.interface import LevelCost
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from signround_edge.errors import UserError

N_CTX, WINDOWS = 256, 8
# Measuring holds the model twice in memory; above this it waits to be asked for, since export itself needs little.
UNASKED_BYTES = 1_000_000_000


def level_4_measurement(config_dir: Path, text: Path | None) -> Callable[[Path], LevelCost | str]:
    """What `export` does to learn the cost of level 4: measure it on a text, by default the shipped speeches.

    Raises:
        UserError: the given text does not exist.
    """
    if text is not None and not text.is_file():
        raise UserError(f"--card-text {text} does not exist; give a UTF-8 text file, or leave it out")

    def measure(folder: Path) -> LevelCost | str:
        size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        if text is None and size > UNASKED_BYTES:
            return f"the model has {size / 1e9:.1f} GB, and measuring holds it twice in memory; export with --card-text"
        from signround_edge.demo import evaluation_text_path

        try:
            return measure_level_4(folder, config_dir, text or evaluation_text_path())
        except UserError as error:
            if text is not None:
                raise
            return str(error)

    return measure


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
    from signround_edge.evaluation.perplexity import evaluate, text_windows
    from signround_edge.model.config import longest_window

    n_ctx = min(n_ctx, longest_window(config_dir) or n_ctx)
    cut = text_windows(config_dir, text, n_ctx, windows)
    with OnnxRuntime().open(folder, accuracy_level=1) as floats, OnnxRuntime().open(folder, accuracy_level=4) as int8:
        scores = evaluate(int8, cut, floats)
    assert scores.kld_mean is not None
    assert scores.ppl_reference is not None
    assert scores.top1_agreement is not None
    return LevelCost(scores.ppl_reference, scores.ppl, scores.kld_mean, scores.top1_agreement, scores.tokens, text.name)
