"""Admission of runs: the first in line that time, FLOPs and memory allow starts next.

The line is ordered by cost, the longest first. A run that would overshoot the FLOPs that are left
is passed over for good; one that does not fit into the memory that is free is passed over until it
does, and after ``PATIENCE`` shorter runs went before it nothing else starts.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moe_lab.config import require
from moe_lab.sweeps.launchers.protocol import Job

PATIENCE = 8
"""How many runs may start before one that waits for memory."""


@dataclass
class Admission:
    """
    Attributes:
        deadline: of ``time.monotonic``, after which nothing starts.
        flops: training FLOPs that may still be started; a run counts with what it has left to
            train, and once however often its worker dies. What was finished before does not count.
        memory: bytes that the active runs may be expected to need together. A run that alone needs
            more runs alone.
        left: share of its training that a run has left, where that is not 1.
    """

    deadline: float | None = None
    flops: float | None = None
    memory: int | None = None
    left: Mapping[str, float] = field(default_factory=dict)
    _charged: dict[str, float] = field(default_factory=dict)
    _overtaken: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        require(
            self.flops is None or self.flops >= 0,
            "max_flops of at least 0",
            self.flops,
            field="max_flops",
        )

    def next(self, line: Iterable[Job], active: Iterable[Job]) -> Job | None:
        """The run to start now, already charged; None where none may start, now or ever."""
        if self.out_of_time:
            return None
        used = [job.memory_bytes for job in active]
        passed: list[Job] = []
        for job in line:
            if not self.affords(job):
                continue
            if not used or self.memory is None or sum(used) + job.memory_bytes <= self.memory:
                self._overtaken.update(other.run for other in passed)
                self._charge(job)
                return job
            if self._overtaken[job.run] >= PATIENCE:
                return None
            passed.append(job)
        return None

    def exhausted(self, line: Iterable[Job]) -> bool:
        """Whether no run in the line will ever start."""
        return self.out_of_time or not any(self.affords(job) for job in line)

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def affords(self, job: Job) -> bool:
        return self.flops is None or job.run in self._charged or self.cost(job) <= self.flops

    def cost(self, job: Job) -> float:
        """FLOPs that the run has left to train."""
        return job.cost * self.left.get(job.run, 1.0)

    def _charge(self, job: Job) -> None:
        if self.flops is not None and job.run not in self._charged:
            self._charged[job.run] = self.cost(job)
            self.flops -= self._charged[job.run]

    def give_back(self, job: Job) -> None:
        """Undo the charge for a run that another process trains."""
        if self.flops is not None:
            self.flops += self._charged.pop(job.run, 0.0)
