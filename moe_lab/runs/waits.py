"""Runs that wait in the queue of a cluster for what may never come, with the cluster's job and its
reason. The driver of a sweep writes them into the store (``layout.WAITS``), for ``sweep status``.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moe_lab.files import parse_json
from moe_lab.number_format import duration
from moe_lab.plain_text import one_line

OLD_SECONDS = 120.0
"""A driver writes at least every minute: older waits are those of one that is gone, or stands."""
_CHARACTERS = 300


@dataclass(frozen=True)
class Wait:
    """
    Attributes:
        job: the cluster's id of the job.
        reason: why it waits, in the words of the cluster, and what can be done.
    """

    job: str
    reason: str


@dataclass(frozen=True)
class Waits:
    """
    Attributes:
        runs: run -> its wait.
        seen: seconds since 1970.
    """

    runs: Mapping[str, Wait] = field(default_factory=dict)
    seen: float = 0.0

    def content(self) -> str:
        runs = {run: [wait.job, wait.reason] for run, wait in self.runs.items()}
        return json.dumps({"seen": self.seen, "runs": runs})

    @classmethod
    def of(cls, content: bytes | None) -> "Waits":
        """The inverse of ``content``; no waits where that is missing or another's."""
        try:
            values = parse_json(content or b"{}")
            runs = {
                str(run): Wait(*(one_line(str(text), _CHARACTERS) for text in (job, reason)))
                for run, (job, reason) in values["runs"].items()
            }
            return cls(runs, float(values["seen"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls()

    def age(self) -> str:
        """When they were seen, in words, unless it was just now."""
        seconds = time.time() - self.seen
        return f" (seen {duration(seconds)} ago)" if seconds > OLD_SECONDS else ""


def wait_lines(waits: Mapping[str, Wait], names: Mapping[str, str]) -> Iterable[str]:
    """A line for each reason: how many runs wait for it, and the first job and run of them."""
    by_reason: dict[str, list[str]] = {}
    for run, wait in waits.items():
        by_reason.setdefault(wait.reason, []).append(run)
    for reason, (first, *others) in by_reason.items():
        more = f" and {len(others):,} more" if others else ""
        job = f"job {waits[first].job} of {names.get(first, first)}{more}"
        yield f"{job} {'wait' if others else 'waits'}: {reason}"
