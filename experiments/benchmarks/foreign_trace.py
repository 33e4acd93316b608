"""What the wall before traces costs: opening one of ours and one from outside, and reading a layer
of each, where a child process checks and copies each file once.

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
from moe_lab.trace.clean_copies import CleanCopies
from moe_lab.trace.seal import SEAL_FILE


def seconds(folder: Path, layer: int | None = None) -> float:
    """Seconds to open the trace, or to read the ids of one layer."""
    began = time.perf_counter()
    trace = open_trace(folder)
    if layer is not None:
        began = time.perf_counter()
        for _ in trace.batches(layer, ["experts"]):
            pass
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
        row = {"rows": rows, "megabytes": size / 1e6, "write_s": written}
        row |= {"open_ours_s": seconds(folder), "layer_ours_s": seconds(folder, 0)}
        (folder / SEAL_FILE).unlink()
        row |= {"open_outside_s": seconds(folder), "layer_outside_s": seconds(folder, 0)}
        row |= {"open_again_s": seconds(folder), "layer_again_s": seconds(folder, 0)}
        storage = open_trace(folder).storage
        if isinstance(storage, CleanCopies):
            shutil.rmtree(storage.copy)
    for name, value in row.items():
        print(f"{name:24} {value:,.2f}")
    save(pl.DataFrame([row]), "foreign_trace")


if __name__ == "__main__":
    main()
