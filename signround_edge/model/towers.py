"""What a checkpoint holds beside its language model: towers for images and sound, and what projects their output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.files import sha256_of
from signround_edge.model.config import CONFIG_FILE
from signround_edge.model.decoder import whole_model
from signround_edge.model.language_model import name_of, reads_more_than_text
from signround_edge.model.matching import match_names
from signround_edge.model.source import SourceModel


@dataclass(frozen=True)
class WholeCheckpoint:
    """The tensors of a model that reads more than text, under the names that transformers' whole model has.

    Attributes:
        source: the folder as stored.
        config: config.json as transformers reads it, with its defaults; `text_config` and `vision_config` inside.
        towers: names of the parameters and stored buffers that are no part of the language model.
        embedding: name of the token embedding.
        stored: name → that in the files, of all that is stored as it is.
    """

    source: SourceModel
    config: dict[str, Any]
    towers: frozenset[str]
    embedding: str
    stored: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> WholeCheckpoint:
        """Read config and headers, no weights.

        Raises:
            UserError: no such model, one that reads text only, or a tensor of the towers that is missing or of another
                shape.
        """
        source, model = SourceModel.open(path), whole_model(path)
        if not reads_more_than_text(model.config):
            raise UserError(f"{path} reads text only, so it has no towers; leave --mmproj out")
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        stored = match_names(source, model).direct
        decoder = f"{name_of(model, model.get_decoder())}."
        head = f"{name_of(model, model.get_output_embeddings())}."
        towers = frozenset(name for name in shapes if not name.startswith((decoder, head)))
        for name in sorted(towers):
            if name not in stored:
                raise UserError(
                    f"{path}: tensor {name} is missing from the safetensors files; download the model again"
                )
            if source.shapes[stored[name]] != shapes[name]:
                raise UserError(
                    f"{path}: tensor {name} is {list(source.shapes[stored[name]])} but config.json asks for "
                    f"{list(shapes[name])}; weights and config are not of the same model"
                )
        embedding = f"{name_of(model, model.get_input_embeddings())}.weight"
        return cls(source, model.config.to_dict(), towers, embedding, stored)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        return self.source.tensor(self.stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self.source.shapes[self.stored[name]]

    def changed_file(self, known: dict[str, str], names: set[str]) -> str | None:
        """Of config.json and the files that hold some tensors, the first that is not as it was; None where all are.

        Args:
            known: file name → sha256, of all that there was.
            names: of the tensors.
        """
        files = sorted({self.source.files[self.stored[name]] for name in names})
        return next((f for f in (CONFIG_FILE, *files) if known.get(f) != sha256_of(self.source.path / f)), None)
