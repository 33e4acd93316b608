"""What a launcher adds to a run, and how well two workers fill two cores.

``overhead``: a sweep of three short runs on one worker by each launcher, against the same three
runs as three bare processes that import what a run needs, train it and end. A worker that stays for
several runs saves their imports, so an overhead can be negative; Ray's holds
the start of a cluster on this machine, a third of it per run. ``packing``: twelve runs one after
another in one process, which has its imports behind it, over twice the wall time of the same runs
as a sweep with two workers, whose time holds everything from the tokens to the end of the last
worker. Aim: 90 %.

    python experiments/benchmarks/launchers.py overhead [--rounds 3] [--launchers local slurm ray]
    python experiments/benchmarks/launchers.py packing [--runs 12] [--steps 800]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import polars as pl
from measure import save, take_turns

from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.sweeps import SweepConfig, run
from moe_lab.sweeps.launchers import train_run
from moe_lab.sweeps.launchers.local import ONE_THREAD
from moe_lab.text import TextConfig, load_tokens
from moe_lab.training import RunConfig

OPTIONS = {"local": {}, "slurm": {"cluster": "local"}, "ray": {}}
RUNS, SHORT = 3, 20
BARE = """
import json, sys
from pathlib import Path
from moe_lab.sweeps.launchers import train_run
train_run(json.loads(sys.argv[1]), Path(sys.argv[2]))
"""


def grid(corpus: Path, runs: int, steps: int) -> SweepConfig:
    """Equal decoders with another seed each, on the bytes of ``corpus``."""
    moe = MoEConfig(d_model=64, d_expert=32, router=RouterConfig(num_experts=8, top_k=2))
    model = DecoderConfig(
        vocab_size=257, num_layers=2, d_model=64, num_heads=2, context_length=64, moe=moe
    )
    text = TextConfig(corpus=str(corpus), tokenizer="byte")  # type: ignore[arg-type]
    one = RunConfig(
        name="run", model=model, text=text, batch_size=4, seq_length=64, train_tokens=steps * 256
    )
    return SweepConfig(
        name="launchers",
        question="What does it cost?",
        runs=tuple(one.replace(seed=seed) for seed in range(runs)),
    )


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.txt").write_text(
            "".join(f"{index} times {n} is {index * n}.\n" for n in range(40))
        )
    return folder


def overhead(place: Path, sweep: SweepConfig, launchers: list[str], rounds: int) -> pl.DataFrame:
    """One row per way of starting runs: seconds per run, and those beyond a bare process, median
    and quartiles over rounds.
    """
    fresh = count()

    def bare() -> None:
        for config in sweep.runs:
            folder = place / f"bare-{next(fresh)}"
            folder.mkdir()
            subprocess.run(
                [sys.executable, "-c", BARE, json.dumps(config.to_dict()), str(folder)],
                check=True,
                capture_output=True,
            )

    def by(launcher: str) -> Callable[[], None]:
        def launch() -> None:
            out = place / f"{launcher}-{next(fresh)}"
            assert run(
                sweep, out, 1, progress=False, launcher=launcher, launcher_options=OPTIONS[launcher]
            ).complete

        return launch

    seconds = take_turns(
        {"bare process": bare} | {name: by(name) for name in launchers}, rounds, warmup=0
    )
    rows = []
    for name, values in seconds.items():
        each = pl.Series([value / len(sweep.runs) for value in values])
        beyond = pl.Series(
            [
                (value - base) / len(sweep.runs)
                for value, base in zip(values, seconds["bare process"], strict=True)
            ]
        )
        row = {"launcher": name, "rounds": rounds, "runs": len(sweep.runs)}
        for column, series in (("seconds_per_run", each), ("overhead", beyond)):
            row |= {
                f"{column}{end}": series.quantile(q, "linear")
                for end, q in (("", 0.5), ("_q1", 0.25), ("_q3", 0.75))
            }
        rows.append(row)
    return pl.DataFrame(rows)


def packing(place: Path, sweep: SweepConfig) -> pl.DataFrame:
    """One row: the sum of single runs, the wall time of the sweep with two workers, and the
    efficiency.
    """
    single = []
    for config in sweep.runs:
        folder = place / "alone" / config.hash()
        folder.mkdir(parents=True)
        began = time.perf_counter()
        train_run(config.to_dict(), folder)
        single.append(time.perf_counter() - began)
    began = time.perf_counter()
    assert run(sweep, place / "packed", 2, progress=False).complete
    wall = time.perf_counter() - began
    efficiency = sum(single) / (2 * wall)
    return pl.DataFrame(
        {
            "runs": [len(single)],
            "single_seconds": [sum(single)],
            "wall_seconds": [wall],
            "efficiency": [efficiency],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=("overhead", "packing"), help="both if not given"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launchers", nargs="+", choices=tuple(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        corpus = write_corpus(place / "corpus")
        sweep = grid(corpus, RUNS, SHORT)
        load_tokens(sweep.runs[0].text)  # once: no contestant pays for it
        with pl.Config(
            tbl_cols=-1,
            tbl_hide_dataframe_shape=True,
            tbl_hide_column_data_types=True,
            tbl_width_chars=160,
        ):
            if args.what != "packing":
                print(frame := overhead(place, sweep, args.launchers, args.rounds))
                save(frame, "launchers_overhead")
            if args.what != "overhead":
                print(frame := packing(place, grid(corpus, args.runs, args.steps)))
                save(frame, "launchers_packing")


if __name__ == "__main__":
    os.environ.update(ONE_THREAD)  # for the bare processes; a launcher's workers have it anyway
    main()
