"""Ranks and devices of a run: what the launcher said, and the process group made from it."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepscale import pipeline
from deepscale.config import EngineConfig
from deepscale.errors import MissingPackageError, UsageError
from deepscale.ops.cpu_adam import skip_shm_comm
from deepscale.rendezvous import init_method

T = TypeVar("T")


@dataclass
class Doing:
    """What this process is at, for the watchdog's thread: all ranks go through the same phases in the same order, and are counted there.

    `close` closes the run's record with the reason for which it ends.
    """

    phase: str = "start"
    step: int = 0
    count: int = 0
    close: Callable[[str], None] | None = None

    def __call__(self, phase: str) -> None:
        self.phase = phase
        self.count += 1


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` in all, `local_rank` of `local_size` on this machine.

    Of a network that is cut into `stages` each is on `data_size` ranks, which follow each other and share out the images of a step.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    stages: int = 1
    doing: Doing = field(default_factory=Doing, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that talks, writes and tracks."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Ranks that share out the images of a step: all, or those of a stage."""
        return self.size // self.stages

    @property
    def data_rank(self) -> int:
        """This one among them."""
        return self.rank % self.data_size

    @property
    def stage(self) -> int:
        """Which of the stages is here."""
        return self.rank // self.data_size

    def agree(self, value: T) -> T:
        """Rank 0's value on every rank; the value itself where nothing is distributed, as in a plan for other machines."""
        if self.size == 1 or not dist.is_initialized():
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if self.size == 1 or not dist.is_initialized():
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Summed over ranks, in place; as they are where nothing is distributed."""
        if self.size > 1 and dist.is_initialized():
            dist.all_reduce(values)
        return values


def choose_device(engine: EngineConfig) -> str:
    """ "cuda" or "cpu"; raises UsageError for a GPU that is not there."""
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda was given, but torch finds no GPU here; type --device cpu, or leave it out")
    if engine.device == "auto":
        return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    return engine.device


def join(engine: EngineConfig) -> World:
    """Joins the process group that the launcher describes, with DeepSpeed's or torch's own initialisation.

    Without a launcher (no RANK in the environment) the world is this process.
    """
    kind = choose_device(engine)
    environment = os.environ
    rank, size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    local_rank = int(environment.get("LOCAL_RANK", max(0, engine.local_rank)))
    local_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or size)
    pipeline.check_ranks(engine.pipeline_stages, size)
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    threads = engine.threads if isinstance(engine.threads, int) else _share_of_cores(local_size)
    torch.set_num_threads(threads)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    # Longer than the watchdog's, which names the rank.
    patience = timedelta(days=365) if engine.hang_timeout is None else timedelta(seconds=max(1800.0, 120 + 1.5 * engine.hang_timeout))
    if engine.engine == "deepspeed":
        environment.setdefault("DS_ACCELERATOR", kind)
        for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "MASTER_ADDR": "127.0.0.1"}.items():
            environment.setdefault(name, str(value))
        if "MASTER_PORT" not in environment:
            environment["MASTER_PORT"] = str(free_port())
        try:
            import deepspeed
        except ImportError:
            raise MissingPackageError("deepspeed", None, "--engine deepspeed (or type --engine torch)") from None
        skip_shm_comm()
    try:
        if engine.engine == "deepspeed":
            deepspeed.init_distributed(
                dist_backend=backend, auto_mpi_discovery=False, verbose=engine.verbose, init_method=init_method(), timeout=patience
            )
        elif size > 1 and not dist.is_initialized():
            dist.init_process_group(backend, init_method=init_method(), timeout=patience)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _unreachable(error) from None
    return World(rank, size, local_rank, local_size, device, engine.pipeline_stages)


def _unreachable(error: Exception) -> UsageError:
    """The sentence for ranks that do not find each other, most often because another run holds the launcher's port 29500."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in str(error):
        return UsageError(f"port {port} is in use, perhaps by another run; type deepspeed --master_port {free_port()} before deepscale/train.py")
    return UsageError(f"the ranks do not find each other at {address}:{port} ({str(error).splitlines()[0]}); check MASTER_ADDR and MASTER_PORT")


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _share_of_cores(local_size: int) -> int:
    if "OMP_NUM_THREADS" in os.environ and local_size > 1:
        return max(1, torch.get_num_threads())
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
