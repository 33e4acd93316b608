"""Reading a large trace: load, co-activation, specialisation by id and by domain, and the profile
of token classes, against plain DuckDB and polars queries over the same files.

Writes a made-up trace (16 layers, top-8 of 128, a Zipf vocabulary, 8 domains, 12 classes of ids),
then runs every analysis in a fresh process of its own, engines taking turns, and prints seconds,
processor seconds, peak memory and the ratio to this package. The queries say the plain thing:
unnest or explode the slots, join the token table where it is needed, group and count. They have no
intervals; this package's domain specialisation has its own. ``class`` is the profile without
intervals, as the queries are; ``class_draws`` has intervals from 1,000 draws of documents, against
the same queries. ``--times N`` reads the same files linked N times, to see time grow and memory
not.

    python experiments/benchmarks/trace_analysis.py [--rows 4000000] [--rounds 3] [--times 1]
    [--engines moe_lab polars duckdb] (duckdb: pip install -c constraints.txt duckdb)
"""

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from measure import save

from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.manifest import file_name
from moe_lab.trace.part_files import Listing

LAYERS, EXPERTS, TOP_K, VOCABULARY = 16, 128, 8, 50_304
THREADS = 2
ANALYSES = ("load", "coactivation", "vocabulary", "domain", "class", "class_draws")
ENGINES = ("moe_lab", "polars", "duckdb")


def write_trace(folder: Path, rows: int, experts: int = EXPERTS) -> None:
    """``rows`` token-layer rows.

    Experts of a token are an arithmetic progression modulo ``experts``, a power of two, with an odd
    step, so they are distinct.
    """
    tokens = rows // LAYERS
    generator = np.random.default_rng(0)
    meta = TraceMeta(
        layers=tuple(LayerMeta(layer, experts, 0, TOP_K) for layer in range(LAYERS)),
        vocab_size=VOCABULARY,
    )
    with TraceWriter(folder, meta) as writer:
        for start in range(0, tokens, 2**17):
            row = np.arange(start, min(start + 2**17, tokens))
            doc, pos = (row // 2048).astype(np.uint32), (row % 2048).astype(np.uint32)
            ids = generator.zipf(1.3, len(row)) % VOCABULARY
            writer.write_tokens(
                pl.DataFrame({"doc": doc, "pos": pos, "token_id": ids}).with_columns(
                    domain=pl.format("domain {}", pl.col("doc") % 8),
                    kind=pl.format("class {}", pl.col("token_id") % 12),
                    freq_band=pl.col("token_id").log(4).floor().cast(pl.UInt8, strict=False),
                )
            )
            for layer in range(LAYERS):
                first = (generator.beta(1, 2, len(row)) * experts).astype(np.int64)
                step = 2 * generator.integers(0, experts // 2, len(row)) + 1
                ids = ((first[:, None] + step[:, None] * np.arange(TOP_K)) % experts).astype(
                    np.uint16
                )
                weights = np.sort(generator.random((len(row), TOP_K), dtype=np.float32), axis=1)[
                    :, ::-1
                ].astype(np.float16)
                size = len(row)
                rows_of_layer = {
                    "doc": doc,
                    "pos": pos,
                    "experts": ids,
                    "weights": weights,
                    "ffn_count": np.full(size, TOP_K, np.uint8),
                    "zero_count": np.zeros(size, np.uint8),
                    "gate_mass_ffn": weights.sum(axis=1, dtype=np.float32),
                    "entropy": generator.random(size, dtype=np.float32),
                    "margin": generator.random(size, dtype=np.float32),
                    "dropped": np.zeros(size, np.uint8),
                }
                writer.write_rows(layer, rows_of_layer, np.bincount(ids.ravel(), minlength=experts))


def link_trace(folder: Path, target: Path, times: int) -> None:
    """The same files under ``times`` names each: a trace that is longer by that factor and takes no
    space.
    """
    trace = open_trace(folder)
    listing = Listing(target)
    for layer in (None, *trace.meta.layers):
        number = None if layer is None else layer.layer
        entries = trace.manifest.of_layer(number).drop("layer").rows()
        counts = [None] * len(entries) if layer is None else trace.manifest.file_counts(layer)
        for time_ in range(times):
            for (part, rows, size, digest), counts_E in zip(entries, counts, strict=True):
                new = time_ * len(entries) + part
                path = target / file_name(number, new)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / file_name(number, part), path)
                listing.add_known(number, new, rows, size, digest, counts_E)
    listing.write(trace.meta, complete=True)


def with_moe_lab(folder: Path) -> dict[str, Callable[[], Any]]:
    from moe_lab import analysis

    trace = open_trace(folder, verify=False)

    def profile(resamples: int) -> Any:
        frame = analysis.class_profile(
            trace, "kind", "entropy", include_first=True, resamples=resamples
        )
        return frame.drop_nulls("layer")["mean"].sum()

    return {
        "load": lambda: analysis.expert_load(trace)["count"].sum(),
        "coactivation": lambda: analysis.coactivation(trace)["count"].sum(),
        "vocabulary": lambda: analysis.vocabulary_specialisation(trace)["mean"].sum(),
        "domain": lambda: analysis.domain_specialisation(trace, "domain")["specialisation"].sum(),
        "class": lambda: profile(0),
        "class_draws": lambda: profile(1000),
    }


def with_polars(folder: Path) -> dict[str, Callable[[], Any]]:
    routing = pl.scan_parquet(folder / "routing", hive_partitioning=True)
    tokens = pl.scan_parquet(folder / "tokens")
    slots = routing.select("layer", "experts").explode("experts")

    def load() -> Any:
        return (
            slots.group_by("layer", "experts")
            .agg(n=pl.len())
            .collect(engine="streaming")["n"]
            .sum()
        )

    def coactivation() -> Any:
        first = routing.select("layer", "experts", a="experts").explode("a").explode("experts")
        return (
            first.filter(pl.col("a") < pl.col("experts"))
            .group_by("layer", "a", "experts")
            .agg(n=pl.len())
            .collect(engine="streaming")["n"]
            .sum()
        )

    def vocabulary() -> Any:
        joined = routing.select("layer", "doc", "pos", "experts").join(
            tokens.select("doc", "pos", "token_id"), on=["doc", "pos"]
        )
        counts = joined.explode("experts").group_by("layer", "token_id", "experts").agg(n=pl.len())
        share = (
            counts.group_by("layer", "token_id")
            .agg(top=pl.col("n").max())
            .join(tokens.group_by("token_id").agg(all=pl.len()), on="token_id")
        )
        means = share.group_by("layer").agg(mean=(pl.col("top") / pl.col("all")).mean())
        return means.collect(engine="streaming")["mean"].sum()

    def domain() -> Any:
        joined = routing.select("layer", "doc", "pos", "experts").join(
            tokens.select("doc", "pos", "domain"), on=["doc", "pos"]
        )
        counts = joined.explode("experts").group_by("layer", "domain", "experts").agg(n=pl.len())
        share = counts.join(tokens.group_by("domain").agg(all=pl.len()), on="domain")
        return share.select(pl.col("n") / pl.col("all")).collect(engine="streaming").sum().item()

    def classes() -> Any:
        joined = routing.select("layer", "doc", "pos", "entropy").join(
            tokens.select("doc", "pos", "kind"), on=["doc", "pos"]
        )
        means = joined.group_by("layer", "kind").agg(pl.col("entropy").cast(pl.Float64).mean())
        return means.collect(engine="streaming")["entropy"].sum()

    return {
        "load": load,
        "coactivation": coactivation,
        "vocabulary": vocabulary,
        "domain": domain,
        "class": classes,
        "class_draws": classes,
    }


def with_duckdb(folder: Path) -> dict[str, Callable[[], Any]]:
    duckdb = importlib.import_module("duckdb")

    connection = duckdb.connect(config={"threads": THREADS})
    routing, tokens = (
        f"read_parquet('{folder}/routing/*/*.parquet', hive_partitioning=true)",
        f"read_parquet('{folder}/tokens/*.parquet')",
    )
    queries = {
        "load": f"""
            select sum(n) from (select layer, e, count(*) n
            from (select layer, unnest(experts) e from {routing}) group by all)""",
        "coactivation": f"""
            select sum(n) from (select layer, a, b, count(*) n
            from (select layer, a, unnest(experts) b
            from (select layer, experts, unnest(experts) a from {routing}))
            where a < b group by all)""",
        "vocabulary": f"""
            select sum(mean) from (select layer, avg(top / n) mean
            from (select layer, token_id, max(c) top
            from (select layer, token_id, e, count(*) c
            from (select layer, token_id, unnest(experts) e
            from {routing} r join {tokens} t on r.doc = t.doc and r.pos = t.pos)
            group by all) group by all)
            join (select token_id, count(*) n from {tokens} group by all) using (token_id)
            group by layer)""",
        "domain": f"""
            select sum(c / n) from (select layer, domain, e, count(*) c
            from (select layer, domain, unnest(experts) e
            from {routing} r join {tokens} t on r.doc = t.doc and r.pos = t.pos) group by all)
            join (select domain, count(*) n from {tokens} group by all) using (domain)""",
        "class": f"""
            select sum(mean) from (select layer, kind, avg(entropy::double) mean
            from {routing} r join {tokens} t on r.doc = t.doc and r.pos = t.pos group by all)""",
    }
    queries["class_draws"] = queries["class"]
    return {
        name: lambda query=query: connection.execute(query).fetchall()[0][0]
        for name, query in queries.items()
    }


def work(engine: str, analysis: str, folder: Path) -> None:
    """One analysis in this process; prints its answer, seconds and peak memory."""
    run = {"moe_lab": with_moe_lab, "polars": with_polars, "duckdb": with_duckdb}[engine](folder)[
        analysis
    ]
    began, used = time.perf_counter(), time.process_time()
    answer = float(run())
    seconds, used = time.perf_counter() - began, time.process_time() - used
    print(
        json.dumps(
            {
                "answer": answer,
                "seconds": seconds,
                "processor": used,
                "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
        )
    )


def measure(engine: str, analysis: str, folder: Path) -> dict[str, float]:
    threads = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS"), str(THREADS))
    environment = os.environ | threads
    command = [sys.executable, __file__, "--worker", engine, analysis, str(folder)]
    return json.loads(
        subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--analyses", nargs="+", default=ANALYSES, choices=ANALYSES)
    parser.add_argument("--scratch", type=Path, help="folder for the trace while it is read")
    parser.add_argument("--trace", type=Path, help="write the trace here, or read this one")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], args.worker[1], Path(args.worker[2]))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = args.trace or Path(scratch) / "trace"
        if not folder.exists():
            write_trace(folder, args.rows)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        print(
            f"{args.rows * args.times:,} rows, {size / args.rows / TOP_K:.2f} bytes per slot, "
            f"{THREADS} threads"
        )
        if args.times > 1:
            link_trace(folder, Path(scratch) / "linked", args.times)
            folder = Path(scratch) / "linked"
        rows = []
        for analysis in args.analyses:
            found = {engine: [] for engine in args.engines}
            for turn in range(args.rounds):
                for engine in [
                    *args.engines[turn % len(args.engines) :],
                    *args.engines[: turn % len(args.engines)],
                ]:
                    found[engine].append(measure(engine, analysis, folder))
            answers = [run["answer"] for runs in found.values() for run in runs]
            assert np.allclose(answers, answers[0]), answers
            for engine, runs in found.items():
                ratios = [
                    run["seconds"] / own["seconds"]
                    for run, own in zip(runs, found[args.engines[0]], strict=True)
                ]
                seconds = statistics.median(run["seconds"] for run in runs)
                processor = statistics.median(run["processor"] for run in runs)
                memory = max(run["gigabytes"] for run in runs)
                ratio = statistics.median(ratios)
                print(
                    f"{analysis:13} {engine:8} {seconds:8.2f} s {processor:8.2f} s processor "
                    f"{memory:6.2f} GB {ratio:6.2f} of {args.engines[0]}",
                    flush=True,
                )
                rows.append(
                    {
                        "analysis": analysis,
                        "engine": engine,
                        "rounds": len(runs),
                        "seconds": seconds,
                        "processor": processor,
                        "gigabytes": memory,
                        "ratio": ratio,
                    }
                )
        print(
            "saved",
            save(
                pl.DataFrame(rows).with_columns(rows=pl.lit(args.rows * args.times)),
                f"trace_analysis_{args.rows * args.times}",
            ),
        )


if __name__ == "__main__":
    main()
