"""Launchers: who runs the workers of a sweep. ``protocol`` says what each of them does.

One file per launcher; it is imported when it is chosen, because clusters need packages of their
own. To add one: a class in a file here, and a row in ``LAUNCHERS``.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence

from moe_lab.errors import RunError, require
from moe_lab.sweeps.launchers.protocol import Ending, Job, Launcher, Result
from moe_lab.sweeps.launchers.trainer import TRAIN, train_run

__all__ = [
    "LAUNCHERS",
    "TRAIN",
    "Builder",
    "Ending",
    "Job",
    "Launcher",
    "Result",
    "build_launcher",
    "train_run",
]

Builder = Callable[[Sequence[Job], int | None, str, Mapping[str, str]], Launcher]


def _on_first_use(module: str, name: str) -> Builder:
    def build(
        jobs: Sequence[Job], workers: int | None, trainer: str, options: Mapping[str, str]
    ) -> Launcher:
        launcher = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return launcher(jobs, workers, trainer, options)

    return build


LAUNCHERS: dict[str, Builder] = {
    "local": _on_first_use("local", "LocalLauncher"),
    "ray": _on_first_use("ray", "RayLauncher"),
    "slurm": _on_first_use("slurm", "SlurmLauncher"),
}
"""Name -> ``(jobs to come, workers or None for as many as fit, trainer, options as texts) ->
Launcher``.
"""


def build_launcher(
    name: str,
    jobs: Sequence[Job],
    workers: int | None,
    trainer: str,
    options: Mapping[str, str] | None = None,
) -> Launcher:
    """The launcher ``name``. Raises ``RunError`` for an unknown name or a missing package."""
    require(
        name in LAUNCHERS,
        f"a launcher ({', '.join(LAUNCHERS)})",
        repr(name),
        error=RunError,
        field="launcher",
    )
    return LAUNCHERS[name](jobs, workers, trainer, options or {})
