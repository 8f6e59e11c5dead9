"""What will work for a checkpoint, said before anything heavy starts: no weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from signround_edge.errors import UserError

if TYPE_CHECKING:
    from signround_edge.model.weights import ModelWeights


@dataclass(frozen=True)
class Answer:
    """One step, whether it will work, and how, or why not with the way out."""

    step: str
    works: bool
    how: str


@dataclass(frozen=True)
class Outlook:
    """What will work.

    Attributes:
        model_type: of the language model, as config.json has it; None where it cannot be read.
        parameters: how many a run will hold; None where it cannot be built.
        answers: step by step.
        notes: what `quantize` will say of the checkpoint.
    """

    model_type: str | None
    parameters: int | None
    answers: list[Answer]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def outlook(model: str) -> Outlook:
    """Look at a model: a folder in Hugging Face layout, or a name such as "org/model" to download.

    Raises:
        UserError: there is no such model.
    """
    from signround_edge.model.source import resolve_model
    from signround_edge.model.weights import ModelWeights

    path = resolve_model(model)
    try:
        weights = ModelWeights.open(path)
    except UserError as error:
        return Outlook(None, None, [Answer("quantize", False, str(error))], [])
    config = _config(weights)
    names = [name for name, _ in weights.decoder.model.named_parameters()]
    count = sum(parameter.numel() for parameter in weights.decoder.model.parameters())
    answers = [Answer("quantize", True, f"{len(weights.decoder.blocks)} blocks of {weights.decoder.prefix}")]
    answers += _exports(config, names)
    return Outlook(str(config.get("model_type")), count, answers, weights.notes())


def _config(weights: ModelWeights) -> dict[str, Any]:
    """config.json as a run of the model will have it."""
    model: Any = weights.decoder.model
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def _exports(config: dict[str, Any], names: list[str]) -> list[Answer]:
    from signround_edge.plugins import exporters

    found = []
    for name, exporter in sorted(exporters().items()):
        if hasattr(exporter, "way"):  # one of a third party need not say it; see exporters.interface.KnowsItsWay
            step = f"export --format {name}"
            try:
                found.append(Answer(step, True, exporter.way(config, names)))
            except UserError as error:
                found.append(Answer(step, False, str(error)))
    return found
