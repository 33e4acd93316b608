"""Files from outside are decoded in a child process with limits, never in this one.

A forged Parquet file can end the process that decodes it (abort, SIGSEGV) or take all memory and
hours; no exception can be caught then. So this process asks a child, which has limits on memory,
processor time and the size of what it writes, to read the file once and to write a clean copy. A
child that dies costs one line of error; the next request starts another. One child serves many
requests, since its start takes most of a second.

    frame = read_parquet("metrics.parquet", RunError)
"""

import atexit
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from moe_lab import errors
from moe_lab.errors import MoELabError, expected
from moe_lab.plain_text import one_line

if TYPE_CHECKING:
    import polars as pl

try:
    import resource
except ImportError:  # pragma: no cover - not on Windows: a child without limits
    resource = None  # type: ignore[assignment]

BASE_MEMORY = 900 * 2**20
"""Bytes of private memory of a child, beside ``MEMORY_RATIO`` times the size of the file."""
MEMORY_RATIO = 8
BASE_SECONDS = 6
"""Processor seconds of one request, beside a second for each ``BYTES_PER_SECOND`` of the file."""
BYTES_PER_SECOND = 2**20
BASE_OUTPUT = 64 * 2**20
OUTPUT_RATIO = 64
"""A clean copy may be this much larger than the file, beside ``BASE_OUTPUT`` bytes."""
LONGEST_REASON = 300


class _Child:
    """One child process and the pipes to it."""

    def __init__(self) -> None:
        threads = dict.fromkeys(
            ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
        )
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moe_lab.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | threads | {"PYTHONPATH": path},
        )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer, or None where the child died or took more than ``seconds`` on the clock."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], seconds)[0]:
                return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            pass
        self.end()
        return None

    def end(self) -> None:
        """Kill the child and close its pipes."""
        self.process.kill()
        self.process.communicate()


_child: _Child | None = None
_one_at_a_time = threading.Lock()


def call(
    target: str,
    arguments: Sequence[Any],
    error: type[MoELabError],
    name: str,
    size: int,
    largest: int | None = None,
) -> Any:
    """Call ``module:function`` of this package in the child process, and return its result.

    Args:
        target: the function; its arguments and its result are JSON values.
        error: raised, naming ``name``, where the child fails.
        size: bytes of the files that it reads, which its time and output grow with.
        largest: bytes of the largest of them, which its memory grows with; ``size`` by default.

    Raises:
        MoELabError: as the function raises it, or ``error``.
    """
    global _child
    seconds = BASE_SECONDS + size / BYTES_PER_SECOND
    request = {
        "target": target,
        "arguments": list(arguments),
        "memory": BASE_MEMORY + MEMORY_RATIO * (size if largest is None else largest),
        "seconds": seconds,
        "output": output_limit(size),
    }
    with _one_at_a_time:
        if _child is None or _child.owner != os.getpid() or _child.process.poll() is not None:
            _child = _Child()
        answer = _child.ask(request, 3 * seconds + 20)
    if answer is None:
        got = "one that takes more memory or time than its size allows, or that ends its reader"
        raise error(f"{name}: " + expected("a readable file", got))
    if "error" in answer:
        raised = getattr(errors, answer["error"], error)(one_line(answer["message"]))
        raised.field = one_line(answer["field"])
        raise raised
    if "reason" in answer:
        raise error(f"{name}: " + expected("a readable file", one_line(answer["reason"])))
    return answer["result"]


def read_parquet(
    path: Path | str, error: type[MoELabError], columns: Sequence[str] | None = None
) -> "pl.DataFrame":
    """Read a Parquet file from outside through the child process.

    Raises:
        MoELabError: ``error``, in one line that names the file, where it cannot be read.
    """
    import polars as pl

    size = regular_size(path, error)
    with tempfile.TemporaryDirectory(prefix="moe_lab-") as folder:
        copy = Path(folder) / "clean.arrow"
        names = None if columns is None else [*columns]
        arguments = (str(Path(path).absolute()), str(copy), names, output_limit(size))
        call("moe_lab.sandbox:copy_parquet", arguments, error, str(path), size)
        return pl.read_ipc(copy)


def read_parquets(paths: Sequence[Path | str], error: type[MoELabError]) -> "list[pl.DataFrame]":
    """``read_parquet`` of several files in one request."""
    import polars as pl

    if not paths:
        return []
    sizes = [regular_size(path, error) for path in paths]
    with tempfile.TemporaryDirectory(prefix="moe_lab-") as folder:
        copies = [str(Path(folder) / f"{number}.arrow") for number in range(len(paths))]
        pairs = [
            (str(Path(path).absolute()), copy, output_limit(size))
            for path, copy, size in zip(paths, copies, sizes, strict=True)
        ]
        what, largest = f"{len(paths)} files", max(sizes, default=0)
        try:
            call("moe_lab.sandbox:copy_parquets", (pairs,), error, what, sum(sizes), largest)
        except error:  # of a file that this request does not name
            return [read_parquet(path, error) for path in paths]
        return [pl.read_ipc(copy) for copy in copies]


def copy_parquets(pairs: list[tuple[str, str, int]]) -> None:
    """Called in the child: ``copy_parquet`` of each source to its target."""
    for source, target, most in pairs:
        copy_parquet(source, target, None, most)


def copy_parquet(source: str, target: str, columns: list[str] | None, most: int) -> None:
    """Called in the child: write a Parquet file as uncompressed Arrow with at most ``most`` bytes
    of text.
    """
    import polars as pl

    frame = pl.read_parquet(
        source, columns=columns, use_statistics=False, hive_partitioning=False, glob=False
    )
    check_text_bytes(frame, most)
    frame.write_ipc(target, compression="uncompressed")


def check_text_bytes(frame: "pl.DataFrame", most: int) -> None:
    """Raise ``ValueError`` if the texts of a frame have more than ``most`` bytes together.

    Many rows may refer to one long text, which takes its space only once until it is read.
    """
    import polars as pl
    from polars import selectors

    lengths = frame.select(
        selectors.string().str.len_bytes().cast(pl.UInt64).sum(),
        selectors.binary().bin.size().cast(pl.UInt64).sum(),
    )
    if lengths.width and (total := sum(lengths.row(0))) > most:
        raise ValueError(expected(f"at most {most} bytes of text", total))


def output_limit(size: int) -> int:
    """Bytes that a clean copy of a file of ``size`` bytes may have."""
    return BASE_OUTPUT + OUTPUT_RATIO * size


def regular_size(path: Path | str, error: type[MoELabError]) -> int:
    """Size of a regular file in bytes; raises ``error`` for any other kind of file (a FIFO would
    block).
    """
    try:
        found = os.stat(path)
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror or failure}") from failure
    if not S_ISREG(found.st_mode):
        raise error(expected(f"a regular file at {path}", "something else"))
    return found.st_size


def _limit(memory: int, seconds: float, output: int) -> None:
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = used.ru_utime + used.ru_stime
    for kind, value in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CPU, int(spent + seconds) + 1),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard < 0 else min(value, hard), hard))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    module, function = request["target"].split(":")
    target = getattr(importlib.import_module(module), function)
    _limit(request["memory"], request["seconds"], request["output"])
    try:
        return {"result": target(*request["arguments"])}
    except MoELabError as error:
        return {"error": type(error).__name__, "message": str(error), "field": error.field}
    except MemoryError:
        return {"reason": "one that needs more memory than its size allows"}
    except BaseException as error:  # polars' panics are not Exceptions
        first = (str(error).strip().splitlines() or [""])[0][:LONGEST_REASON]
        return {"reason": first or type(error).__name__}


def main() -> None:
    """Serve requests, one JSON line each, until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        answers.flush()


@atexit.register
def end_child() -> None:
    """End the child process, if there is one; the next request starts another."""
    if _child is not None and _child.owner == os.getpid():
        _child.end()


if __name__ == "__main__":
    main()
