"""The converter's process (see `llama_converter`): `python -I llama_converter_process.py FOLDER`, a JSON job a line.

Each job is answered by a line: null, or what went wrong. Three things are other than in llama.cpp's program: the family
classes are loaded once for all jobs; a tokenizer whose hash is unknown, as that of every newly trained one, gets the
name that the job gives; a byte-level tokenizer stands in where a family asks for tokenizer.model and there is none.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

_SHOWN = 1500


def main() -> None:
    """Answer jobs until the input ends."""
    folder = Path(sys.argv[1])
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    import torch

    torch.set_num_threads(1)  # no threads, so that forks are sound
    program = importlib.import_module("convert_hf_to_gguf")
    importlib.import_module("conversion").load_all_models()
    for name in ("sentencepiece", "transformers.models.auto.tokenization_auto"):  # once, not in each fork
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed on the way is no answer
    for line in sys.stdin:
        answers.write(json.dumps(_in_a_fork(program, json.loads(line))) + "\n")
        answers.flush()


def _in_a_fork(program: Any, job: dict[str, Any]) -> str | None:
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status = 1
            try:
                _convert(program, job)
                status = 0
            except BaseException:  # also SystemExit; the child must end here
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return None
        log.seek(0)
        return log.read().decode(errors="replace")[-_SHOWN:] or "it died"


def _convert(program: Any, job: dict[str, Any]) -> None:
    text_model = importlib.import_module("conversion.base").TextModel
    known = text_model.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if job["pre"] is None:
                raise
            return str(job["pre"])

    text_model.get_vocab_base_pre = named
    for family in _subclasses(text_model):
        if "set_vocab" in vars(family):
            family.set_vocab = _with_stand_in(family.set_vocab)
    sys.argv[1:] = job["arguments"]
    program.main()


def _with_stand_in(set_vocab: Any) -> Any:
    def set_any_vocab(self: Any) -> None:
        try:
            set_vocab(self)
        except (FileNotFoundError, ValueError, KeyError):  # the last: a special token of the family is not there
            if (Path(self.dir_model) / "tokenizer.model").exists():
                raise
            self._set_vocab_gpt2()

    return set_any_vocab


def _subclasses(cls: type) -> list[type]:
    return [cls, *(each for child in cls.__subclasses__() for each in _subclasses(child))]


if __name__ == "__main__":
    main()
