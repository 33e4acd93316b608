"""One thread that does jobs in order, with a bound on the bytes that wait for it.

Writing Parquet and taking statistics must not stop the model, and must not pile up behind it
either: ``submit`` waits while too much is queued. An error in a job is raised in the caller's
thread, by the next ``submit`` or ``drain``; jobs after it are not done.
"""

import os
import threading
from collections import deque
from collections.abc import Callable

from moe_lab.errors import TraceError, expected


class Background:
    """Jobs in order, at most ``limit_bytes`` of them waiting (one job may be larger by itself).

    The thread starts with the first job and is a daemon: a process that is interrupted ends without
    waiting for it. A forked child has no such thread: ``submit`` and ``drain`` raise ``TraceError``
    there, ``stop`` does nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._owner = os.getpid()
        self._jobs: deque[tuple[Callable[[], object], int]] = deque()
        self._waiting_bytes = 0
        self._busy = False
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object], size: int) -> None:
        """Queue a job that holds ``size`` bytes.

        Waits while the queue is full; raises what an earlier job raised.
        """
        self.check_process()
        with self._changed:
            while (
                self._error is None
                and self._waiting_bytes
                and self._waiting_bytes + size > self.limit_bytes
            ):
                self._changed.wait()
            self._raise()
            self._jobs.append((job, size))
            self._waiting_bytes += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="moe_lab-trace", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until every job is done; raises what one of them raised."""
        self.check_process()
        with self._changed:
            while self._error is None and (self._jobs or self._busy):
                self._changed.wait()
            self._raise()

    def stop(self) -> None:
        """Wait for the running job, drop the others, end the thread. Raises nothing."""
        if self.forked:
            return
        with self._changed:
            self._jobs.clear()
            self._waiting_bytes = 0
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
        self._stopped = False

    def forget_error(self) -> None:
        """Let jobs be done again after one failed."""
        self._error = None

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that made the object."""
        return os.getpid() != self._owner

    def check_process(self) -> None:
        """Raise ``TraceError`` in a forked child."""
        if self.forked:
            got = f"a forked child, process {os.getpid()}"
            hint = "a trace of its own in the child"
            raise TraceError(expected(f"a trace written by process {self._owner}", got, hint))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._stopped:
                    self._changed.wait()
                if not self._jobs:
                    return
                job, size = self._jobs.popleft()
                self._busy = True
            error: BaseException | None = None
            try:
                job()
            except BaseException as caught:
                error = caught
            with self._changed:
                self._busy = False
                self._waiting_bytes = max(0, self._waiting_bytes - size)
                if error is not None:
                    self._error = error
                    self._jobs.clear()
                    self._waiting_bytes = 0
                self._changed.notify_all()
