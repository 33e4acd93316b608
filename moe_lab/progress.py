"""How far a long computation is: library code reports it, a command shows it on a terminal.

``tracked`` and ``tell`` cost nothing without a listener. ``shown`` listens with one line on the
error stream that is rewritten in place; where that is no terminal, nothing is written.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO, TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]
SECONDS = 0.2
"""At most one line in this time."""
_listener: ContextVar[Listener | None] = ContextVar("progress", default=None)


def tell(what: str, done: int, total: int) -> None:
    """``done`` of ``total`` parts of ``what`` are done."""
    if (listener := _listener.get()) is not None:
        listener(what, done, total)


def say(line: str) -> None:
    """Print a line of this package on the error stream, in place of the progress shown there."""
    if isinstance(listener := _listener.get(), Meter):
        listener.clear()
    print(f"moe-lab: {line}", file=sys.stderr, flush=True)


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items in turn, with a report of how many are done."""
    tell(what, 0, len(items))
    for number, item in enumerate(items, 1):
        yield item
        tell(what, number, len(items))


class Meter:
    """What is done, its share and the time left, on one line of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._what, self._width = stream, "", 0
        self._began, self._drawn, self._first = 0.0, float("-inf"), 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._first = what, now, done
            self._drawn = float("-inf")
        if now - self._drawn < SECONDS and done < total:
            return
        self._drawn = now
        left = ""
        if self._first < done < total:
            seconds = (now - self._began) * (total - done) / (done - self._first)
            left = f", {clock(seconds)} left"
        share = f"{done / total:4.0%}" if total else ""
        self._write(f"{what} {share}{left}")

    def clear(self) -> None:
        """Take the line away, before something else is printed."""
        self._write("")
        self._width = 0

    def _write(self, line: str) -> None:
        blank = " " * (self._width - len(line))
        self._stream.write(f"\r{line}{blank}" + ("" if line else "\r"))
        self._stream.flush()
        self._width = len(line)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


@contextmanager
def shown(wanted: bool = True) -> Iterator[Meter | None]:
    """Show on the error stream what is reported inside, if it is a terminal; yields the meter."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    meter = Meter(sys.stderr)
    token = _listener.set(meter)
    try:
        yield meter
    finally:
        _listener.reset(token)
        meter.clear()
