"""What the wall before traces costs: opening one of ours, opening one from outside, and again.

    python experiments/benchmarks/foreign_trace.py --rows 2000000

Top-8 of 128 experts in 16 layers, with weights, entropies and margins; a row is one token in one
layer. Each opening is in this process; the one from outside includes the start of the child.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import polars as pl
from measure import save
from trace_analysis import write_trace

from moe_lab.trace import open_trace
from moe_lab.trace.seal import SEAL_FILE


def seconds(folder: Path, **options: bool) -> float:
    """Seconds to open the trace."""
    began = time.perf_counter()
    open_trace(folder, **options)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "trace"
        began = time.perf_counter()
        write_trace(folder, rows)
        written = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        ours = seconds(folder)
        unverified = seconds(folder, verify=False)
        (folder / SEAL_FILE).unlink()
        outside = seconds(folder)
        copy = open_trace(folder).data
        again = seconds(folder)
        if copy is not None:
            shutil.rmtree(copy)
    row = {
        "rows": rows,
        "megabytes": size / 1e6,
        "write_s": written,
        "open_ours_s": ours,
        "open_ours_unverified_s": unverified,
        "open_outside_s": outside,
        "open_outside_again_s": again,
    }
    for name, value in row.items():
        print(f"{name:24} {value:,.2f}")
    save(pl.DataFrame([row]), "foreign_trace")


if __name__ == "__main__":
    main()
