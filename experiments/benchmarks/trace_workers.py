"""Analyses of a large trace by one process, by one and two workers, and by a Ray cluster of
two nodes of one CPU: whether the frames are equal, and time, processor time and memory.

Each mode and analysis is a process of its own; modes take turns. What is measured is kept in
``--kept``, so that an interrupted measurement continues. ``--times N`` reads the files of
``trace_analysis.py`` linked N times. Memory is the largest resident size of one process, the
driver's or a worker's. Processor seconds are of the driver and its workers together; on a machine
that others use they say more than seconds.

    python experiments/benchmarks/trace_workers.py --rows 20000000 --times 10 --kept FILE.jsonl
    [--trace FOLDER] [--analyses coactivation ...] [--modes here one two ray] [--rounds 3] [--save]
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
from measure import save
from trace_analysis import link_trace, write_trace

from moe_lab import analysis
from moe_lab.analysis.map_reduce import mapped
from moe_lab.trace import open_trace
from moe_lab.worker_processes import THREADS

ANALYSES = {
    "load by domain": lambda trace: analysis.expert_load(trace, by="domain"),
    "coactivation": analysis.coactivation,
    "vocabulary": analysis.vocabulary_specialisation,
    "domain": lambda trace: analysis.domain_specialisation(trace, "domain"),
    "entropy": analysis.router_entropy,
    "class": lambda trace: analysis.class_profile(trace, "kind", "entropy"),
}
MODES = ("here", "one", "two", "ray")


class Watch:
    """The largest resident size of a Ray worker, and the processor seconds of all of them."""

    def __init__(self) -> None:
        self.largest, self.seconds, self._over = 0, {}, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        import psutil  # which ray brings

        while not self._over.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        times = process.cpu_times()
                        self.largest = max(self.largest, process.memory_info().rss)
                        self.seconds[process.pid] = times.user + times.system
                except psutil.Error:
                    continue

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def work(mode: str, name: str, folder: Path, kept: Path) -> None:
    """One analysis in this process; prints a digest of its frame, and what it took."""
    trace = open_trace(folder)
    watch = None
    with ExitStack() as stack:
        workers: Any = {"here": None, "one": 1, "two": 2, "ray": None}[mode]
        if mode == "ray":
            from ray.cluster_utils import Cluster

            from moe_lab.sweeps.launchers.ray_tasks import RayTasks

            node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
            cluster = Cluster(initialize_head=True, head_node_args=node)
            stack.callback(cluster.shutdown)
            cluster.add_node(**node)
            workers, watch = RayTasks(options={"address": str(cluster.address)}), Watch()
            stack.callback(watch.end)
        if workers is not None:
            stack.enter_context(mapped(workers, cache=kept))
        began, used = time.perf_counter(), time.process_time()
        frame = ANALYSES[name](trace)
        seconds, used = time.perf_counter() - began, time.process_time() - used
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    largest, worked = children.ru_maxrss * 1024, children.ru_utime + children.ru_stime
    if watch is not None:
        largest, worked = watch.largest, sum(watch.seconds.values())
    found = {
        "digest": hashlib.blake2b(frame.write_ipc(None).getvalue(), digest_size=8).hexdigest(),
        "seconds": seconds,
        "driver_processor": used,
        "worker_processor": worked if mode != "here" else 0.0,
        "driver_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "worker_gb": largest / 1e9 if mode != "here" else 0.0,
    }
    print(json.dumps(found))


def measure(mode: str, name: str, folder: Path, kept: Path) -> dict[str, Any]:
    environment = os.environ | dict.fromkeys(THREADS, "1") | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, __file__, "--worker", mode, name, str(folder), str(kept)]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(done.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--trace", type=Path, help="write the trace here, or read this one")
    parser.add_argument("--kept", type=Path, help="what was measured, a JSON line each")
    parser.add_argument("--analyses", nargs="+", default=[*ANALYSES], choices=ANALYSES)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--name", help="of the saved table, in place of the rows")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker[:2], *map(Path, args.worker[2:]))
        return
    rows = args.rows * args.times
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.trace or Path(scratch) / "trace"
        if not folder.exists():
            write_trace(folder, args.rows)
        if args.times > 1:
            linked = folder.with_name(f"{folder.name}-{args.times}")
            if not linked.exists():
                link_trace(folder, linked, args.times)
            folder = linked
        kept = args.kept or Path(scratch) / "kept.jsonl"
        found = (
            [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        )
        for name, turn in product(args.analyses, range(args.rounds)):
            for mode in args.modes:
                asked = {"rows": rows, "analysis": name, "mode": mode, "round": turn}
                if not any(asked.items() <= one.items() for one in found):
                    measured = measure(mode, name, folder, Path(scratch) / "partial")
                    found.append(asked | measured | {"load": os.getloadavg()[0]})
                    print(found[-1], flush=True)
                    with kept.open("a") as file:
                        file.write(json.dumps(found[-1]) + "\n")
    table = pl.DataFrame(found).filter(rows=rows)
    equal = table.group_by("analysis").agg(pl.col("digest").n_unique())
    print(table, equal)
    assert (equal["digest"] == 1).all()
    medians = table.group_by("analysis", "mode").agg(pl.col("seconds").median())
    wide = medians.pivot("mode", index="analysis", values="seconds")
    if {"one", "two"} <= set(wide.columns):
        print(wide.with_columns(efficiency=pl.col("one") / pl.col("two") / 2))
    if args.save:
        print("saved", save(table, f"trace_workers_{args.name or rows}"))


if __name__ == "__main__":
    main()
