"""How many bytes of a trace on an object store are fetched, counted at the server: opening it, its
load, the co-activation of one layer, the same columns by polars' own reader of object stores, all
of it (``check``), and its page.

Writes a made-up trace (16 layers, 8 of 128 experts, weights and statistics), puts it on moto's S3
server on this machine, and reads it through s3fs, as the run store does. Seconds are of a server on
the same machine and in the same process: they say nothing of a network.

    python experiments/benchmarks/remote_trace.py [--rows 8000000] [--layer 3] [--save]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from trace_analysis import write_trace

from moe_lab import analysis
from moe_lab.report import write_report
from moe_lab.trace import Trace, open_trace

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from s3_server import S3Server, serve

URL = "s3://bucket/trace"


def polars_reads(server: S3Server, layer: int) -> int:
    """The ids of a layer by ``pl.scan_parquet`` on the URL, with credentials of its own."""
    options = {
        "aws_endpoint_url": f"http://127.0.0.1:{server.port}",
        "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        "aws_region": "us-east-1",
        "aws_allow_http": "true",
    }
    paths = [
        f"s3://{path.lstrip('/')}"
        for path in (f"bucket/{name}" for name in sorted(server.objects()))
        if f"layer={layer}/" in path
    ]
    scan = pl.scan_parquet(paths, storage_options=options, hive_partitioning=False)
    return scan.select("doc", "pos", "experts").collect().height


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, serve() as server:
        os.environ |= server.environment() | {"MOE_LAB_CACHE": f"{place}/cache"}
        folder = Path(place) / "trace"
        write_trace(folder, args.rows)
        server.put(folder, "trace")
        size = sum(len(content) for content in server.objects().values())
        trace: Trace = open_trace(URL)  # which imports the client
        steps: dict[str, Callable[[], object]] = {
            "open": lambda: open_trace(URL),
            "load": lambda: analysis.expert_load(trace),
            "coactivation of one layer": lambda: analysis.coactivation(trace, [args.layer]),
            "the same by polars' reader": lambda: polars_reads(server, args.layer),
            "check": trace.check,
            "page": lambda: write_report(trace, Path(place) / "page.html"),
        }
        for path in sorted(Path(place, "cache", "clean-traces").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()  # it is opened for the first time
        for name, step in steps.items():
            server.sent.clear()
            began, used = time.perf_counter(), time.process_time()
            step()
            seconds, used = time.perf_counter() - began, time.process_time() - used
            sent = [sent for method, _, sent in server.sent if method == "GET"]
            found.append(
                {"step": name, "rows": args.rows, "trace_bytes": size, "requests": len(server.sent)}
                | {"bytes": sum(sent), "share": sum(sent) / size}
                | {"seconds": seconds, "processor": used}
            )
            print(found[-1], flush=True)
    table = pl.DataFrame(found)
    with pl.Config(tbl_cols=-1, tbl_width_chars=140):
        print(table)
    if args.save:
        from measure import save

        print("saved", save(table, "remote_trace"))


if __name__ == "__main__":
    main()
