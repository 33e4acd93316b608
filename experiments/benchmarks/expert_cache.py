"""How long a long trace takes: expert sets and LRU over ten budgets, the clairvoyant replay of the
same, peak memory of each in a process of its own, and a plain Python LRU of one budget in the same
run.

    python experiments/benchmarks/expert_cache.py [--rows 20M]

A row is a slot (one expert of one token in one layer). The routes are made up: 48 layers of 128
experts, 8 slots, skewed loads, and a third of a token's experts are those of the token before.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import polars as pl
from measure import save

from moe_lab.commands.options import UNITS, add_number
from moe_lab.serving import expert_cache, expert_sets
from moe_lab.serving.replay import library
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.rows import slot_rows

LAYERS, EXPERTS, SLOTS, TOKENS_OF_A_DOCUMENT, BYTES = 48, 128, 8, 512, 2**21
SHARES = np.linspace(0.05, 0.95, 10)


def write_trace(folder: Path, rows: int) -> None:
    tokens = rows // (LAYERS * SLOTS)
    generator = np.random.default_rng(0)
    meta = TraceMeta(
        tuple(LayerMeta(n, EXPERTS, top_k=SLOTS, expert_bytes=BYTES) for n in range(LAYERS)),
        has_weights=False,
        has_scores=False,
    )
    doc = (np.arange(tokens) // TOKENS_OF_A_DOCUMENT).astype(np.uint32)
    pos = (np.arange(tokens) % TOKENS_OF_A_DOCUMENT).astype(np.uint32)
    with TraceWriter(folder, meta) as writer:
        for layer in meta.layers:
            score = generator.gumbel(size=(tokens, EXPERTS)).astype(np.float32)
            score += generator.normal(size=EXPERTS).astype(np.float32)
            score[1:] = np.where(
                generator.random((tokens - 1, EXPERTS)) < 1 / 3, score[:-1], score[1:]
            )
            ids = np.argpartition(-score, SLOTS, axis=1)[:, :SLOTS]
            counts = np.bincount(ids.ravel(), minlength=EXPERTS)
            writer.write_rows(
                layer.layer, slot_rows(layer, doc, pos, ids, None, None, None), counts
            )


def run(folder: str, what: str) -> dict[str, float]:
    """Seconds and peak memory of one measurement in this process."""
    trace = open_trace(folder, verify=False)
    total = LAYERS * EXPERTS * BYTES
    library()  # compiled once per machine
    began, started = time.perf_counter(), time.process_time()
    if what == "sets":
        requests = sum(len(block.experts) for block in expert_sets(trace).blocks())
    elif what == "plain python lru, one budget":
        requests = plain_lru(trace, int(total * SHARES[4]))
    else:
        frame = expert_cache(trace, (SHARES * total).tolist(), [what])
        requests = int(frame["requests"][0])
    seconds = time.perf_counter() - began
    processor = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "processor": processor, "peak_gib": peak, "requests": requests}


def plain_lru(trace, budget: int) -> int:
    """An ``OrderedDict`` over the same sets; only its own loop is timed by the caller's share."""
    cache: OrderedDict[int, None] = OrderedDict()
    requests = hits = 0
    held = budget // BYTES
    for block in expert_sets(trace).blocks():
        starts, places, experts = (
            block.starts.tolist(),
            block.place.tolist(),
            block.experts.tolist(),
        )
        for start, end, place in zip(starts[:-1], starts[1:], places, strict=True):
            items = [place * EXPERTS + expert for expert in experts[start:end]]
            hits += sum(item in cache for item in items)
            for item in items:
                cache[item] = None
                cache.move_to_end(item)
            while len(cache) > held:
                cache.popitem(last=False)
            requests += len(items)
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_number(parser, "--rows", "20M", whole=True, units=UNITS, default=20_000_000)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WHAT"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "trace"
        write_trace(folder, args.rows)
        rows = []
        whats = ("sets", "lru", "clairvoyant", "lfu", "static", "plain python lru, one budget")
        for what in whats:
            command = [sys.executable, __file__, "--one", str(folder), what]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"what": what, "rows": args.rows, **json.loads(done.stdout)})
            print(rows[-1], flush=True)
    frame = pl.DataFrame(rows)
    for clock in ("seconds", "processor"):
        lru, plain = (frame.filter(what=w)[clock][0] for w in ("lru", whats[-1]))
        print(f"LRU, ten budgets: {10 * plain / lru:.0f} times as fast as plain Python ({clock})")
    save(frame, "expert_cache")


if __name__ == "__main__":
    main()
