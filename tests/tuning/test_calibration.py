"""Where calibration samples come from, how they are cut, and that each begins as the model's texts do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM

from exporters.gguf.imatrix.file import read_imatrix
from exporters.gguf.imatrix.importance import ImatrixSink
from signround_edge.errors import UserError
from signround_edge.inspection import inspect
from signround_edge.model.tokenizer import added_bos, load_tokenizer
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.terminal.inspection import render
from signround_edge.tuning.calibration.text import calibration_tokens
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

BOS = 0  # of the shipped model, whose tokenizer adds it
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def chat(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with a chat template, which writes BOS itself, as most do."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def without_bos(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer adds nothing."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["add_bos_token"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def written(folder: Path, *rows: Any) -> str:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_windows_of_a_text_are_spread_over_all_of_it(tokenizer: Any, calibration_text: Path) -> None:
    samples = calibration_tokens(str(calibration_text), tokenizer, 8, 64)
    whole = torch.tensor(tokenizer(calibration_text.read_text(encoding="utf-8"))["input_ids"])
    assert samples.shape == (8, 64)
    assert torch.equal(samples[0], whole[:64])
    assert torch.equal(samples[-1][1:], whole[-63:])


def test_bos_stands_once_in_front_of_each_window(tokenizer: Any, calibration_text: Path) -> None:
    samples = calibration_tokens(str(calibration_text), tokenizer, 1000, 64)
    assert len(samples) > 500
    assert (samples[:, 0] == BOS).all()
    assert not (samples[:, 1:] == BOS).any()
    text = tokenizer(calibration_text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert torch.equal(samples[1], torch.tensor([BOS, *text[63 : 2 * 63]]))  # as many windows as the text holds


def test_a_tokenizer_that_adds_nothing_gets_text_alone(without_bos: Path, calibration_text: Path) -> None:
    plain = load_tokenizer(without_bos)
    assert added_bos(plain) is None
    samples = calibration_tokens(str(calibration_text), plain, 8, 64)
    whole = torch.tensor(plain(calibration_text.read_text(encoding="utf-8"))["input_ids"])
    assert torch.equal(samples[0], whole[:64])
    assert torch.equal(samples[-1], whole[-64:])
    assert not (samples == BOS).any()


def test_short_text_gives_fewer_samples(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The state of the union is strong. " * 30, encoding="utf-8")
    samples = calibration_tokens(str(tmp_path / "short.txt"), tokenizer, 1000, 32)
    assert 1 < len(samples) < 1000


def test_json_lines_give_their_beginnings_and_short_ones_are_joined(tokenizer: Any, tmp_path: Path) -> None:
    long, short = "We the people of the United States. " * 20, "A more perfect union. "
    rows = [{"text": long}, *({"text": short} for _ in range(30)), {"content": long}]
    samples = calibration_tokens(written(tmp_path, *rows), tokenizer, 100, 32)
    beginning = torch.tensor(tokenizer(long)["input_ids"][:32])
    assert torch.equal(samples[0], beginning)
    assert torch.equal(samples[-1], beginning)
    assert len(samples) > 3
    assert (samples[:, 0] == BOS).all()
    joined = [t for _ in range(30) for t in tokenizer(short)["input_ids"]]  # documents keep theirs
    first, second = joined[:32], joined[32:]
    assert samples[1].tolist() == first
    assert second[0] != BOS
    assert samples[2].tolist() == [BOS, *second[:31]]


def test_a_text_that_brings_its_own_bos_gets_no_second_one(tokenizer: Any, tmp_path: Path) -> None:
    text = "We the people of the United States. " * 20
    marked = calibration_tokens(written(tmp_path, {"text": tokenizer.bos_token + text}), tokenizer, 1, 32)
    assert torch.equal(marked, calibration_tokens(written(tmp_path, {"text": text}), tokenizer, 1, 32))


def test_half_a_surrogate_pair_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 holds half of a surrogate pair"):
        calibration_tokens(written(tmp_path, {"text": "the \ud800 people " * 20}), tokenizer, 1, 32)


def test_json_strings_may_hold_line_separators_and_the_file_a_bom(tokenizer: Any, tmp_path: Path) -> None:
    text = "We the people\u2028of the United\x85States. \x0c" * 20
    file = tmp_path / "texts.jsonl"
    file.write_text("\ufeff" + json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (sample,) = calibration_tokens(str(file), tokenizer, 4, 32).tolist()
    assert sample == tokenizer(text)["input_ids"][:32]


def test_a_plain_text_may_begin_with_a_bom(tokenizer: Any, tmp_path: Path) -> None:
    text = "We the people of the United States. " * 20
    (tmp_path / "text.txt").write_text("\ufeff" + text, encoding="utf-8")
    assert calibration_tokens(str(tmp_path / "text.txt"), tokenizer, 1, 32).tolist() == [
        tokenizer(text)["input_ids"][:32]
    ]


def test_prompt_and_completion_both_count(tokenizer: Any, tmp_path: Path) -> None:
    prompt, completion = "Who formed this union? ", "We the people of the United States. " * 10
    (sample,) = calibration_tokens(written(tmp_path, {"prompt": prompt, "completion": completion}), tokenizer, 4, 32)
    assert sample.tolist() == tokenizer(prompt + completion)["input_ids"][:32]


QUESTION = {"role": "user", "content": "Who formed this union? " * 4}
ANSWER = {"role": "assistant", "content": "We the people of the United States. " * 4}
AS_PARTS = {"role": "user", "content": [{"type": "text", "text": QUESTION["content"]}]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [AS_PARTS, ANSWER]},
        {"prompt": "Who formed this union?", "messages": [QUESTION, ANSWER]},  # as in UltraChat
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": QUESTION["content"], "completion": [ANSWER]},
        {"prompt": [QUESTION], "completion": ANSWER["content"]},
    ],
)
def test_messages_are_what_the_chat_template_makes_of_them(row: dict[str, Any], chat: Any, tmp_path: Path) -> None:
    expected = chat.apply_chat_template([QUESTION, ANSWER], tokenize=True, return_dict=False)
    assert expected[0] == BOS
    (sample,) = calibration_tokens(written(tmp_path, row), chat, 4, len(expected)).tolist()
    assert sample == expected


def test_a_chat_template_without_bos_gets_what_the_tokenizer_adds(chat: Any, tmp_path: Path) -> None:
    own = chat.chat_template
    chat.chat_template = own.removeprefix("{{ bos_token }}")
    try:
        sample = calibration_tokens(written(tmp_path, {"messages": [QUESTION, ANSWER]}), chat, 4, 32)
    finally:
        chat.chat_template = own
    assert torch.equal(sample, calibration_tokens(written(tmp_path, {"messages": [QUESTION, ANSWER]}), chat, 4, 32))


def test_messages_without_a_chat_template_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"texts.jsonl line 1 holds chat messages, but .* has no chat template; add"):
        calibration_tokens(written(tmp_path, {"messages": [QUESTION]}), tokenizer, 4, 32)


IMAGE = {"type": "image_url", "image_url": {"url": "flag.png"}}


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user", "content": [IMAGE]}, "part of type 'image_url'; calibration reads text only, not yet images"),
        ({"role": "user", "content": 7}, "a message whose content is no text"),
        ({"content": "Who?"}, "a message without a role"),
        ("Who?", "a message without a role"),
        ({"role": "narrator", "content": "Silence."}, r"chat template refuses these messages \(no such role\)"),
    ],
)
def test_messages_that_give_no_text_are_refused(message: Any, sentence: str, chat: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"texts.jsonl line 2.*{sentence}"):
        calibration_tokens(written(tmp_path, {"messages": [QUESTION]}, {"messages": [message]}), chat, 400, 32)


@pytest.mark.parametrize("name", ["a.jsonl", "texts.jsonlines", "texts.ndjson", "TEXTS.JSONL"])
def test_json_lines_are_known_by_their_endings(name: str, tokenizer: Any, tmp_path: Path) -> None:
    text = "We the people of the United States. " * 20
    shutil.copy(written(tmp_path, {"text": text}), tmp_path / name)
    (sample,) = calibration_tokens(str(tmp_path / name), tokenizer, 4, 32).tolist()
    assert sample == tokenizer(text)["input_ids"][:32]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_its_rows(indent: int | None, tokenizer: Any, tmp_path: Path) -> None:
    texts = [f"{word} the people of the United States. " * 20 for word in ("We", "You")]
    (tmp_path / "texts.json").write_text(json.dumps([{"text": texts[0]}, texts[1]], indent=indent), encoding="utf-8")
    samples = calibration_tokens(str(tmp_path / "texts.json"), tokenizer, 4, 32).tolist()
    assert samples == [tokenizer(text)["input_ids"][:32] for text in texts]


@pytest.mark.parametrize(
    ("row", "kind"), [(5, "a number"), (["a"], "an array"), (True, "true or false"), (None, "null")]
)
def test_a_row_that_is_no_object_is_refused(row: Any, kind: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"texts.jsonl line 2 is {kind}; give an object or a text"):
        calibration_tokens(written(tmp_path, "We the people", row), tokenizer, 4, 32)
    (tmp_path / "texts.json").write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(UserError, match=rf"texts.json row 1 is {kind}; give an object or a text"):
        calibration_tokens(str(tmp_path / "texts.json"), tokenizer, 4, 32)


def test_empty_texts_give_nothing(tokenizer: Any, tmp_path: Path) -> None:
    """A BOS for each would make samples of nothing else."""
    with pytest.raises(UserError, match="has fewer than 32 tokens; give more text"):
        calibration_tokens(written(tmp_path, *({"text": text} for text in ("", " \n") * 100)), tokenizer, 4, 32)
    short = {"text": "A more perfect union. "}
    mixed = calibration_tokens(written(tmp_path, *[{"text": ""}, short] * 30), tokenizer, 4, 32)
    assert torch.equal(mixed, calibration_tokens(written(tmp_path, *[short] * 30), tokenizer, 4, 32))


def test_a_row_without_text_is_refused(chat: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 has none of the keys messages, text, content, prompt; rename"):
        calibration_tokens(written(tmp_path, {"body": "We the people"}), chat, 4, 32)


def test_dataset_by_name(tokenizer: Any, tmp_path: Path) -> None:
    """A folder is a dataset name too, so the real `datasets` library reads it without a network."""
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    folder = tmp_path / "speeches"
    folder.mkdir()
    rows = [{"text": f"Speech {i}. " + "My fellow citizens, " * 20} for i in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert calibration_tokens(str(folder), tokenizer, 4, 32).shape == (4, 32)


def test_dataset_that_cannot_be_had(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    with pytest.raises(UserError, match="is neither a file nor a dataset that could be read"):
        calibration_tokens(str(tmp_path), tokenizer, 4, 32)


SMALL = TuningSettings(steps=0, samples=4, seqlen=32, batch_size=2)


def test_the_run_says_which_token_stands_in_front(
    tiny_llama: Path, without_bos: Path, tmp_path: Path, calibration_text: Path
) -> None:
    for model, token, words in ((tiny_llama, BOS, "each behind BOS (token 0)"), (without_bos, None, "without BOS")):
        run = quantize(model, parse_scheme("gguf:q4_0"), tmp_path / str(token), str(calibration_text), SMALL)
        assert run.manifest.settings["calibration_bos"] == token
        found = inspect(run.path)
        assert found.to_json()["calibration"] == {"seqlen": 32, "bos": token}
        assert words in str(render(found).caption)


def test_a_run_of_windows_without_bos_is_not_continued_with_it(
    tiny_llama: Path, tmp_path: Path, calibration_text: Path
) -> None:
    arguments = (tiny_llama, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SMALL)
    run = quantize(*arguments)
    assert quantize(*arguments, resume=True).manifest.state == "complete"
    older = {k: v for k, v in run.manifest.settings.items() if k != "calibration_bos"}
    document = replace(run.manifest, settings={**older, "calibration_sha256": "0" * 64}).to_json()
    (run.path / "manifest.json").write_text(document, encoding="utf-8")
    assert "calibration" not in inspect(run.path).to_json()
    with pytest.raises(UserError, match="cannot be resumed: its calibration_bos is None, not 0"):
        quantize(*arguments, resume=True)


def test_importance_is_collected_behind_bos(tiny_llama: Path, tmp_path: Path, calibration_text: Path) -> None:
    """The first q_proj reads normalised embeddings, so its E[x²] tells which tokens were seen."""
    file, settings = tmp_path / "imatrix.gguf", replace(SMALL, loss="mse", compute_dtype="float32")
    sink = ImatrixSink(file, tiny_llama, "speeches")
    quantize(
        tiny_llama, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), settings, save_imatrix=sink
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).model
    text = load_tokenizer(tiny_llama)(calibration_text.read_text(encoding="utf-8"), add_special_tokens=False)[
        "input_ids"
    ]
    starts = [int(i * (len(text) - 31) / 3) for i in range(4)]
    tokens = torch.tensor([[BOS, *text[start : start + 31]] for start in starts])
    expected = model.layers[0].input_layernorm(model.embed_tokens(tokens)).flatten(0, 1).square().mean(0)
    found = torch.from_numpy(read_imatrix(file)["blk.0.attn_q.weight"])
    assert torch.allclose(found, expected, rtol=1e-3)
