"""The frames that a page draws: results of analyses, each computed on first use and kept.

Sections ask for a frame by the function that makes it, so a page that is drawn a second time from
the same `Frames` computes nothing, and drawing can be timed apart from computing.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from moe_lab.progress import tell
from moe_lab.trace import Trace

T = TypeVar("T")
ANALYSES, OF_EACH = 24, 4
"""Analyses that a page draws of one trace and of each further one, roughly: the time left is
estimated from them.
"""


class Frames:
    """``frames(analysis, *subjects, **options)`` is ``analysis(*subjects, **options)``, kept.

    Subjects that cannot be hashed (traces, frames) are distinguished by identity and kept alive.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}
        self._traces: set[Hashable] = set()
        self._begun: dict[Hashable, Future[Any]] = {}
        self._thread = ThreadPoolExecutor(1)

    def begin(self, analysis: Callable[..., Any], *subjects: Any) -> None:
        """Begin in a thread what waits for another process most of its time."""
        key = (analysis, *map(_key, subjects), _key({}))
        if key not in self._kept:
            self._begun[key] = self._thread.submit(analysis, *subjects)

    def __call__(self, analysis: Callable[..., T], *subjects: Any, **options: Any) -> T:
        key = (analysis, *map(_key, subjects), _key(options))
        if key not in self._kept:
            begun = self._begun.pop(key, None)
            found = analysis(*subjects, **options) if begun is None else begun.result()
            self._kept[key] = subjects, found
            self._traces |= {_key(subject) for subject in subjects if isinstance(subject, Trace)}
            done = len(self._kept)
            total = ANALYSES + OF_EACH * max(0, len(self._traces) - 1)
            tell("computing figures", done, max(total, done + 1))
        return self._kept[key][1]


def _key(subject: Any) -> Hashable:
    if isinstance(subject, Mapping):
        return tuple((name, _key(value)) for name, value in subject.items())
    if isinstance(subject, Sequence) and not isinstance(subject, str):
        return tuple(map(_key, subject))
    return subject if isinstance(subject, str | int | float | None) else id(subject)
