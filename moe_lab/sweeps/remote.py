"""What the launchers of clusters have in common: one run as something that can be pickled and called on another machine."""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_lab.config import Config
from moe_lab.errors import ConfigError, RunError, expected
from moe_lab.provenance import versions
from moe_lab.sweeps.launchers import Ending, Job, Result
from moe_lab.sweeps.worker import execute, load_trainer

Options = TypeVar("Options", bound=Config)


@dataclass(frozen=True)
class Errand:
    """One run, to be called where it is to be trained; the sweep's folder must be reachable there under the same path."""

    trainer: str
    job: Job
    versions: dict[str, str]

    @classmethod
    def of(cls, job: Job, trainer: str) -> "Errand":
        return cls(trainer, dataclasses.replace(job, folder=job.folder.absolute()), versions())

    def __call__(self) -> Ending:
        """Never raises for what happens inside the run, as ``worker.execute``."""
        here = versions()
        if here != self.versions:
            name = next(name for name in self.versions if here.get(name) != self.versions[name])
            got = f"{name} {here.get(name)} on the worker, {self.versions[name]} at the driver"
            return Ending(self.job.run, Result.FAILED, expected("the same versions on every machine", got, "one shared environment"))
        if not self.job.folder.parent.is_dir():
            reason = expected("a folder that every machine sees", f"no {self.job.folder.parent} on the worker", "a shared file system")
            return Ending(self.job.run, Result.FAILED, reason)
        return execute(load_trainer(self.trainer), self.job)


def read_options(kind: type[Options], options: Mapping[str, str]) -> Options:
    """A launcher's options from ``key=value`` texts. Raises ``ConfigError`` for one that it has not or cannot read."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(options)
    for key in set(options) & set(defaults):
        if not isinstance(defaults[key], str):
            try:
                values[key] = type(defaults[key])(options[key])
            except ValueError:
                raise ConfigError(expected(f"the launcher option {key} as a number", repr(options[key]))) from None
    return kind.from_dict(values)


def extra(module: str, name: str) -> Any:
    """A module of the optional extra ``name``. Raises ``RunError`` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(expected(f"the package {module.partition('.')[0]}", "none", f"pip install 'moe_lab[{name}]'")) from error


def last_line(error: BaseException) -> str:
    """Cluster libraries put the cause last."""
    return next((line.strip() for line in reversed(str(error).strip().splitlines()) if line.strip()), type(error).__name__)
