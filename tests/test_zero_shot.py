"""`evaluate --tasks`: the figures are those of the harness's own Hugging Face model, on every kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_command_line import json_of, run_cli

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'signround-edge[tasks]')")

CHOICE = """
task: speech_choice
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{endings}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
task: speech_last_word
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: loglikelihood
doc_to_text: "{{start}}"
doc_to_target: "{{endings[label]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TEXT_PERPLEXITY = """
task: speech_text
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GENERATED = """
task: speech_generated
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{endings[label]}}"
"""
TASKS = "speech_choice,speech_last_word,speech_text"


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory, evaluation_text: Path) -> Path:
    """Four tasks over 12 documents: which of four words continues a passage of a speech?"""
    folder = tmp_path_factory.mktemp("tasks")
    words = evaluation_text.read_text().split()
    documents = []
    for number, at in enumerate(range(40, 40 + 12 * 60, 60)):
        endings = [" " + words[at + 100 * k] for k in range(4)]
        label = number % 4
        endings[0], endings[label] = endings[label], endings[0]
        start = " ".join(words[at - 20 : at])
        documents.append({"start": start, "endings": endings, "label": label, "text": " ".join(words[at : at + 300])})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    for text in (CHOICE, LAST_WORD, TEXT_PERPLEXITY, GENERATED):
        name = text.split("task: ")[1].split()[0]
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


@pytest.fixture(scope="module")
def of_the_harness(tiny_llama: Path, task_dir: Path) -> dict[str, dict[str, float]]:
    lm_eval = pytest.importorskip("lm_eval")
    models = pytest.importorskip("lm_eval.models.huggingface", reason="the harness's own model needs accelerate")
    from lm_eval.tasks import TaskManager

    model = models.HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_path=str(task_dir))
    results = lm_eval.simple_evaluate(model, tasks=TASKS.split(","), task_manager=manager, bootstrap_iters=0)["results"]
    return {task: {k: v for k, v in values.items() if ",none" in k} for task, values in results.items()}


@pytest.mark.full
def test_figures_are_those_of_the_harness(
    tiny_llama: Path, task_dir: Path, of_the_harness: dict[str, dict[str, float]]
) -> None:
    found = json_of("evaluate", tiny_llama, "--tasks", TASKS, "--task-dir", task_dir)["tasks"]
    assert 0.1 < found["speech_choice"]["acc"] < 1  # a task that tells something
    for task, metrics in of_the_harness.items():
        for metric, value in metrics.items():
            if "stderr" not in metric:
                assert found[task][metric.removesuffix(",none")] == pytest.approx(value, rel=1e-4), (task, metric)


@pytest.mark.full
def test_a_run_and_its_artifacts_agree(
    tmp_path: Path, tiny_llama: Path, task_dir: Path, calibration_text: Path
) -> None:
    run = tmp_path / "run"
    sizes = ["--steps", "0", "--samples", "4", "--seqlen", "32"]
    scheme = ["--scheme", "gguf:q4_0,onnx:w4g32", "--calibration", calibration_text]
    run_cli("quantize", tiny_llama, *scheme, "-o", run, *sizes)
    run_cli("export", run, "--format", "gguf", "--dtype", "f32", "-o", tmp_path / "model.gguf")
    run_cli("export", run, "--format", "onnx", "-o", tmp_path / "onnx")
    options = ("--tasks", TASKS, "--task-dir", task_dir, "--reference", tiny_llama, "--limit", 4)

    def scores(path: Path) -> dict[str, Any]:
        document: dict[str, Any] = json_of("evaluate", path, *options)
        return document

    of_run = scores(run)
    assert of_run["tasks"]["speech_text"] != of_run["reference_tasks"]["speech_text"]
    for artifact in ("model.gguf", "onnx"):
        of_artifact = scores(tmp_path / artifact)
        assert of_artifact["reference_tasks"] == of_run["reference_tasks"]
        for task, metrics in of_run["tasks"].items():
            for metric in {"acc", "perplexity", "word_perplexity"} & set(metrics):
                assert of_artifact["tasks"][task][metric] == pytest.approx(metrics[metric], rel=1e-3), (task, metric)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks", "no_such_task"], "no_such_task is no task of lm-evaluation-harness"),
        pytest.param(
            ["--tasks", "speech_generated"], "speech_generated is scored on generated text", marks=pytest.mark.full
        ),
        (["--tasks", "speech_choice", "--text", "t.txt"], "give either --text FILE"),
        ([], "give either --text FILE"),
    ],
)
def test_bad_input(options: list[str], sentence: str, tiny_llama: Path, task_dir: Path) -> None:
    result = run_cli("evaluate", tiny_llama, *options, "--task-dir", task_dir, code=2)
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.full
def test_data_that_cannot_be_loaded_is_one_sentence(tiny_llama: Path, task_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.yaml").write_text(CHOICE.replace("speech_choice", "gone").replace("DATA", "/no/such/file.jsonl"))
    result = run_cli("evaluate", tiny_llama, "--tasks", "gone", "--task-dir", tmp_path, code=2)
    assert "its data cannot be loaded" in result.stderr
