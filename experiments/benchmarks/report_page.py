"""Time of a whole `write_report` beside drawing alone, from frames that are already computed, or,
with ``--rows``, of `moe-lab report` on a large trace.

    python experiments/benchmarks/report_page.py runs/demo

writes ``results/report_page.parquet``. Without a folder a sweep like the demo's is made up (12 runs
and their traces), which needs no training.

    python experiments/benchmarks/report_page.py --rows 10000000 --rounds 3 --kept FILE.jsonl
    [--trace FOLDER] [--save]

makes up a trace of so many rows (16 layers, 8 of 64 experts) and times the command as a process of
its own, in seconds by the clock and of the processor (its second process included); memory is that
of its largest process. ``--kept`` holds what was measured, so that an interrupted measurement
continues; ``--trace`` keeps the trace. ``--save`` writes ``results/report_page_ROWS.parquet``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
from measure import save, summary, take_turns
from trace_analysis import write_trace

from moe_lab.report import write_report
from moe_lab.report.frames import Frames
from moe_lab.report.page import draw_page
from moe_lab.report.sources import gather

FIXTURES = Path(__file__).parents[2] / "tests" / "report"
EXPERTS = 64


def page_of_trace(folder: Path, page: Path) -> dict[str, float]:
    """What `moe-lab report` took."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "moe_lab", "report", str(folder), "--out", str(page)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    size = page.stat().st_size
    memory, processor = used.ru_maxrss / 1e6, used.ru_utime + used.ru_stime
    return {"seconds": seconds, "processor": processor, "gigabytes": memory, "page_bytes": size}


def time_trace(args: argparse.Namespace) -> None:
    kept: Path | None = args.kept
    lines = kept.read_text().splitlines() if kept is not None and kept.exists() else []
    found = [one for one in map(json.loads, lines) if one["rows"] == args.rows]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.trace or Path(scratch) / "trace"
        if len(found) < args.rounds and not folder.exists():
            write_trace(folder, args.rows, EXPERTS)
        for turn in range(len(found), args.rounds):
            measured = page_of_trace(folder, Path(scratch) / "page.html")
            found.append({"rows": args.rows, "round": turn} | measured)
            print(found[-1], flush=True)
            if kept is not None:
                with kept.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    table = pl.DataFrame(found)
    print(table, table.select(pl.col("seconds", "processor").median()))
    if args.save:
        print("saved", save(table, f"report_page_{args.rows}"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, help="of a made-up trace, whose page is timed")
    parser.add_argument("--trace", type=Path, help="write that trace here, or read this one")
    parser.add_argument("--kept", type=Path, help="what was measured, a JSON line each")
    parser.add_argument("--save", action="store_true", help="the table of the large trace")
    args = parser.parse_args()
    if args.rows is not None:
        if args.folder is not None:
            parser.error("expected a folder or --rows, got both")
        time_trace(args)
        return
    if args.trace or args.kept or args.save:
        parser.error("--trace, --kept and --save need --rows")
    with tempfile.TemporaryDirectory() as scratch:
        folder, page = args.folder or Path(scratch) / "sweep", Path(scratch) / "page.html"
        if args.folder is None:
            sys.path.insert(0, str(FIXTURES))
            from report_fixtures import make_sweep

            make_sweep(folder, ratios=(1, 2, 4, 8, 16))
        frames, material = Frames(), gather(folder)
        contestants = {
            "whole page": lambda: write_report(folder, page),
            "drawing": lambda: draw_page(material, frames, page, title="page", command=""),
        }
        table = summary(take_turns(contestants, args.rounds), against="whole page")
    print(table)
    print(save(table, "report_page"))


if __name__ == "__main__":
    main()
