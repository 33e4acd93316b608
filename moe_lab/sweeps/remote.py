"""What the launchers of clusters have in common: one run as something that can be pickled and
called on another machine.
"""

import contextlib
import dataclasses
import gc
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moe_lab.config import Config
from moe_lab.errors import ConfigError, RunError, expected
from moe_lab.sweeps.launchers import Ending, Job
from moe_lab.sweeps.worker import execute, load_trainer
from moe_lab.versions import versions

Options = TypeVar("Options", bound=Config)


@dataclass(frozen=True)
class Refusal:
    """Why a machine can do no run at all; one such machine would fail the whole queue, so it ends
    the sweep.
    """

    reason: str


@dataclass(frozen=True)
class Errand:
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
    def of(cls, job: Job, trainer: str) -> "Errand":
        return cls(
            trainer, dataclasses.replace(job, folder=job.folder.absolute()), versions(), Path.cwd()
        )

    def __call__(self) -> Ending | Refusal:
        """Never raises for what happens inside the run, as ``worker.execute``."""
        refusal = self._unfit()
        if refusal is not None:
            return refusal
        with contextlib.chdir(self.here) if self.here.is_dir() else contextlib.nullcontext():
            try:
                return execute(load_trainer(self.trainer), self.job)
            except RunError as error:
                return Refusal(str(error))
            finally:
                gc.collect()  # the next run of this process must not find the last one's tensors, some of which sit in cycles

    def _unfit(self) -> Refusal | None:
        here = versions()
        other = next(
            (name for name in self.versions if here.get(name) != self.versions[name]), None
        )
        if other is not None:
            got = f"{other} {here.get(other)} on the worker, {self.versions[other]} at the driver"
            return Refusal(
                expected("the same versions on every machine", got, "one shared environment")
            )
        if self.job.shared and not self.job.folder.parent.is_dir():
            got = f"no {self.job.folder.parent} on the worker"
            return Refusal(
                expected("a folder that every machine sees", got, "a shared file system")
            )
        return None


def settle(answer: Ending | Refusal) -> Ending:
    """What an errand came back with. Raises ``RunError`` for a refusal."""
    if isinstance(answer, Refusal):
        raise RunError(answer.reason)
    return answer


def import_path() -> str:
    """This process's own import path, so that a worker finds what the driver found (a trainer in a
    script's folder, say).
    """
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def read_options(kind: type[Options], options: Mapping[str, str]) -> Options:
    """A launcher's options from ``key=value`` texts.

    Raises ``ConfigError`` for one that it has not or cannot read.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(options)
    for key in set(options) & set(defaults):
        if not isinstance(defaults[key], str):
            try:
                values[key] = type(defaults[key])(options[key])
            except ValueError:
                raise ConfigError(
                    expected(f"the launcher option {key} as a number", repr(options[key]))
                ) from None
    return kind.from_dict(values)


def extra(module: str, name: str) -> Any:
    """A module of the optional extra ``name``. Raises ``RunError`` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(
            expected(
                f"the package {module.partition('.')[0]}", "none", f"pip install 'moe_lab[{name}]'"
            )
        ) from error


def last_line(error: BaseException | str) -> str:
    """Cluster libraries put the cause last."""
    name = error if isinstance(error, str) else type(error).__name__
    return next(
        (line.strip() for line in reversed(str(error).strip().splitlines()) if line.strip()), name
    )
