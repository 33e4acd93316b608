"""The configuration of a sweep: a named question and the runs that answer it."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from moe_lab.config import Config, require

if TYPE_CHECKING:
    from moe_lab.training import RunConfig

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SweepConfig(Config):
    """A designed set of runs.

    ``name`` is the sweep's folder under ``runs/``; every run has its own hash, which is its folder
    there.
    """

    name: str
    question: str
    runs: "tuple[RunConfig, ...]"
    preset: str = ""

    def __post_init__(self) -> None:
        require(
            bool(_FOLDER_NAME.fullmatch(self.name)),
            "a sweep name of letters, digits, '.', '_' and '-'",
            repr(self.name),
            field="name",
        )
        require(
            len(self.runs) > 0,
            "a sweep of at least one run",
            f"none in {self.name!r}",
            field="runs",
        )
        # Equal configurations have equal hashes, and comparing them takes a fraction of the time.
        if len(set(self.runs)) < len(self.runs):
            run, times = Counter(self.runs).most_common(1)[0]
            require(
                False,
                f"every run of {self.name!r} once",
                f"{run.name!r} ({run.hash()}) {times} times",
                "another seed or ratio",
                field="runs",
            )

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """The runs' content hashes, in the order of ``runs``. Ten thousand take a second."""
        return tuple(run.hash() for run in self.runs)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        from moe_lab.training import (
            RunConfig,
        )  # imports torch, which neither a sweep's status nor its errors need

        return cls(**{**values, "runs": tuple(RunConfig.from_dict(run) for run in values["runs"])})
