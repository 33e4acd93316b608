"""The grid of ``tiny_grid.py`` as a process that tests watch and kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tiny_grid import HELD, HOLD

from moe_lab.runs.layout import DONE

FOLDER = Path(__file__).parent


class Driver:
    """The grid as a process, with what it printed in a file.

    ``on`` makes of the command the one that runs it, such as ``hosts.Host.command``; ``url`` is the
    grid's store in place of the folder ``out``.
    """

    def __init__(
        self,
        corpus: Path,
        out: Path,
        *words: str,
        url: str = "",
        on: Callable[..., list[str]] = lambda *words: list(words),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.out = out
        self.log = out.with_suffix(".log")
        command = on(sys.executable, str(FOLDER / "tiny_grid.py"), str(corpus), url or str(out))
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, *words],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    def release(self) -> None:
        """Let the runs go on that ``hold`` stopped."""
        (self.out / HOLD).unlink()

    def wait_for(self, what: str, condition: Callable[[], Any], seconds: float = 420) -> Any:
        """What ``condition`` says once it is true."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, (
                f"not within {seconds:g} s: {what}; the log ends: {self.said()[-2000:]}"
            )
            time.sleep(0.1)
        return found

    def held(self) -> dict[int, str]:
        """Run by process of the runs that stand still in the middle of their training, with a
        checkpoint behind them.
        """
        found = {}
        for pid, run in trainers(self.out).items():
            with suppress(FileNotFoundError):
                if (self.out / run / HELD).read_text().split()[:1] == [str(pid)]:
                    found[pid] = run
        return found

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, seconds: float = 600) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def hold(out: Path) -> Path:
    """A sweep's folder whose runs stop on their way, until ``Driver.release``."""
    out.mkdir()
    (out / HOLD).touch()
    return out


def parents() -> dict[int, int]:
    """Parent by process, of those alive."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[int(path.parent.name)] = int(fields[1])
    return found


def family(roots: set[int]) -> set[int]:
    """Processes with all they started that still live."""
    known, found = parents(), set(roots)
    while more := {pid for pid, parent in known.items() if parent in found} - found:
        found |= more
    return found


def trainers(out: Path) -> dict[int, str]:
    """Run by process of the runs that are being trained: a process that came too late claims a
    finished run for a moment, and a claim may be gone before it is read.
    """
    alive, found = parents(), {}
    for path in out.glob("*/.claim-*"):
        with suppress(FileNotFoundError):
            text = path.read_text()
            if text and not path.with_name(DONE).exists():
                found[json.loads(text)["pid"]] = path.parent.name
    return {pid: run for pid, run in found.items() if pid in alive}
