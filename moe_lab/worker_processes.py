"""Processes of this machine that compute tasks, one thread each: pickled tasks in, pickled results
out. A process ends with the one that started it, whose end closes its input.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moe_lab.errors import MoELabError, RunError, expected

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
MOST_DEATHS = 3
"""Of the workers that have one task, one after another."""
Task = Callable[[], Any]


class WorkerProcesses:
    """A number of processes; the methods are those of ``map_reduce.Workers``.

    Args:
        threads: of polars and of linear algebra in each; None: as many as here, so that sums of
            floats are taken in the same order.
    """

    def __init__(self, workers: int, threads: int | None = 1) -> None:
        self.ahead = 2 * workers
        self._environment = {} if threads is None else dict.fromkeys(THREADS, str(threads))
        self._threads = ThreadPoolExecutor(workers)
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def submit(self, task: Task) -> Future[Any]:
        return self._threads.submit(self._compute, task)

    def result(self, submitted: Future[Any]) -> Any:
        return submitted.result()

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._threads.shutdown()
        for process in self._all:
            with contextlib.suppress(OSError), process:  # which closes its pipes
                pass

    def _compute(self, task: Task) -> Any:
        code = 0
        for death in range(1, MOST_DEATHS + 1):
            process = self._process()
            answer = _ask(process, task)
            if answer is not None:
                self._idle.put(process)
                error, result = answer
                if error is not None:
                    raise error
                return result
            process.kill()
            code = process.wait()
            if self._closed:
                break
            if death < MOST_DEATHS:
                line = f"a worker process ended ({_end(code)}); another computes its task again"
                warnings.warn(line, stacklevel=2)
        what = f"worker processes that live; {MOST_DEATHS} with one task ended one after another"
        hint = "fewer workers, which need less memory together"
        raise RunError(expected(what, _end(code), hint), field="workers")

    def _process(self) -> "subprocess.Popen[bytes]":
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | self._environment | {"PYTHONPATH": path},
        )
        self._all.append(process)
        return process


def _ask(process: "subprocess.Popen[bytes]", task: Task) -> tuple[Exception | None, Any] | None:
    """(error, result) of a task, or None where the process died."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(task, process.stdin, protocol=5)
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        return None


def _end(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve() -> None:
    """Compute the tasks that come on the standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed does not disturb the answers
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pickle.load(sys.stdin.buffer)
            try:
                answer = None, task()
            except MoELabError as error:
                answer = error, None
            except Exception:
                answer = RuntimeError(traceback.format_exc()), None
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
