"""Sizes, tables and clocks of ``gpu.py``'s pieces."""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEAD = 75
"""Exit code of a process whose device answers nothing any more: a new process can go on."""
GRACE = 15.0
"""Seconds after the deadline in which a row or piece that has begun may end."""

WARM_UP = 0.2
"""Seconds."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; a rehearsal has a tiny grid on a CPU."""

    device: str
    shapes: tuple[tuple[int, int, int, int, int], ...]  # T, d, E, k, f
    decoders: tuple[tuple[str, int, int, int], ...]  # name, layers, d_model, d_expert
    experts: tuple[int, ...]
    packed: tuple[int, ...]
    batch: int
    length: int
    peak: int
    rounds: int
    captured: tuple[int, int, int]  # layers, d_model, vocabulary
    pilot: str
    seconds: float  # of training that a rate is taken from


FULL = Sizes(
    device="cuda",
    shapes=(
        (16384, 2048, 128, 8, 768),  # Qwen3-30B-A3B
        (4096, 2048, 128, 8, 768),
        (32768, 2048, 128, 8, 768),
        (16384, 1024, 64, 4, 512),
        (16384, 4096, 128, 8, 1536),
        (16384, 2048, 512, 10, 512),  # Qwen3-Next-80B-A3B
        (16384, 2048, 256, 12, 512),
        (4096, 4096, 64, 8, 2048),
    ),
    decoders=(("20M", 6, 256, 192), ("120M", 12, 768, 512), ("400M", 16, 1024, 1024)),
    experts=(8, 64, 256),
    packed=(2, 4),
    batch=32,
    length=512,
    peak=8192,
    rounds=10,
    captured=(12, 1024, 32000),
    pilot="pilot",
    seconds=3.0,
)
TINY = Sizes(
    device="cpu",
    shapes=((64, 32, 4, 2, 16),),
    decoders=(("tiny", 1, 32, 16),),
    experts=(4,),
    packed=(2,),
    batch=2,
    length=16,
    peak=64,
    rounds=3,
    captured=(1, 64, 100),
    pilot="",
    seconds=0.2,
)


@dataclass
class Session:
    """Where the tables go, and until when.

    Attributes:
        deadline: of ``time.monotonic``, which all processes of a machine share.
        pilot: seconds for piece pilot; 0: it is left out.
        record: the provenance of a row that is measured now; rows of an earlier run keep theirs.
        patience: seconds after which a row or piece counts as hanging.
    """

    out: Path
    sizes: Sizes
    deadline: float
    pilot: float = 0.0
    record: Mapping[str, str] = field(default_factory=dict)
    patience: float = 180.0

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def marker(self) -> Path:
        """What is being measured now; absent in between."""
        return self.out / "running.json"

    def table(self, name: str) -> Path:
        return self.out / f"{name}.parquet"

    def rows(self, name: str) -> list[dict[str, Any]]:
        import polars as pl

        from moe_lab.errors import RunError, expected

        path = self.table(name)
        try:
            return pl.read_parquet(path).to_dicts() if path.exists() else []
        except (OSError, pl.exceptions.PolarsError) as error:
            got = f"{path}: {str(error).splitlines()[0]}"
            raise RunError(
                expected("a table of this command", got, "another --out"), "out"
            ) from error

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        import polars as pl

        from moe_lab.files import write_parquet

        whole = [{**row, **self.record, **row} for row in rows]
        write_parquet(self.table(name), pl.DataFrame(whole, infer_schema_length=None))

    def until(self, seconds: float) -> float:
        """When what begins now counts as hanging."""
        return min(time.monotonic() + seconds, self.deadline + GRACE)

    def begin(self, piece: str, until: float, case: Mapping[str, Any] | None = None) -> None:
        """Leave a note for the process that watches this one."""
        note = {"piece": piece, "until": until, "case": case}
        temporary = self.marker.with_suffix(".new")
        temporary.write_text(json.dumps(note))
        temporary.replace(self.marker)

    def end(self) -> None:
        self.marker.unlink(missing_ok=True)

    def each(
        self,
        name: str,
        cases: list[dict[str, Any]],
        measure: Callable[..., dict[str, Any]],
        patience: Callable[[dict[str, Any]], float] | None = None,
    ) -> None:
        """``measure(**case)`` for each case that has no row yet, written one by one."""
        rows = self.rows(name)
        for case in cases:
            if self.left < 0 or any(case.items() <= row.items() for row in rows):
                continue
            self.begin(name, self.until(patience(case) if patience else self.patience), case)
            try:
                found = {"error": ""} | measure(**case)
            except Exception as error:  # one contestant that fails must not cost the others
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            rows.append(case | found)
            print(json.dumps(rows[-1], default=str)[:300], flush=True)
            self.write(name, rows)
            self.end()
            if found["error"]:
                leave_if_dead(self.sizes.device)
            free(self.sizes.device)

    def forget_errors(self, name: str, by_row: bool = True) -> None:
        """Measure again what failed, for a package may be there now; not what lacked memory. A
        table that is not written by the row goes as a whole.
        """
        rows = self.rows(name)
        errors = [row.get("error") or "" for row in rows]
        kept = [
            row
            for row, error in zip(rows, errors, strict=True)
            if not error or "Memory" in error.split(":")[0]
        ]
        if len(kept) == len(rows):
            return
        if kept and by_row:
            self.write(name, kept)
        else:
            self.table(name).unlink()

    def failed_rows(self, name: str) -> int:
        return sum(bool(row.get("error")) for row in self.rows(name))

    def refuse_other_device(self) -> None:
        from moe_lab.errors import RunError, expected

        for path in sorted(self.out.glob("*.parquet")):
            others = {row.get("device") for row in self.rows(path.stem)} - {self.record["device"]}
            if others:
                got = f"rows of {', '.join(map(repr, others))} in {path}"
                wanted = f"a folder of tables of {self.record['device']!r}"
                raise RunError(expected(wanted, got, "another --out"), "out")


def leave_if_dead(device: str) -> None:
    """End this process where the last error left the device unusable to it, as an illegal access
    does.
    """
    if device != "cuda":
        return
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as error:
        print(f"a new process goes on: {error}", flush=True)
        os._exit(DEAD)  # the interpreter's own end would wait for the device


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Of each of ``rounds`` calls by the device's own clock. Three calls at least are not counted,
    and on CUDA as many as take ``WARM_UP``: an idle device needs a while for its full clock.
    """
    import torch

    for _ in range(3):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        until = time.monotonic() + WARM_UP
        while time.monotonic() < until:
            call()
            torch.cuda.synchronize()
    if device == "cpu":
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return found
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def quartiles(values: list[float], name: str) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {name: middle, f"{name}_q1": low, f"{name}_q3": high}
