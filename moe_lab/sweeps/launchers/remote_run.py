"""One run as an object that is pickled and called on another machine, for the cluster launchers."""

import contextlib
import dataclasses
import gc
from dataclasses import dataclass
from pathlib import Path

from moe_lab.errors import RunError, expected
from moe_lab.sweeps.launchers.protocol import Ending, Job
from moe_lab.sweeps.launchers.trainer import load_trainer
from moe_lab.sweeps.launchers.worker import execute
from moe_lab.versions import versions


@dataclass(frozen=True)
class UnfitMachine:
    """Why a machine can do no run at all; one such machine would fail the whole queue, so it ends
    the sweep.
    """

    reason: str


@dataclass(frozen=True)
class RemoteRun:
    """One run, to be called where it is to be trained; a sweep's folder must be reachable there
    under the same path.

    Relative paths in the configuration are the driver's, so the call takes place in the driver's
    folder where the machine has it.
    """

    trainer: str
    job: Job
    versions: dict[str, str]
    here: Path

    @classmethod
    def of(cls, job: Job, trainer: str) -> "RemoteRun":
        return cls(
            trainer, dataclasses.replace(job, folder=job.folder.absolute()), versions(), Path.cwd()
        )

    def __call__(self) -> Ending | UnfitMachine:
        """Never raises for what happens inside the run, as ``worker.execute``."""
        unfit = self._unfit()
        if unfit is not None:
            return unfit
        with contextlib.chdir(self.here) if self.here.is_dir() else contextlib.nullcontext():
            try:
                return execute(load_trainer(self.trainer), self.job)
            except RunError as error:
                return UnfitMachine(str(error))
            finally:
                gc.collect()  # tensors in reference cycles must not add to those of the next run

    def _unfit(self) -> UnfitMachine | None:
        here = versions()
        other = next(
            (name for name in self.versions if here.get(name) != self.versions[name]), None
        )
        if other is not None:
            got = f"{other} {here.get(other)} on the worker, {self.versions[other]} at the driver"
            return UnfitMachine(
                expected("the same versions on every machine", got, "one shared environment")
            )
        if self.job.shared and not self.job.folder.parent.is_dir():
            got = f"no {self.job.folder.parent} on the worker"
            return UnfitMachine(
                expected("a folder that every machine sees", got, "a shared file system")
            )
        return None


def settle(answer: Ending | UnfitMachine) -> Ending:
    """The ending of a remote run. Raises ``RunError`` if its machine was unfit."""
    if isinstance(answer, UnfitMachine):
        raise RunError(answer.reason)
    return answer
