"""The display of a running sweep: a live bar per run on a terminal, plain lines elsewhere.

What a run is doing is read from its ``status.json``.
"""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from moe_lab.number_format import duration
from moe_lab.plain_text import on_page
from moe_lab.runs.failures import FailureKind
from moe_lab.runs.record import Progress
from moe_lab.runs.store import Store
from moe_lab.sweeps.launchers.protocol import Ending, Job, Result

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_SECONDS = 10.0
REFRESH_SECONDS = 0.5


class View(Protocol):
    """The interface of a display that the driver reports to while a sweep runs."""

    def opened(self, finished: Sequence[Job], failed: Sequence[Job]) -> None:
        """The sweep begins; these of its runs were finished before, and these failed and are left
        alone.
        """
        ...

    def say(self, line: str) -> None: ...
    def started(self, job: Job) -> None: ...
    def ended(self, job: Job, ending: Ending) -> None: ...
    def refresh(self, active: Sequence[Job]) -> None:
        """Update the display; called several times a second."""
        ...

    def close(self) -> None: ...


def build_view(wanted: bool, store: Store, jobs: Sequence[Job]) -> View:
    if not wanted:
        return SilentView()
    return LiveView(store, jobs) if sys.stdout.isatty() else PlainView(store, jobs)


class SilentView:
    def opened(self, finished: Sequence[Job], failed: Sequence[Job]) -> None: ...
    def say(self, line: str) -> None: ...
    def started(self, job: Job) -> None: ...
    def ended(self, job: Job, ending: Ending) -> None: ...
    def refresh(self, active: Sequence[Job]) -> None: ...
    def close(self) -> None: ...


class Forecast:
    """Seconds left, from the share of all FLOPs done since the start, and of the slowest run."""

    def __init__(self, jobs: Sequence[Job], finished: Sequence[Job]) -> None:
        self._left = sum(job.cost for job in jobs) - sum(job.cost for job in finished)
        self._first_seen: dict[
            str, tuple[float, float]
        ] = {}  # run -> (time, fraction done), for runs resumed half-way
        self._done = 0.0
        self._began = time.monotonic()

    def ended(self, job: Job) -> None:
        self._left -= job.cost
        _, begun_with = self._first_seen.get(job.run, (0.0, 0.0))
        self._done += job.cost * (1 - begun_with)

    def seconds_left(self, active: Sequence[tuple[Job, Progress]]) -> float | None:
        done, left, slowest = self._done, self._left, 0.0
        for job, progress in active:
            slowest = max(slowest, self.run_seconds_left(job, progress) or 0.0)
            _, begun_with = self._first_seen[job.run]
            done += job.cost * max(0.0, progress.fraction - begun_with)
            left -= job.cost * progress.fraction
        elapsed = time.monotonic() - self._began
        return None if done <= 0 else max(left * elapsed / done, slowest)

    def run_seconds_left(self, job: Job, progress: Progress) -> float | None:
        """Seconds until one run's training ends; None until it has made progress."""
        began, begun_with = self._first_seen.setdefault(
            job.run, (time.monotonic(), progress.fraction)
        )
        moved = progress.fraction - begun_with
        return None if moved <= 0 else (1 - progress.fraction) * (time.monotonic() - began) / moved


def figures(progress: Progress) -> str:
    """Step, loss and speed of a run, as far as they are known."""
    parts = [f"step {progress.step}/{progress.steps}"] if progress.steps else ["starting"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.alarms:
        parts.append(f"{progress.alarms} alarm{'s' * (progress.alarms > 1)}")
    return ", ".join(parts)


def opening_line(
    store: Store,
    jobs: Sequence[Job],
    finished: Sequence[Job],
    failed: Sequence[Job],
) -> str:
    """One line for a sweep that begins."""
    line = f"{len(jobs)} runs in {store.folder}" + (
        f", {len(finished)} finished before" if finished else ""
    )
    return line + (
        f", {len(failed)} failed before (--retry-failed tries them again)" if failed else ""
    )


def ending_line(job: Job, ending: Ending, progress: Progress) -> str:
    """One line for a run that stopped."""
    unlaunched = ending.kind is FailureKind.CLUSTER
    again = "submitting it again" if unlaunched else "resuming from its checkpoint"
    return {
        Result.FINISHED: f"finished  {job.name}  ({figures(progress)})",
        Result.FAILED: f"FAILED    {job.name}: {ending.reason}",
        Result.BUSY: f"waiting   {job.name}: another sweep is training it",
        Result.DIED: f"again     {job.name}: {ending.reason}; {again}",
        Result.WITHDRAWN: f"withdrawn {job.name}: it had not begun",
    }[ending.result]


class PlainView:
    """Lines for logs: one when a run starts and ends, one per running run every ten seconds."""

    def __init__(self, store: Store, jobs: Sequence[Job]) -> None:
        self._store, self._jobs = store, jobs
        self._settled = 0
        self._forecast = Forecast(jobs, ())
        self._spoke = time.monotonic()

    def opened(self, finished: Sequence[Job], failed: Sequence[Job]) -> None:
        self._settled = len(finished) + len(failed)
        self._forecast = Forecast(self._jobs, [*finished, *failed])
        self.say(opening_line(self._store, self._jobs, finished, failed))

    def started(self, job: Job) -> None:
        self.say(f"started   {job.name}  ({job.run})")

    def ended(self, job: Job, ending: Ending) -> None:
        if ending.result in (Result.FINISHED, Result.FAILED):
            self._settled += 1
            self._forecast.ended(job)
        self.say(
            f"[{self._settled}/{len(self._jobs)}] "
            + ending_line(job, ending, self._store.progress(job.run))
        )

    def refresh(self, active: Sequence[Job]) -> None:
        if time.monotonic() - self._spoke < LINE_SECONDS:
            return
        self._spoke = time.monotonic()
        running = [(job, self._store.progress(job.run)) for job in active]
        left = duration(self._forecast.seconds_left(running))
        for job, progress in running:
            run_left = duration(self._forecast.run_seconds_left(job, progress))
            sweep = f"sweep: {self._settled}/{len(self._jobs)}, {left} left"
            self.say(f"running   {job.name}  {figures(progress)}, {run_left} left  ({sweep})")

    def close(self) -> None: ...

    def say(self, line: str) -> None:
        print(line, flush=True)


class LiveView:
    """A bar for the sweep and one per running run; what ended scrolls up as a line."""

    def __init__(self, store: Store, jobs: Sequence[Job]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self._store, self._jobs = store, jobs
        self._forecast = Forecast(jobs, ())
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
        )
        console = Console(file=getattr(sys.stdout, "raw", sys.stdout))
        self._bars = Bars(*columns, console=console, refresh_per_second=2)
        self._sweep = self._bars.add_task("sweep", total=len(jobs), figures="")
        self._tasks: dict[str, TaskID] = {}
        self._drawn = 0.0

    def opened(self, finished: Sequence[Job], failed: Sequence[Job]) -> None:
        self._forecast = Forecast(self._jobs, [*finished, *failed])
        self._bars.start()
        self._bars.update(self._sweep, completed=len(finished) + len(failed))
        if failed:
            self.say(opening_line(self._store, self._jobs, finished, failed))

    def say(self, line: str) -> None:
        self._bars.console.print(on_page(line), markup=False, highlight=False)

    def started(self, job: Job) -> None:
        self._tasks[job.run] = self._bars.add_task(
            on_page(job.name), total=None, figures="starting"
        )

    def ended(self, job: Job, ending: Ending) -> None:
        if job.run in self._tasks:
            self._bars.remove_task(self._tasks.pop(job.run))
        if ending.result in (Result.FINISHED, Result.FAILED):
            self._bars.advance(self._sweep)
            self._forecast.ended(job)
        self.say(ending_line(job, ending, self._store.progress(job.run)))

    def refresh(self, active: Sequence[Job]) -> None:
        if time.monotonic() - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = time.monotonic()
        running = [(job, self._store.progress(job.run)) for job in active]
        for job, progress in running:
            text = figures(progress).partition(", ")[2]  # without the step, which the bar shows
            text += (
                f", {duration(self._forecast.run_seconds_left(job, progress))} left"
                if text
                else "starting"
            )
            self._bars.update(
                self._tasks[job.run],
                total=progress.steps or None,
                completed=progress.step,
                figures=text,
            )
        self._bars.update(
            self._sweep, figures=f"{duration(self._forecast.seconds_left(running))} left"
        )

    def close(self) -> None:
        self._bars.stop()
