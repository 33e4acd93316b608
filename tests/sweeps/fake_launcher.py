"""A launcher without processes: a queue in which so many runs begin, each of which ends as it is
told.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from moe_lab.files import write_json
from moe_lab.runs.waits import Wait
from moe_lab.sweeps import Ending, Job, Result


@dataclass
class FakeLauncher:
    """``begun`` of the runs begin at once.

    They die while there are ``deaths``, each at that step by its status, and then finish.
    """

    begun: int = 1
    deaths: list[int] = field(default_factory=list)
    slots: int = 1000
    submitted: list[str] = field(default_factory=list)
    withdrawals: int = 0
    _queue: list[Job] = field(default_factory=list)
    _endings: list[Ending] = field(default_factory=list)

    def submit(self, job: Job) -> None:
        self.submitted.append(job.run)
        if len(self._queue) + len(self._endings) < self.begun:
            self._endings.append(self._ending(job))
        else:
            self._queue.append(job)

    def _ending(self, job: Job) -> Ending:
        job.folder.mkdir(parents=True, exist_ok=True)
        if self.deaths:
            write_json(
                job.folder / "status.json",
                {"step": self.deaths.pop(0), "steps": job.config["steps"]},
            )
            return Ending(job.run, Result.DIED, "its node was taken away")
        return Ending(job.run, Result.FINISHED)

    def poll(self, timeout: float) -> list[Ending]:
        endings, self._endings = self._endings, []
        return endings

    def waits(self) -> dict[str, Wait]:
        return {}

    def withdraw(self) -> None:
        self.withdrawals += 1
        self._endings += [Ending(job.run, Result.WITHDRAWN) for job in self._queue]
        self._queue.clear()

    def close(self) -> None: ...


@dataclass
class Times:
    """When the hours of a budget are over."""

    over: Callable[[], bool] = lambda: False
