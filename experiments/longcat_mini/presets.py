"""Every mini (docs/decoder.md) trained for the demo's budget on the default corpus: does it stay
finite, does it reach its K_e?

moe-lab sweep run experiments/longcat_mini/presets.py --out runs/minis
python experiments/longcat_mini/presets.py runs/minis

The second command prints the table and writes ``experiments/longcat_mini/presets.parquet``.
"""

import argparse
import json
from pathlib import Path

import polars as pl

from moe_lab.files import atomic_path
from moe_lab.model import preset as mini
from moe_lab.model.minis import MINIS
from moe_lab.sweeps import RunStore, SweepConfig
from moe_lab.text import TextConfig
from moe_lab.training import OptimizerConfig, RunConfig
from moe_lab.versions import provenance

PRESETS = ("demo", "short")
QUESTION = "Do the published architectures train at laptop size?"
TOKENS = {"demo": 204_800, "short": 10_240}
COLUMNS = (
    "loss",
    "total_params",
    "flops_per_token",
    "train_tokens",
    "tokens_per_second",
    "mean_ffn_count",
    "sd_ffn_count",
)
MORE = (
    "target_ffn_count",
    "num_experts",
    "num_zero_experts",
    "top_k",
    "load_cv",
    "dead_experts",
    "eval_tokens",
)


def sweep(preset: str, *, seed: int = 0, device: str = "cpu") -> SweepConfig:
    runs = tuple(_run(name, preset, seed, device) for name in MINIS)
    return SweepConfig(name=f"minis_{preset}", question=QUESTION, preset=preset, runs=runs)


def _run(name: str, preset: str, seed: int, device: str) -> RunConfig:
    model = mini(name)
    return RunConfig(
        name=f"{name}-s{seed}",
        arm=name,
        seed=seed,
        model=model,
        text=TextConfig(vocab_size=model.vocab_size),
        optimizer=OptimizerConfig(lr=3e-3),
        batch_size=8,
        seq_length=model.context_length,
        train_tokens=TOKENS[preset],
        eval_tokens=30_000,
        device=device,
        **MINIS[name].training,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the finished sweep")
    store = RunStore(parser.parse_args().folder)
    records = [
        json.loads((store.path(run) / "result.json").read_text())
        for run in store.plan()["sweeps"][-1]["runs"]
    ]
    frame = pl.DataFrame(
        [
            {name: record.get(name) for name in ("arm", "seed", *COLUMNS, *MORE)}
            for record in records
        ]
    )
    for row in frame.iter_rows(named=True):
        reached = (
            f"mean ffn_count {row['mean_ffn_count']:.2f} (aims at {row['target_ffn_count']:g})"
        )
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        print(
            f"{row['arm']:20} {row['total_params'] / 1e6:5.1f}M  loss {row['loss']:.3f}  "
            f"{reached}  {speed}"
        )
    path = Path(__file__).parent / "presets.parquet"
    with atomic_path(path) as temporary:
        frame.with_columns(
            pl.lit(value).alias(name) for name, value in provenance().items()
        ).write_parquet(temporary)
    print("saved", path)


if __name__ == "__main__":
    main()
