"""The ranks that train one run together: which part of a step each takes, and how they exchange
values.

``torchrun`` (or a process group that the caller initialised) describes them; without either there
is one. A run's numbers are those of one process: a step's micro-batches are first assigned to
groups of ranks, and where there are fewer micro-batches than ranks the ranks of a group share one,
so that its tokens, its counts and its losses are the same whatever the number of ranks.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from math import gcd
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lab.errors import ConfigError, MoELabError, RunError, expected
from moe_lab.training.config import RunConfig

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another that neither answers nor ends.

A rank that ends is noticed at once.
"""
_LOST = re.compile(r"gloo|nccl|connection|peer|timed? ?out|process group|heartbeat", re.IGNORECASE)
_calls = 0

T = TypeVar("T")


class Parallel(StrEnum):
    """The way a model is spread over ranks: every rank holds all of it and gradients are averaged,
    or each holds a shard (FSDP2).
    """

    DDP = "ddp"
    FSDP = "fsdp"


class RankError(RunError):
    """The run ended because of another rank.

    ``reported``: that rank has said why, so this one need not.
    """

    def __init__(self, message: str, reported: bool) -> None:
        super().__init__(message)
        self.reported = reported


@dataclass(frozen=True)
class Ranks:
    """This process among the ``size`` that train one run; alone by default.

    Attributes:
        rank, size: 0-based place, and how many there are.
        parallel: how the model is spread; None where there is one rank.
        device: of the tensors that ranks exchange.
        micro_batches: of a step, over all ranks.
        groups: of ranks; each takes ``micro_batches / groups`` whole micro-batches, of which every
            member has an equal part.
        group: the ranks that share this rank's micro-batches; None for all of them.
    """

    rank: int = 0
    size: int = 1
    parallel: Parallel | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    micro_batches: int = 1
    groups: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """Ranks that share one micro-batch."""
        return self.size // self.groups

    def own(self, batch: Tensor) -> list[Tensor]:
        """This rank's parts of its micro-batches, from the batch [B, ...] of a step."""
        each = self.micro_batches // self.groups
        start = self.rank // self.parts * each
        return [
            micro_batch.chunk(self.parts)[self.rank % self.parts]
            for micro_batch in batch.chunk(self.micro_batches)[start : start + each]
        ]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self._reduced(values, None) if self.size > 1 else values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks, in float64; with one rank the values as they are."""
        return self._reduced(values.double(), None) / self.size if self.size > 1 else values

    def total_of_micro_batch(self, values: Tensor) -> Tensor:
        """The sum over the ranks that share this rank's micro-batch."""
        return self._reduced(values, self.group) if self.parts > 1 else values

    def _reduced(self, values: Tensor, group: Any) -> Tensor:
        values = values.detach().to(self.device, copy=True)
        dist.all_reduce(values, group=group)
        return values

    def from_first(self, work: Callable[[], T]) -> T:
        """The result of ``work`` on the first rank, given to all of them; if it raises a
        ``MoELabError``, all raise it.
        """
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = work()
            except MoELabError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def wait(self) -> None:
        """Wait until every rank calls this."""
        if self.size > 1:
            self.total(torch.zeros(1))

    def draw_own_noise(self, seed: int, step: int) -> None:
        """Give every rank but the first random numbers of its own for this step: noise must not
        repeat over ranks.
        """
        if not self.first:
            torch.manual_seed(hash((seed, self.rank, step)) % 2**63)


ALONE = Ranks()


@contextmanager
def join(
    config: RunConfig, parallel: Parallel | str | None, device: torch.device
) -> Iterator[Ranks]:
    """The ranks that this process is one of, joined if ``torchrun`` describes them; what goes wrong
    on one ends the run on all.

    Args:
        parallel: how the model is spread over several ranks; None means "ddp".

    Raises:
        ConfigError: an unknown ``parallel``, or a micro-batch that the ranks cannot share evenly.
        RankError: another rank ended or does not answer.
    """
    if parallel is not None and parallel not in list(Parallel):
        raise ConfigError(
            expected(f"parallel among {', '.join(Parallel)}", repr(parallel)), field="parallel"
        )
    joined = _join_group(device)
    try:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            yield Ranks(device=device, micro_batches=config.grad_accumulation)
        else:
            with _all_or_none():
                yield _spread(config, Parallel(parallel or Parallel.DDP), device)
    except BaseException:
        # NCCL waits in its shutdown for collectives that can no more end; the process is about to
        # end anyway.
        if joined and device.type == "cpu":
            dist.destroy_process_group()
        raise
    if joined:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """This process's GPU of its machine where the configuration says "cuda" and ``torchrun`` says
    which.
    """
    return (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ
        else device
    )


def _join_group(device: torch.device) -> bool:
    """Whether this call made the process group that the environment describes."""
    if (
        not dist.is_available()
        or dist.is_initialized()
        or int(os.environ.get("WORLD_SIZE", 1)) == 1
        or "RANK" not in os.environ
    ):
        return False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (dist.DistError, ValueError, RuntimeError) as error:
        hint = "try torchrun, or MASTER_ADDR and MASTER_PORT of rank 0"
        raise RunError(f"cannot join the other ranks: {_line(error)}; {hint}") from error
    return True


def _spread(config: RunConfig, parallel: Parallel, device: torch.device) -> Ranks:
    rank, size, micro_batches = dist.get_rank(), dist.get_world_size(), config.grad_accumulation
    groups = gcd(micro_batches, size)
    parts, sequences = size // groups, config.batch_size // micro_batches
    if sequences % parts:
        sizes = [
            number
            for number in range(size, 0, -1)
            if sequences % (number // gcd(micro_batches, number)) == 0
        ]
        batch = f"batch_size {config.batch_size}, grad_accumulation {micro_batches}"
        what = f"ranks that share the batch evenly ({batch})"
        raise ConfigError(
            expected(what, size, f"{sizes[0]} ranks, or another batch_size"), "batch_size"
        )
    group = None
    if groups > 1 and parts > 1:
        members = [
            dist.new_group(list(range(start, start + parts)), timeout=PATIENCE)
            for start in range(0, size, parts)
        ]
        group = members[rank // parts]
    return Ranks(rank, size, parallel, device, micro_batches, groups, group)


@contextmanager
def _all_or_none() -> Iterator[None]:
    """One reason for the end of a run on many ranks: the first to fail says it, the others raise
    ``RankError``.
    """
    global _calls
    _calls += 1
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        lost = (
            not isinstance(error, MoELabError)
            and isinstance(error, RuntimeError)
            and bool(_LOST.search(str(error)))
        )
        rank, reason = dist.get_rank(), _line(error)
        if lost:
            reason = f"another rank ended or does not answer ({reason.split('. ')[0]})"
        teller, reason = _tell(rank, reason)
        if teller != rank:
            raise RankError(
                f"rank {teller} of {dist.get_world_size()}: {reason}", reported=True
            ) from error
        if lost:
            hint = "the same command, which continues from the last checkpoint"
            raise RankError(
                f"rank {rank} of {dist.get_world_size()}: {reason}; try {hint}", reported=False
            ) from error
        raise


def _tell(rank: int, reason: str) -> tuple[int, str]:
    """Leave the reason where all ranks look; the rank and reason that were left first, this one's
    if that cannot be found out.
    """
    with suppress(Exception):  # the store may have gone with the rank that kept it
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=60))  # a busy machine's rank 0 answers late
        teller, _, reason = (
            store.compare_set(f"moe_lab/failed/{_calls}", "", f"{rank} {reason}")
            .decode()
            .partition(" ")
        )
        return int(teller), reason
    return rank, reason


def _line(error: BaseException) -> str:
    """The first line of an error, without the place in a library's source that torch puts before
    it.
    """
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", first)
