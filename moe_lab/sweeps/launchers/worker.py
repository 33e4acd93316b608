"""One worker process: runs one run after another, so that importing torch is paid for once.

``execute`` is what every launcher runs. ``python -m moe_lab.sweeps.launchers.worker TRAINER``
serves the local launcher: jobs come as JSON lines on standard input, events leave as JSON lines on
what was standard output, and the output of a trainer goes to the run's ``log.txt``. The worker ends
when its input does, which also happens when the sweep that started it is killed: no orphans.
"""

import errno
import faulthandler
import gc
import json
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from moe_lab.errors import BusyError, CheckpointError, MoELabError, RunError, StorageError
from moe_lab.files import cannot_write, remove_temporaries
from moe_lab.runs.failures import Failure, FailureKind, write_failure
from moe_lab.runs.folder_claims import acquire
from moe_lab.runs.layout import DONE, ERROR, FAILURE, LOG
from moe_lab.sweeps.launchers.protocol import MEMORY_HINT, Ending, Job, Result
from moe_lab.sweeps.launchers.trainer import NOT_DONE, Trainer, load_trainer
from moe_lab.sweeps.memory import give_back_freed

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
)
"""By which torch's errors tell that a device, or this machine, had no room; lower case."""

preempted = threading.Event()
"""Set by a launcher whose cluster takes the machine away: ``SystemExit`` then ends the process, and
is no failure of the run.
"""


def execute(trainer: Trainer, job: Job) -> Ending:
    """Claim the job's folder and train the run there, or resume it. Never raises for what happens
    inside the run. A finished run is not claimed, so that it is not taken for one in training.

    The reason of a failure goes to ``error.txt`` too: one line, then the traceback.
    """
    if (job.folder / DONE).exists():
        return Ending(job.run, Result.FINISHED)
    try:
        claim = acquire(job.folder, on_lost=_abandon)
    except RunError as error:
        failure = failure_of(error, job.folder)
        return Ending(job.run, Result.FAILED, failure.reason, failure.kind)
    if claim is None:
        return Ending(job.run, Result.BUSY)
    with claim:
        ending = (
            Ending(job.run, Result.FINISHED)
            if (job.folder / DONE).exists()
            else _train(trainer, job)
        )
        if ending.result is Result.FINISHED:
            claim.release(forget=True)
    if not job.shared:  # the folder is this machine's, and all that counts is in the store
        shutil.rmtree(job.folder, ignore_errors=True)
    return ending


def _train(trainer: Trainer, job: Job) -> Ending:
    try:
        _tidy(job.folder)
        with _output_to(job.folder / LOG):
            trainer(job.config, job.folder)
        if not (job.folder / DONE).exists():
            raise RunError(NOT_DONE)
        return Ending(job.run, Result.FINISHED)
    except BusyError:
        return Ending(job.run, Result.BUSY)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and preempted.is_set():
            raise
        failure = failure_of(error, job.folder)
        with suppress(RunError):  # a full disk: the reason still reaches the driver
            write_failure(job.folder, failure, traceback.format_exc())
        return Ending(job.run, Result.FAILED, failure.reason, failure.kind)


def _tidy(folder: Path) -> None:
    """Remove the last attempt's error and whatever a killed one left half-written."""
    for name in (ERROR, FAILURE):
        (folder / name).unlink(missing_ok=True)
    remove_temporaries(folder)


def _abandon() -> None:
    os._exit(
        1
    )  # another host believes this process dead and trains the run: two writers must not be


def failure_of(error: BaseException, folder: Path) -> Failure:
    """The failure of the run in ``folder`` that an exception describes."""
    kind = FailureKind.RUN
    if isinstance(error, StorageError) or getattr(error, "errno", None) in STORAGE_ERRORS:
        kind = FailureKind.STORAGE
    elif isinstance(error, CheckpointError):
        kind = FailureKind.CHECKPOINT
    return Failure(_one_line(error, folder), kind)


def _one_line(error: BaseException, folder: Path) -> str:
    """An exception as one line: our own message as it is, a full disk or memory in words, any other
    with its type and place.
    """
    message = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MoELabError):
        return message
    if isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and _is_memory(message)
    ):
        return f"out of memory{message and ': '}{message.rstrip('.')}; {MEMORY_HINT}"
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return cannot_write(error.filename or folder, error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{message and ': '}{message}{place}"


def _is_memory(message: str) -> bool:
    return any(words in message.lower() for words in MEMORY_WORDS)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append everything that this process writes to its standard streams to ``path``, from native
    code too.
    """
    kept = [os.dup(1), os.dup(2)]
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for stream in (1, 2):
            os.dup2(log, stream)
        yield
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for stream, original in zip((1, 2), kept, strict=True):
            os.dup2(original, stream)
        for descriptor in (*kept, log):
            os.close(descriptor)


def main(trainer_name: str) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the sweep decides and closes our input
    faulthandler.enable()
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()

    def tell(**event: str) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        trainer = load_trainer(trainer_name)
    except RunError as error:
        tell(event="broken", reason=str(error))
        return
    tell(event="ready")
    while True:
        ending = execute(trainer, jobs.get())
        gc.collect()  # tensors in reference cycles must not add to those of the next run
        give_back_freed()
        tell(event="ended", **asdict(ending))
        if ending.result is Result.FAILED:
            return  # CUDA errors leave a process unusable: the next run gets a new one


def _listen(jobs: "queue.SimpleQueue[Job]") -> None:
    for line in sys.stdin.buffer:
        values = json.loads(line)
        jobs.put(Job(values["run"], values["name"], Path(values["folder"]), values["config"]))
    os._exit(0)  # the sweep is over or dead; everything that matters was written by renaming


if __name__ == "__main__":
    main(sys.argv[1])
