"""An analysis as a process: ``python held_analysis.py TRACE FOLDER [ADDRESS]``, by two processes of
this machine, or by the Ray cluster at the address.

Each part leaves a line in ``FOLDER/marks`` when it begins. All but the first ``FREE`` stand still
while ``FOLDER/hold`` is there, so that what a test does happens in the middle of the analysis.
"""

import json
import os
import sys
import time
from pathlib import Path

import polars as pl

from moe_lab.analysis.map_reduce import Sum, appended, mapped, reduced
from moe_lab.trace import Trace, open_trace

FREE = 3
HOLD_SECONDS = 1200
"""At most, for parts that a failed test leaves behind."""


def documents(part: Trace, folder: str) -> pl.DataFrame:
    """[doc] of one file."""
    (number,) = part.manifest.entries["part"]
    (Path(folder) / "marks").mkdir(exist_ok=True)
    with (Path(folder) / "marks" / f"{number}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    deadline = time.monotonic() + HOLD_SECONDS
    while number >= FREE and (Path(folder) / "hold").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return pl.concat(part.batches(None, ["doc"])).unique().sort("doc")


def marks(folder: Path) -> dict[int, list[int]]:
    """Processes that began each part, by its number."""
    files = (folder / "marks").glob("*")
    return {int(path.name): [int(pid) for pid in path.read_text().split()] for path in files}


def kept(folder: Path) -> int:
    """Finished parts; a name that begins with a dot is of one that is being written."""
    return len(list((folder / "kept").glob("[!.]*.arrow")))


def held(trace: Trace, folder: Path) -> Sum:
    """The sum over the files of the token table."""
    import held_analysis  # as the workers import it

    return Sum(held_analysis.documents, (trace,), (None,), appended, (str(folder),))


def main(trace: str, folder: str, address: str = "") -> None:
    workers = 2
    if address:
        from moe_lab.sweeps.launchers.ray_tasks import RayTasks

        workers = RayTasks(options={"address": address})
    with mapped(workers, cache=Path(folder) / "kept", rows=1):
        (frames,) = reduced([held(open_trace(trace), Path(folder))])
    print(json.dumps(pl.concat(frames)["doc"].to_list()))


if __name__ == "__main__":
    main(*sys.argv[1:])
