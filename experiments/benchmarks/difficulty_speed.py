"""Speed and memory of the difficulty analysis (all but variance, baselines and marginal gain), and
of the class labels.

2.7M tokens x 12 layers under both alignments with 2,000 bootstrap repetitions, on the default
corpus with simulated routers, by one fresh process: association, nulls, curves and information in
one pass, as ``difficulty_study`` measures them, and the budget. Memory is the largest resident size
of that process, imports and all. Aim: 60 s by the clock and 3 GB on 2 cores.

    python experiments/benchmarks/difficulty_speed.py [--rounds 3] [--trace FILE]

``--trace`` keeps the simulated trace, and reads it where it is there.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from measure import save

from moe_lab.analysis.difficulty import compute_budget
from moe_lab.analysis.difficulty.association import association_rows, pairings, tables
from moe_lab.analysis.difficulty.curves import curve_rows, information_rows
from moe_lab.analysis.difficulty.nulls import null_rows
from moe_lab.text import TextConfig, load_tokens, ngram_surprisal, token_classes

sys.path.append(str(Path(__file__).parents[1]))
from simulated_routers import WORLDS, simulate_router

COLUMNS = ("doc", "pos", "token_id", "lexer", "freq_band", "subword", "copy")


def one_pass(frame: pl.LazyFrame) -> None:
    asked = (
        association_rows(resamples=2000, details=True),
        null_rows(),
        curve_rows(resamples=2000),
        information_rows(shuffles=2),
    )
    tables(pairings(frame, "difficulty", "ffn_count"), *asked)


ANALYSES = {"association, nulls, curves, information": one_pass, "budget": compute_budget}


def study(path: Path) -> list[dict[str, Any]]:
    """Seconds by the clock and of the processor of each analysis, and the most memory that this
    process had held until its end, in GB.
    """
    frame, found = pl.scan_parquet(path), []
    for name, analysis in ANALYSES.items():
        began, used = time.perf_counter(), time.process_time()
        analysis(frame)
        found.append(
            {
                "analysis": name,
                "seconds": time.perf_counter() - began,
                "processor": time.process_time() - used,
                "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
        )
    return found


def corpus() -> tuple[pl.DataFrame, float]:
    """The tokens of the default corpus with their classes, and characters labelled per CPU second,
    in millions.
    """
    text = load_tokens(TextConfig(vocab_size=4096))
    documents = [
        document
        for split in ("train", "validation", "reference")
        for document in text.documents(split)
    ]
    surprisal = ngram_surprisal([document.ids for document in documents], 4096)
    counts = text.counts()
    began = time.process_time()
    classes = [token_classes(document, text.tokenizer, counts) for document in documents]
    speed = (
        sum(len(document.text.encode()) for document in documents)
        / 1e6
        / (time.process_time() - began)
    )
    return pl.concat(classes).select(*COLUMNS).with_columns(
        difficulty=pl.Series(np.concatenate(surprisal))
    ), speed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, speed = args.trace or Path(folder) / "trace.parquet", None
        if not path.exists():
            tokens, speed = corpus()
            print(f"class labels: {speed:.2f} MB per CPU second")
            pl.concat(
                simulate_router(tokens, WORLDS["D"], "difficulty", layer)
                .drop("share")
                .with_columns(layer=pl.lit(layer))
                for layer in range(args.layers)
            ).write_parquet(path)
        layers, count = pl.scan_parquet(path).select(pl.col("layer").n_unique(), pl.len()).collect()
        rows = []
        for turn in range(args.rounds):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(study, (path,))
            for row in found:
                print(f"{row['analysis']:40} {row['seconds']:6.1f} s {row['processor']:6.1f} CPU s")
            seconds = sum(row["seconds"] for row in found)
            print(f"{seconds:.1f} s, {found[-1]['gigabytes']:.2f} GB", flush=True)
            rows += [row | {"round": turn} for row in found]
    shared = {
        "tokens": count.item() // layers.item(),
        "layers": layers.item(),
        "label_mb_per_s": speed,
        "load": os.getloadavg()[0],
    }
    frame = pl.DataFrame(rows).with_columns(
        **{name: pl.lit(value) for name, value in shared.items()}
    )
    print("saved", save(frame, "difficulty_speed"))


if __name__ == "__main__":
    main()
