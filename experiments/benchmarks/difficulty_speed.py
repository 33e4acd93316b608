"""Speed and memory of the difficulty analysis: all statistics but the marginal gain, and the class
labels.

2.7M tokens x 12 layers under both alignments with 2,000 bootstrap repetitions: association, nulls,
curves, information and budget, on the default corpus with simulated routers (two processes, the
layers dealt between them). Wall time depends on who else uses the machine, so CPU time is measured
beside it. Aim: 90 s and 4 GB on 2 cores.

    python experiments/benchmarks/difficulty_speed.py
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from measure import save

from moe_lab.analysis.difficulty import (
    compute_budget,
    difficulty_association,
    difficulty_curves,
    difficulty_information,
    difficulty_nulls,
)
from moe_lab.text import TextConfig, load_tokens, ngram_surprisal, token_classes

sys.path.append(str(Path(__file__).parents[1]))
from simulated_routers import WORLDS, simulate_router

COLUMNS = ("doc", "pos", "token_id", "lexer", "freq_band", "subword", "copy")
ANALYSES = {
    "association": lambda frame: difficulty_association(
        frame, "difficulty", resamples=2000, details=True
    ),
    "nulls": lambda frame: difficulty_nulls(frame, "difficulty"),
    "curves": lambda frame: difficulty_curves(frame, "difficulty", resamples=2000),
    "information": lambda frame: difficulty_information(frame, "difficulty", shuffles=2),
    "budget": compute_budget,
}


def study(path: Path, layers: list[int]) -> tuple[dict[str, float], float]:
    """CPU seconds of each analysis over some layers, and the most memory that the process held, in
    GB.
    """
    frame = pl.scan_parquet(path).filter(pl.col("layer").is_in(layers))
    seconds = {}
    for name, analysis in ANALYSES.items():
        began = time.process_time()
        analysis(frame)
        seconds[name] = time.process_time() - began
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


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
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    tokens, speed = corpus()
    print(f"class labels: {speed:.2f} MB per CPU second")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        layers = [
            simulate_router(tokens, WORLDS["D"], "difficulty", layer).drop("share")
            for layer in range(args.layers)
        ]
        pl.concat(
            frame.with_columns(layer=pl.lit(layer)) for layer, frame in enumerate(layers)
        ).write_parquet(path)
        count = tokens.height
        del layers, tokens
        shares = [list(range(worker, args.layers, args.workers)) for worker in range(args.workers)]
        began = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            found = pool.starmap(study, [(path, share) for share in shares])
        wall = time.perf_counter() - began
    rows = [
        {"analysis": name, "cpu_seconds": sum(seconds[name] for seconds, _ in found)}
        for name in ANALYSES
    ]
    total, memory = sum(row["cpu_seconds"] for row in rows), sum(held for _, held in found)
    for row in rows:
        print(f"{row['analysis']:12} {row['cpu_seconds']:7.1f} CPU seconds")
    spent = f"{total:.1f} CPU seconds ({total / args.workers:.1f} a worker)"
    print(f"{count:,} tokens x {args.layers} layers: {spent}, {wall:.1f} s wall, {memory:.2f} GB")
    shared = {
        "tokens": count,
        "layers": args.layers,
        "workers": args.workers,
        "wall_seconds": wall,
        "gigabytes": memory,
        "label_mb_per_s": speed,
    }
    frame = pl.DataFrame(rows).with_columns(
        **{name: pl.lit(value) for name, value in shared.items()}
    )
    print("saved", save(frame, "difficulty_speed"))


if __name__ == "__main__":
    main()
