"""Why a run failed: one line of reason, and the last lines of its output and of its traceback.

``error.txt`` holds the reason and, below it, the traceback; ``log.txt`` what the run printed. Both
are bounded here and stripped of control characters: a run may print anything, and these lines are
shown on terminals and pages.
"""

import json
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from moe_lab.files import open_regular, write_text
from moe_lab.runs.layout import ERROR, FAILURE, LOG

PRINTED_LINES, TRACEBACK_LINES = 6, 8
LINE_CHARACTERS = 200
TAIL_BYTES = 8192
"""As much of the end of a file is read at most."""

_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[@-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class FailureKind(StrEnum):
    """RUN: the run itself fails, and stays failed until ``retry_failed``. STORAGE: a disk or store
    did not do its part; the run is continued like an interrupted one. CHECKPOINT: what the run
    would resume from is damaged; ``retry_failed`` sets it aside and begins the run again. CLUSTER:
    the cluster did not launch the run's job; it is continued like an interrupted one.
    """

    RUN = "run"
    CHECKPOINT = "checkpoint"
    STORAGE = "storage"
    CLUSTER = "cluster"

    @property
    def is_continued(self) -> bool:
        """Whether the same command takes the run up again."""
        return self in (FailureKind.STORAGE, FailureKind.CLUSTER)


@dataclass(frozen=True)
class Failure:
    """Why a run failed, in one line. An empty ``reason`` means that the run did not fail, or left
    no reason.
    """

    reason: str = ""
    kind: FailureKind = FailureKind.RUN

    def files(self, traceback: str = "") -> dict[str, str]:
        """The files that record this failure, by name, in the order to write them."""
        return {
            FAILURE: json.dumps({"kind": self.kind.value, "reason": self.reason}),
            ERROR: f"{self.reason}\n" + (traceback and f"\n{traceback}"),
        }

    @classmethod
    def of(cls, error: str, record: str) -> "Failure":
        """The inverse of ``files``. Runs of older versions have no ``error.json``: kind RUN."""
        try:
            kind = FailureKind(json.loads(record)["kind"])
        except (ValueError, TypeError, KeyError, RecursionError):
            kind = FailureKind.RUN
        return cls(first_line(error), kind)


def write_failure(folder: Path, failure: Failure, traceback: str = "") -> None:
    for name, text in failure.files(traceback).items():
        write_text(folder / name, text)


def read_failure(folder: Path) -> Failure:
    """The failure that is recorded in the folder of a run."""
    return Failure.of(_read(folder / ERROR, end=False), _read(folder / FAILURE, end=False))


def last_lines(folder: Path) -> str:
    """The last lines that a run left: the end of ``log.txt``, then of the traceback.

    Empty where it said nothing.
    """
    return excerpt(_read(folder / LOG), _read(folder / ERROR))


def first_line(error: str) -> str:
    lines = error.splitlines()
    return _clean(lines[0]).strip() if lines else ""


def excerpt(log: str, error: str) -> str:
    """``last_lines`` from the ends of the two files."""
    traceback = error.partition("\n")[2]  # below the reason, or below a line that was cut
    return "\n".join(_last(log, PRINTED_LINES) + _last(traceback, TRACEBACK_LINES))


def _last(text: str, count: int) -> list[str]:
    # A progress bar overwrites its line: what stood there last counts.
    lines = [_clean(line.rstrip().rpartition("\r")[2]).rstrip() for line in text.split("\n")]
    return [
        line if len(line) <= LINE_CHARACTERS else line[: LINE_CHARACTERS - 1] + "…"
        for line in lines
        if line.strip()
    ][-count:]


def _clean(line: str) -> str:
    return _CONTROL.sub("", _ESCAPE.sub("", line))


def _read(path: Path, end: bool = True) -> str:
    """The last ``TAIL_BYTES`` of a file, or its first; empty if there is no such file."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES) if end else 0)
            return file.read(TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
