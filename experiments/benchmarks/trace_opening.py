"""Opening a trace of ten billion tokens, and its load: from the manifest alone, without a row.

Writes manifests of traces of 94 layers, 8 of 128 experts, with 2^20 rows a file (made-up counts; no
data file is there), and opens each in fresh processes: processor and wall time, peak memory. The
imports are timed apart; the peak includes them.

    python experiments/benchmarks/trace_opening.py [--billions 1 3 10] [--rounds 3] [--save]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from moe_lab.trace import LayerMeta, TraceMeta, open_trace
from moe_lab.trace.manifest import MANIFEST
from moe_lab.trace.part_files import Listing
from moe_lab.trace.schema import MAX_ROWS_PER_PART, ROUTING_COLUMNS

LAYERS, EXPERTS, TOP_K = 94, 128, 8
PIECES = 20 * (len(ROUTING_COLUMNS) + 1)
"""Bytes of sizes and digests of the pieces of a file."""


def write_manifest(folder: Path, tokens: int) -> None:
    """The manifest of a trace of ``tokens`` tokens, files in the order of a writer."""
    meta = TraceMeta(layers=tuple(LayerMeta(layer, EXPERTS, 0, TOP_K) for layer in range(LAYERS)))
    generator = np.random.default_rng(0)
    listing, files = Listing(folder), -(-tokens // MAX_ROWS_PER_PART)
    for part in range(files):
        rows = min(MAX_ROWS_PER_PART, tokens - part * MAX_ROWS_PER_PART)
        shares = generator.dirichlet(np.full(EXPERTS, 4.0))
        counts_LE = generator.multinomial(rows * TOP_K, shares, size=LAYERS)
        digests = generator.bytes(32 * (LAYERS + 1))
        pieces = generator.bytes(PIECES * (LAYERS + 1))
        listing.add_known(None, part, rows, rows * 3 // 2, digests[-32:], None, pieces[-PIECES:])
        for layer, counts in enumerate(counts_LE):
            checksum = digests[32 * layer : 32 * layer + 32]
            at = PIECES * layer
            own = pieces[at : at + PIECES]
            listing.add_known(layer, part, rows, rows * 26, checksum, counts, own)
    listing.write(meta, complete=True)


def work(folder: Path, loads: bool) -> None:
    """Open the trace in this process, then its load if ``loads``; prints times and peak memory."""
    step: Callable[[], object] = partial(open_trace, folder)
    if loads:
        from moe_lab.analysis import expert_load

        step = partial(expert_load, open_trace(folder))
    wall, processor = time.perf_counter(), time.process_time()
    step()
    took = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps(took | {"peak_mb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--billions", type=float, nargs="+", default=[1, 3, 10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker[0]), args.worker[1] == "load")
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for billions in args.billions:
            folder = Path(place) / str(billions)
            began = time.process_time()
            write_manifest(folder, int(billions * 1e9))
            written = time.process_time() - began
            files = open_trace(folder).manifest.entries.height
            size = sum(path.stat().st_size for path in (folder / MANIFEST).iterdir())
            for what in ("open", "load"):
                command = [sys.executable, __file__, "--worker", str(folder), what]
                for _ in range(args.rounds):
                    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                    row = {"what": what, "tokens": int(billions * 1e9), "files": files}
                    row |= {"manifest_mb": size / 1e6, "write_s": written}
                    rows.append(row | json.loads(answer.stdout))
                    print(rows[-1], flush=True)
    columns = ("processor", "wall", "peak_mb")
    table = (
        pl.DataFrame(rows)
        .group_by("what", "tokens", "files", "manifest_mb", "write_s", maintain_order=True)
        .agg(
            pl.len().alias("rounds"),
            pl.col(columns).median(),
            pl.col("peak_mb").max().alias("most_mb"),
        )
    )
    with pl.Config(tbl_cols=-1, tbl_rows=-1, tbl_width_chars=160):
        print(table)
    for (what,), group in table.group_by("what", maintain_order=True):
        slope = np.polyfit(np.log(group["tokens"]), np.log(group["processor"]), 1)[0]
        print(f"{what}: processor time grows as tokens^{slope:.2f}")
    if args.save:
        from measure import save

        print("saved", save(table, "trace_opening"))


if __name__ == "__main__":
    main()
