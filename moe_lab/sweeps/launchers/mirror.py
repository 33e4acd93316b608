"""Training where the run store is an object store: in a scratch folder of the worker's machine,
copied to the store as it grows.

``MirrorLauncher`` stands before any launcher: it hands each run to ``train`` below, which fetches
what an earlier worker left, calls the trainer, and meanwhile copies files that changed, the
checkpoint after the metrics that lead up to it. ``done`` is written last.
"""

import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lab.errors import BusyError, RunError
from moe_lab.files import below, private_folder
from moe_lab.runs.bucket import Bucket
from moe_lab.runs.failures import Failure
from moe_lab.runs.layout import DAMAGED_CHECKPOINT, DONE, ERROR, FAILURE, LOG, RESUMED_FROM
from moe_lab.runs.object_leases import take
from moe_lab.runs.object_store import FILES, LEASE, STATE, STATE_FILES, scratch_name, write_failure
from moe_lab.runs.plan import check_run_name
from moe_lab.runs.store import Store
from moe_lab.runs.waits import Wait
from moe_lab.sweeps.launchers.protocol import Ending, Job, Launcher, Result
from moe_lab.sweeps.launchers.trainer import NOT_DONE, load_trainer
from moe_lab.sweeps.launchers.worker import failure_of

TRAINER = f"{__name__}:train"
COPY_SECONDS = 3.0
CHECKPOINT = "checkpoint"
"""Files whose name begins so are what a run resumes from: copied last while it trains, removed when
it is done.
"""
LOG_BYTES = 65536


class MirrorLauncher:
    """Runs jobs through ``inner`` with every run's files in ``store``; the methods are those of
    ``protocol.Launcher``.
    """

    def __init__(self, inner: Launcher, store: Store, trainer: str) -> None:
        self._inner, self._store, self._trainer = inner, store, trainer

    @property
    def slots(self) -> int:
        return self._inner.slots

    def submit(self, job: Job) -> None:
        values = {
            "url": self._store.folder,
            "run": job.run,
            "trainer": self._trainer,
            "config": job.config,
        }
        self._inner.submit(replace(job, config=values))

    def poll(self, timeout: float) -> list[Ending]:
        return [self._ending(ending) for ending in self._inner.poll(timeout)]

    def _ending(self, ending: Ending) -> Ending:
        if (
            ending.result is not Result.DIED
        ):  # a worker that died is followed by another in the same folder
            shutil.rmtree(self._store.path(ending.run), ignore_errors=True)
        if ending.result is Result.FAILED:
            with suppress(RunError):  # a store that takes no more: the driver finds out by itself
                self._store.record_failure(ending.run, Failure(ending.reason, ending.kind))
        return ending

    def waits(self) -> Mapping[str, Wait]:
        return self._inner.waits()

    def withdraw(self) -> None:
        self._inner.withdraw()

    def close(self) -> None:
        self._inner.close()


def train(values: dict[str, Any], folder: Path) -> None:
    """Train the run ``values["run"]`` of the store ``values["url"]``; ``folder`` is this attempt's
    own and gets the log and ``done``.
    """
    trainer = load_trainer(values["trainer"])  # first, because it may register the URL's protocol
    bucket, run = Bucket(values["url"]), values["run"]
    lease = take(bucket, f"{STATE}/{run}/{LEASE}", on_lost=lambda: os._exit(1))
    if lease is None:
        raise BusyError("another worker holds the lease of this run")
    shared = private_folder(Path(tempfile.gettempdir()) / scratch_name(values["url"]))
    scratch = below(shared, check_run_name(run, "a job"), "a job")
    with lease:
        if bucket.read(f"{STATE}/{run}/{DONE}") is None:
            copies = _Copies(bucket, run, scratch, folder / LOG, lease.confirm)
            try:
                if not (
                    scratch / DONE
                ).exists():  # else an earlier attempt here ended and could not copy all of it
                    copies.fetch()
                    with copies:
                        trainer(values["config"], scratch)
                copies.finish()
            except BusyError:
                raise
            except Exception as error:
                with suppress(RunError):
                    failure = failure_of(error, scratch)
                    write_failure(bucket, run, failure, traceback.format_exc())
                raise
        shutil.rmtree(scratch, ignore_errors=True)
    (folder / DONE).touch()


class _Copies:
    """The copies of one run's files in the store; as a context manager, kept up to date by a
    thread. ``confirm`` raises ``BusyError`` before a file of ours would replace that of the worker
    which took the run over.
    """

    def __init__(
        self, bucket: Bucket, run: str, scratch: Path, log: Path, confirm: Callable[[], None]
    ) -> None:
        self._bucket, self._run, self._scratch, self._log = bucket, run, scratch, log
        self._confirm = confirm
        self._copied: dict[str, tuple[int, int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, daemon=True)

    def fetch(self) -> None:
        """Replace what this machine has of an older attempt by what the last worker left."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        prefix = f"{FILES}/{self._run}/"
        for name in self._bucket.names(prefix.rstrip("/")):
            short = name.removeprefix(prefix)
            if short == DAMAGED_CHECKPOINT:
                continue
            path = below(self._scratch, short, self._bucket.url)
            with suppress(FileNotFoundError):  # an old listing may name what is gone
                self._bucket.download(name, path)
                self._copied[short] = _version(path)
        self._bucket.delete(f"{STATE}/{self._run}/{name}" for name in (ERROR, FAILURE))

    def __enter__(self) -> "_Copies":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(
            RunError, OSError
        ):  # what matters is copied again by ``finish``, or this attempt fails by itself
            self._copy()

    def _keep_up(self) -> None:
        while not self._stop.wait(COPY_SECONDS):
            with suppress(RunError, OSError):  # tried again at the next turn
                self._copy()

    def _copy(self) -> None:
        """The top-level files that changed.

        A checkpoint is held by a link while the metrics that lead up to it are copied first.
        """
        self._confirm()
        self._copy_log()
        files = [
            path
            for path in self._scratch.iterdir()
            if path.is_file() and not path.name.startswith(".") and path.name != DONE
        ]
        held = []
        for path in files:
            if path.name.startswith(CHECKPOINT) and self._changed(path):
                link = path.with_name(f".copy-{path.name}")
                link.unlink(missing_ok=True)
                os.link(path, link)
                held.append((path, link))
        for path in files:
            if not path.name.startswith(CHECKPOINT):
                self._upload(path, path.name)
        for path, link in held:
            self._upload(link, path.name)
            link.unlink()

    def _changed(self, path: Path, name: str | None = None) -> bool:
        return self._copied.get(name or path.name) != _version(path)

    def _upload(self, path: Path, name: str) -> None:
        if self._changed(path, name):
            version = _version(path)
            self._bucket.upload(path, self._object(name))
            self._copied[name] = version

    def _object(self, name: str) -> str:
        return f"{STATE if name in STATE_FILES else FILES}/{self._run}/{name}"

    def _copy_log(self) -> None:
        if self._log.exists():
            self._bucket.write(f"{STATE}/{self._run}/{LOG}", self._log.read_bytes()[-LOG_BYTES:])

    def finish(self) -> None:
        """Everything, then ``done``, then away with the checkpoint."""
        if not (self._scratch / DONE).exists():
            raise RunError(NOT_DONE)
        self._confirm()
        self._copy_log()
        for path in sorted(self._scratch.rglob("*")):
            name = path.relative_to(self._scratch).as_posix()
            if path.is_file() and not path.name.startswith((".", CHECKPOINT)) and name != DONE:
                self._upload(path, name)
        self._bucket.write(f"{STATE}/{self._run}/{DONE}", (self._scratch / DONE).read_bytes())
        old = {*RESUMED_FROM, *self._copied}  # not from a listing, which may lack the newest
        self._bucket.delete(self._object(name) for name in old if name.startswith(CHECKPOINT))


def _version(path: Path) -> tuple[int, int, int]:
    """What differs once a file was written again: one that replaces another of its size may have
    the same date, which counts in some milliseconds.
    """
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
