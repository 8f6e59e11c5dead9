"""Several processes tune one run as one process does, but for the order in which sums are taken."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from click.testing import CliRunner
from support import SIZES, assert_same_files, save_random_model
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

from signround_edge.cli import main
from signround_edge.errors import LostProcess, ToldElsewhere
from signround_edge.formats import get_grid
from signround_edge.progress import SILENT, Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.agreement import check_same
from signround_edge.tuning.calibration.activations import CPU
from signround_edge.tuning.job import Job
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.ranks import Ranks, joined
from signround_edge.tuning.schedule import shares_whole_model
from signround_edge.tuning.settings import TuningSettings

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

# Products in f32 and no GPTQ, which makes of a difference in the last digits another code, and of that one many.
EXACT = TuningSettings(steps=4, samples=16, seqlen=16, batch_size=6, start="nearest", compute_dtype="float32", lr=0.05)
# What takes seconds to import, once for all processes.
PRELOADED = [
    "signround_edge.tuning.quantize",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral",
]


@dataclass(frozen=True)
class Task:
    """What a process of a run is to do."""

    model: Path
    out: Path
    calibration: Path
    settings: TuningSettings
    resume: bool = False
    dies: int = -1  # this rank kills itself at its 40th sum


class Dying(Ranks):
    """A rank that is killed while it tunes."""

    sums: ClassVar[list[int]] = []

    def sum(self, tensor: Tensor) -> Tensor:
        self.sums.append(1)
        if len(self.sums) == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sum(tensor)


def tune(task: Task, ranks: Ranks | None, said: list[str]) -> None:
    quantize(
        task.model, parse_scheme("gguf:q4_0"), task.out, str(task.calibration), task.settings, device="cpu",
        resume=task.resume, progress=Progress(said.append), source_check="off", ranks=ranks,
    )  # fmt: skip


def disagree(task: Task, ranks: Ranks, said: list[str]) -> None:
    """Each rank has codes of its own."""
    grid = get_grid("Q4_0")
    weight = torch.linspace(-1, 1, 64).view(1, -1) * (1 + ranks.rank)
    tensors = {"w": grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))}
    check_same(job(ranks), 0, tensors)


def one_of(what: Any, task: Task, rank: int, world: int, port: int, results: Any) -> None:
    """A process as torchrun starts it; puts (rank, kind of error, error, lines) into `results`."""
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    said: list[str] = []
    try:
        with joined() as ranks:
            what(task, Dying(*vars(ranks).values()) if rank == task.dies else ranks, said)
        results.put((rank, None, "", said))
    except Exception as error:  # of any kind: the others wait for what this one puts
        results.put((rank, type(error), str(error), said))
    results.close()
    results.join_thread()


def together(world: int, task: Task, what: Any = tune, dead: int = 0) -> list[tuple[int, Any, str, list[str]]]:
    """What the ranks of a run that is shared by `world` processes came to, in their order, but for `dead` ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    arguments = [(what, task, rank, world, port, results) for rank in range(world)]
    processes = [context.Process(target=one_of, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=400) for _ in range(world - dead)), key=lambda result: result[0])
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode is not None
    return found


def job(ranks: Ranks, samples: int = 16, batch_size: int = 6) -> Job:
    settings = replace(EXACT, samples=samples, batch_size=batch_size)
    return Job(None, None, torch.zeros(samples, 4), settings, CPU, None, SILENT, None, ranks)  # type: ignore[arg-type]


def differences(one: RunDirectory, other: RunDirectory) -> tuple[float, float]:
    """Shares of codes and of scale fields in which two runs differ."""
    counts: Counter[str] = Counter()
    for name in one.names():
        if one.is_quantized(name):
            mine, theirs = one.quantized(name), other.quantized(name)
            counts["codes differ"] += int((mine.codes != theirs.codes).sum())
            counts["codes"] += mine.codes.numel()
            for key, field in mine.fields.items():
                counts["fields differ"] += int((field != theirs.fields[key]).sum())
                counts["fields"] += field.numel()
    return counts["codes differ"] / counts["codes"], counts["fields differ"] / counts["fields"]


def moved(run: RunDirectory) -> int:
    """Codes that are not the nearest on the first scales."""
    counted = [s for part in run.manifest.parts for s in run.statistics(part).values()]
    return sum(int(s["raised"].sum() + s["lowered"].sum()) for s in counted)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    config = LlamaConfig(**{**SIZES, "vocab_size": 3072})
    return save_random_model(config, tmp_path_factory.mktemp("llama") / "model", tokenizer_from=tiny_llama)


@pytest.mark.parametrize(("samples", "size"), [(16, 6), (16, 4), (9, 8), (3, 8), (40, 1)])
def test_a_batch_takes_one_sample_of_each_class_and_each_sample_at_most_once_an_epoch(samples: int, size: int) -> None:
    alone = job(Ranks(), samples, size)
    train = alone.split()[0]
    size = min(size, len(train))
    epoch = list(islice(alone.batches(0, train), len(train) // size))
    position = {int(sample): number for number, sample in enumerate(train)}
    assert all([position[int(s)] % size for s in batch] == list(range(size)) for batch in epoch)
    assert max(Counter(int(s) for batch in epoch for s in batch).values()) == 1
    several = list(islice(alone.batches(0, train), 8 * len(train)))
    assert {int(s) for batch in several for s in batch} == {int(s) for s in train}  # what one leaves out, others take
    another = list(islice(alone.batches(1, train), len(several)))  # of another block: another order
    assert all(map(torch.equal, several, another)) == (len(train) == size)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_batches_do_not_depend_on_how_many_processes_share_them(world: int) -> None:
    alone, ranks = job(Ranks()), [job(Ranks(rank, world)) for rank in range(world)]
    whole = list(islice(alone.batches(3, alone.split()[0]), 10))
    own = [list(islice(rank.own_batches(3), 10)) for rank in ranks]
    for number, batch in enumerate(whole):
        shares = [rank.shards[rank.ranks.rank][own[rank.ranks.rank][number]] for rank in ranks]
        assert sorted(torch.cat(shares).tolist()) == sorted(batch.tolist())
        assert len({len(share) for share in shares}) == 1
    shards = torch.cat([rank.shards[rank.ranks.rank] for rank in ranks])
    assert sorted(shards.tolist()) == list(range(16))
    for which in (0, 1):
        split = [rank.shards[rank.ranks.rank][rank.own_split()[which]] for rank in ranks]
        assert sorted(torch.cat(split).tolist()) == alone.split()[which].tolist()


def test_two_processes_give_the_codes_of_one(tmp_path: Path, llama: Path, calibration_text: Path) -> None:
    one, two = (Task(llama, tmp_path / name, calibration_text, EXACT) for name in ("one", "two"))
    tune(one, None, [])
    (_, error, what, said), *others = together(2, two)
    assert error is None, what
    assert "2 processes share the samples" in said
    assert [(rank, error, said) for rank, error, _, said in others] == [(1, None, [])]
    alone, shared = RunDirectory.open(one.out), RunDirectory.open(two.out)
    codes, fields = differences(alone, shared)
    assert codes <= 1e-3
    assert fields <= 1e-2
    assert moved(alone) > 0.02 * 2 * 64 * 64  # of which it would not do to have tuned nothing
    assert alone.manifest.settings == shared.manifest.settings


def test_a_killed_process_ends_the_run_which_another_number_of_them_completes(
    tmp_path: Path, llama: Path, calibration_text: Path
) -> None:
    task = Task(llama, tmp_path / "run", calibration_text, replace(EXACT, steps=8), dies=1)
    [(_, error, what, said)] = together(2, task, dead=1)
    assert error is LostProcess
    assert "--resume" in what
    assert "\n" not in what
    assert not any(line.startswith("2/2") for line in said)
    assert RunDirectory.open(task.out, allow_incomplete=True).manifest.state == "incomplete"
    tune(replace(task, resume=True, dies=-1), None, [])
    assert RunDirectory.open(task.out).manifest.state == "complete"


def test_processes_whose_codes_differ_end_the_run_and_one_of_them_says_so(tmp_path: Path) -> None:
    found = together(2, Task(tmp_path, tmp_path, tmp_path, EXACT), disagree)
    assert sorted(error.__name__ for _, error, _, _ in found) == ["ToldElsewhere", "UserError"]
    said = next(what for _, error, what, _ in found if error is not ToldElsewhere)
    assert "have not computed the same codes of block 1" in said


@pytest.mark.parametrize(
    ("world", "batch_size", "whole_model_batch_size", "shareable"),
    [(2, 6, 4, True), (4, 8, 4, True), (3, 6, 4, False), (4, 6, 4, False), (2, 6, 3, False), (2, 6, 20, False)],
)
def test_the_whole_model_stage_is_shared_where_every_rank_has_as_many_samples(
    world: int, batch_size: int, whole_model_batch_size: int, shareable: bool
) -> None:
    jobs = [job(Ranks(rank, world), batch_size=batch_size) for rank in range(world)]
    settings = replace(jobs[0].settings, whole_model_batch_size=whole_model_batch_size)
    assert shares_whole_model(settings, 16, world) == shareable
    assert shares_whole_model(settings, 1, 1)
    if shareable:
        batches = [each.own_batches(2, whole_model_batch_size) for each in jobs]
        whole = job(Ranks(), batch_size=batch_size).own_batches(2, whole_model_batch_size)
        for _ in range(5):
            parts = [each.shards[each.ranks.rank][next(own)] for each, own in zip(jobs, batches, strict=True)]
            assert sorted(torch.cat(parts).tolist()) == sorted(next(whole).tolist())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_are_refused_where_there_are_none(tmp_path: Path, llama: Path) -> None:
    arguments = ["quantize", str(llama), "--scheme", "gguf:q4_0", "-o", str(tmp_path / "run"), "--gpus"]
    for count, sentence in (("4", "torch finds no CUDA device; add --device cpu for 4"), ("0", "must be at least 1")):
        result = CliRunner().invoke(main, [*arguments, count])
        assert result.exit_code == 2
        assert sentence in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "changes", "most"),
    [
        (3, {}, 1e-3),
        (4, {}, 1e-3),  # of six samples a step
        (2, {"granularity": "layer"}, 1e-3),
        (2, {"optimizer": "adam"}, 1e-2),
        (2, {"positions": "follow"}, 1e-2),
        (2, {"transforms": ("channel-scales",)}, 1e-2),
        (2, {"whole_model_steps": 2}, 1e-2),
        (2, {"whole_model_steps": 2, "samples": 8, "batch_size": 4}, 1e-2),  # one of them held out
        (2, {"start": "gptq"}, 1e-2),
        (3, {"start": "gptq", "compute_dtype": "bfloat16"}, 5e-2),
    ],
    ids=str,
)
def test_every_way_of_tuning_is_shared(
    world: int, changes: dict[str, Any], most: float, tmp_path: Path, llama: Path, calibration_text: Path
) -> None:
    settings = replace(EXACT, **changes)
    one, more = (Task(llama, tmp_path / name, calibration_text, settings) for name in ("one", "more"))
    tune(one, None, [])
    assert [(error, what) for _, error, what, _ in together(world, more)] == [(None, "")] * world
    alone, shared = RunDirectory.open(one.out), RunDirectory.open(more.out)
    codes, fields = differences(alone, shared)
    print(f"{world} processes, {changes}: {codes:.4%} of codes, {fields:.4%} of fields")
    assert codes <= most
    for part, record in alone.manifest.complete.items():
        for unit, report in record.report.items():
            # GPTQ makes another code of a last digit, and of that one many.
            near = pytest.approx(report["tuned"], rel=0.1 if settings.start == "gptq" else 0.03)
            assert shared.manifest.complete[part].report[unit]["tuned"] == near
    # What is complete is read by every process, whatever their number.
    copies = [file.read_bytes() for file in sorted(more.out.rglob("*.safetensors"))]
    assert together(2, replace(more, resume=True))[0][1] is None
    assert copies == [file.read_bytes() for file in sorted(more.out.rglob("*.safetensors"))]


@pytest.mark.full
def test_experts_that_only_some_processes_see_are_tuned_alike(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    config = MixtralConfig(**{**SIZES, "vocab_size": 3072}, num_local_experts=8, num_experts_per_tok=1)
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    ways: dict[str, dict[str, Any]] = {
        "nearest": {},
        "gptq": {"start": "gptq"},
        "adam": {"optimizer": "adam"},
        "whole": {"whole_model_steps": 2},
    }
    for name, changes in ways.items():
        settings = replace(EXACT, seqlen=4, **changes)
        one, two = (Task(model, tmp_path / f"{name}-{run}", calibration_text, settings) for run in ("one", "two"))
        tune(one, None, [])
        assert [(error, what) for _, error, what, _ in together(2, two)] == [(None, "")] * 2
        codes, fields = differences(RunDirectory.open(one.out), RunDirectory.open(two.out))
        print(f"{name}: {codes:.4%} of codes, {fields:.4%} of fields")
        assert codes <= 1e-2


@pytest.mark.full
def test_more_processes_than_samples_a_step_are_refused(tmp_path: Path, llama: Path, calibration_text: Path) -> None:
    found = together(3, Task(llama, tmp_path / "run", calibration_text, replace(EXACT, batch_size=2)))
    assert sorted(error.__name__ for _, error, _, _ in found) == ["ToldElsewhere", "ToldElsewhere", "UserError"]
    assert any("3 processes are more than the 2 samples of a step; start at most 2" in what for _, _, what, _ in found)
    assert not (tmp_path / "run").exists()


def command(model: Path, out: Path, calibration: Path, *more: str) -> list[str]:
    sizes = ["--steps", "150", "--samples", "16", "--seqlen", "32", "--batch-size", "6", "--source-check", "off"]
    scheme = ["--scheme", "gguf:q4_0", "--device", "cpu", "--calibration", str(calibration)]
    return ["quantize", str(model), "-o", str(out), *scheme, *sizes, *more]


def process_of(rank: int, launcher: psutil.Process) -> psutil.Process:
    """The process of a rank, once it is there."""
    for _ in range(600):
        for child in launcher.children(recursive=True):
            if child.environ().get("RANK") == str(rank) and "signround_edge" in child.cmdline():
                return child
        time.sleep(0.1)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.full
@pytest.mark.parametrize(("way", "victim"), [("--gpus", 1), ("torchrun", 0)])
def test_a_killed_process_of_the_command_line_is_said_in_one_sentence(
    way: str, victim: int, tmp_path: Path, llama: Path, calibration_text: Path
) -> None:
    out, environment = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m"]
    more = ["--gpus", "2"] if way == "--gpus" else []
    if way == "torchrun":
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = [*launcher, "signround_edge", *command(llama, out, calibration_text, *more)]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("1/3 done"):
            process_of(victim, psutil.Process(process.pid)).send_signal(signal.SIGKILL)
    code = process.wait(timeout=100)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert "--resume" in errors[0]
    if way == "--gpus":
        assert code == 2
        assert lines[-1] == errors[0]
        assert not any("Traceback" in line for line in lines)
    resumed = command(llama, out, calibration_text, "--resume", "--gpus", "3")
    done = subprocess.run(
        [sys.executable, "-m", "signround_edge", *resumed], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"wrote {out}"
    assert RunDirectory.open(out).manifest.state == "complete"


@pytest.mark.full
def test_one_process_of_gpus_is_the_plain_command_and_two_fail_in_one_sentence(
    tmp_path: Path, llama: Path, calibration_text: Path
) -> None:
    for name, more in (("plain", []), ("one", ["--gpus", "1"])):
        arguments = command(llama, tmp_path / name, calibration_text, "--steps", "2", *more)
        assert CliRunner().invoke(main, arguments).exit_code == 0
    assert_same_files(tmp_path / "plain", tmp_path / "one")
    arguments = command(llama, tmp_path / "plain", calibration_text, "--gpus", "2")
    again = subprocess.run([sys.executable, "-m", "signround_edge", *arguments], capture_output=True, text=True)
    assert again.returncode == 2
    errors = [line for line in again.stderr.splitlines() if "rror" in line or "Traceback" in line]
    assert len(errors) == 1, again.stderr
    assert "already holds a run; add --resume" in errors[0]
