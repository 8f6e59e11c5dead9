"""Starting several processes of one command by torchrun's machinery (torch.distributed.elastic), and their places."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from signround_edge.errors import ToldElsewhere, UserError

# Of a process that `run_processes` has started: it lost another one, and has said nothing.
EXIT_LOST = 3
# The way out where a process is gone.
BLOCKS_ARE_KEPT = (
    "every finished block is kept: run the same command with --resume to continue, with as many processes as you like"
)


@dataclass(frozen=True)
class Place:
    """Which of the processes that torchrun started this one is.

    Attributes:
        rank, world: its number, from 0, of how many.
        local: its number on its machine.
    """

    rank: int
    world: int
    local: int

    @classmethod
    def of_environment(cls) -> Place:
        """From torchrun's environment variables; alone where there are none."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(os.environ.get(name, "").isdigit() for name in names[:2]):
            return cls(0, 1, 0)
        rank, world, local = (int(os.environ.get(name) or 0) for name in names)
        return cls(rank, world, local)


def check_gpus(count: int, device: str) -> None:
    """UserError where a machine cannot run that many processes of `--gpus`.

    Args:
        device: "auto", "cpu" or "cuda".
    """
    import torch

    if count < 1:
        raise UserError(f"--gpus {count} must be at least 1")
    if device == "cpu":
        return
    found = torch.cuda.device_count()
    if not found:
        raise UserError(
            f"--gpus {count}: torch finds no CUDA device; add --device cpu for {count} processes on the CPU, or leave "
            "--gpus out"
        )
    if count > found:
        raise UserError(f"--gpus {count}: torch finds {found}; give --gpus {found}")


def run_processes(count: int, arguments: Sequence[str]) -> None:
    """Run `python -m signround_edge` with `arguments` in `count` processes on this machine, until all have ended.

    Raises:
        ToldElsewhere: one failed, and has said why.
        UserError: one was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun's own account of a failure is long, and says nothing that ours does not.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="signround-edge",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "signround_edge", *arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode: rank for rank, failure in sorted(error.failures.items(), reverse=True)}
        if any(code > 0 and code != EXIT_LOST for code in codes):
            raise ToldElsewhere("a process has failed, and says why") from error
        # torchrun ends the others by SIGTERM.
        killed = sorted((code for code in codes if code < 0), key=lambda code: code == -signal.SIGTERM)
        what = (
            f"process {codes[killed[0]]} of {count} was ended by signal {-killed[0]}" if killed else "a process ended"
        )
        raise UserError(f"{what}; {BLOCKS_ARE_KEPT}") from error
    except SignalException as error:
        raise KeyboardInterrupt from error
