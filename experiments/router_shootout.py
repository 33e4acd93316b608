"""Which router, all else equal? Every kind on the shelf in the same small decoder, with the same
mean number of real experts per token.

Same active budget: every run aims at two of 16 experts per token, on the same batches; kinds that
cannot are in ``LEFT_OUT`` with the reason. Coefficients and rates are each paper's where this size
allows them. ``gap`` is the loss less that of the plain top-k on the same seeds, with its 95 % t
interval: one that holds 0 ranks nothing, and neither does a router that missed the budget
(``on_budget`` false). ``sees_later_tokens`` 1: the loss is not that of a causal model.

    moe-lab sweep run experiments/router_shootout.py --preset cpu --out runs/router_shootout
    python experiments/router_shootout.py runs/router_shootout

The second command prints the table and writes experiments/router_shootout/results.parquet. A router
of your own takes part by ``--plugin FILE`` in both (CONTRIBUTING.md).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import t

from moe_lab.analysis.difficulty.intervals import false_discovery
from moe_lab.files import atomic_path
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.plugins import load
from moe_lab.routing import FACTS, RouterConfig
from moe_lab.routing.built_in_routers import KINDS
from moe_lab.sweeps import RunStore, SweepConfig
from moe_lab.text import TextConfig
from moe_lab.training import Dtype, OptimizerConfig, RunConfig
from moe_lab.versions import provenance

QUESTION = "Which router, at equal active compute?"
PRESETS = ("cpu", "gpu")
VOCAB = 2048
REFERENCE = "softmax_topk"
BUDGET, BUDGET_TOLERANCE = 2.0, 0.05
"""Real experts per token that every router aims at, and the share by which its mean may miss it and
still be compared.
"""
SIGN = {"kind": "sign", "rate": 1e-2}

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax_topk": {"norm_topk_prob": True},
    "softmax_topk, bias": {
        "kind": "softmax_topk",
        "norm_topk_prob": True,
        "controller": SIGN,
        "aux": 0.0,
    },
    "topk_softmax": {},
    "sigmoid_topk": {"norm_topk_prob": True, "controller": SIGN, "aux": 1e-4},
    "sqrt_softplus_topk": {"norm_topk_prob": True, "controller": SIGN, "aux": 1e-4},
    "deepseek_v2": {"num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 8.0},
    "deepseek_v3": {
        "num_groups": 4,
        "topk_groups": 2,
        "norm_topk_prob": True,
        "controller": SIGN,
        "aux": 1e-4,
    },
    "pnorm_topk": {},
    "noisy_topk": {"own": 0.1},
    "sparsemixer": {},
    "switch": {"top_k": 2, "capacity_factor": 1.25, "norm_topk_prob": True},
    "gshard_top2": {"capacity_factor": 2.0},
    "longcat": {
        "num_zero_experts": 8,
        "top_k": 3,
        "routed_scaling_factor": 8.0,
        "controller": {"kind": "proportional", "rate": 0.1, "target_ffn_count": 2.0},
    },
    "moepp": {"num_zero_experts": 8, "top_k": 3},
    "adamoe": {"num_zero_experts": 8, "top_k": 3},
    "top_p": {"top_k": 16, "top_p": 0.25, "own": 1e-4},
    "dtop_p": {"max_slots": 16},
    "expert_threshold": {"max_slots": 16},
    "quantile_threshold": {"max_slots": 16},
    "remoe": {"max_slots": 16, "router_bias": True},
    "dynmoe": {"top_k": 4},
    "seq_topk": {"max_slots": 16, "min_slots": 1, "norm_topk_prob": True},
    "expert_choice": {"max_slots": 16, "aux": 0.0},
    "sinkhorn": {"aux": 0.0},
    "quantile_balanced": {"norm_topk_prob": True, "aux": 0.0},
    "hash": {"vocab_size": VOCAB, "aux": 0.0},
    "scored_hash": {"vocab_size": VOCAB, "norm_topk_prob": True, "aux": 0.0},
    "random": {"aux": 0.0},
}
"""Label -> fields of ``RouterConfig``; ``kind`` is the label unless given, ``aux`` and ``own`` are
the run's loss coefficients.
"""

LEFT_OUT = {
    "token_choice": "the general form of kinds above",
    "llama4": "top-1 in its model; otherwise sigmoid_topk with the weight on the input",
    "gemma": "softmax_topk on a normalised input, which this decoder's already is",
    "inkling": "needs shared experts, which the others here have not",
    "zaya": "top-1 of E + 1: another active budget",
    "base": "top-1 by construction: another active budget",
    "xmoe": "top_p with the crossing rule of its paper, for many more experts",
    "d2dmoe": "a rule for trained dense models",
    "mixture_of_depths": "routes around the block, not between experts",
    "token_lookup": "a null model fitted to another router's trace",
}


def contestants() -> dict[str, dict[str, Any]]:
    """``ROUTERS``, and with their defaults the kinds that plugins added."""
    return ROUTERS | {kind: {} for kind in FACTS if kind not in KINDS}


def sweep(preset: str, *, seed: int = 0, device: str = "cpu") -> SweepConfig:
    runs = [
        _run(preset, label, dict(fields), seed + offset, device)
        for offset in range(3)
        for label, fields in contestants().items()
    ]
    return SweepConfig(
        name=f"router_shootout_{preset}", question=QUESTION, preset=preset, runs=tuple(runs)
    )


def _run(preset: str, label: str, fields: dict[str, Any], seed: int, device: str) -> RunConfig:
    big = preset == "gpu"
    width, layers, length = (256, 6, 256) if big else (64, 2, 128)
    aux, own = fields.pop("aux", 1e-2), fields.pop("own", 1.0)
    router = RouterConfig.from_dict({"kind": label, "num_experts": 16, "top_k": 2} | fields)
    moe = MoEConfig(d_model=width, d_expert=width, router=router)
    return RunConfig(
        name=f"{label}-s{seed}",
        arm=label,
        seed=seed,
        model=DecoderConfig(
            vocab_size=VOCAB,
            num_layers=layers,
            d_model=width,
            num_heads=width // 32,
            context_length=length,
            moe=moe,
        ),
        text=TextConfig(vocab_size=VOCAB),
        optimizer=OptimizerConfig(lr=2e-3 if big else 4e-3),
        batch_size=64 if big else 8,
        seq_length=length,
        train_tokens=200_000_000 if big else 102_400,
        router_aux_loss_coef=aux,
        router_own_loss_coef=own,
        eval_tokens=200_000 if big else 30_000,
        device=device,
        dtype=Dtype.BFLOAT16 if big else Dtype.FLOAT32,
    )


def table(folder: Path) -> pl.DataFrame:
    """One row per router: means over seeds, and the loss against the plain top-k's on the same
    seeds with its 95 % t interval.
    """
    rows = []
    store = RunStore(folder)
    for path in (store.path(run) / "result.json" for run in store.plan()["sweeps"][-1]["runs"]):
        record = json.loads(path.read_text())
        metrics = pl.read_parquet(path.parent / "metrics.parquet").tail(10)
        names = (
            "arm",
            "seed",
            "loss",
            "load_cv",
            "max_violation",
            "mean_ffn_count",
            "sd_ffn_count",
            "total_params",
            "train_tokens",
        )
        last = metrics.row(-1, named=True)
        step_ms = 1e3 * last["tokens"] / last["step"] / record["tokens_per_second"]
        rows.append(
            {name: record[name] for name in names}
            | {"sees_later_tokens": float(record.get("sees_later_tokens", False))}
            | {"router_entropy": metrics["router_entropy"].mean(), "step_ms": step_ms}
        )
    frame = pl.DataFrame(rows, infer_schema_length=None)
    plain = frame.filter(pl.col("arm") == REFERENCE).select("seed", reference=pl.col("loss"))
    frame = (
        frame.join(plain, on="seed", how="left")
        .with_columns(gap=pl.col("loss") - pl.col("reference"))
        .drop("reference")
    )
    means = [pl.col(name).mean() for name in frame.columns if name not in ("arm", "seed", "gap")]
    seeds = frame["seed"].n_unique()
    half = pl.col("gap").std() * (t.ppf(0.975, seeds - 1) / seeds**0.5)
    gap = pl.col("gap").mean()
    table = frame.group_by("arm").agg(
        pl.len().alias("seeds"),
        gap,
        (gap - half).alias("gap_lo"),
        (gap + half).alias("gap_hi"),
        *means,
    )
    on_budget = ((pl.col("mean_ffn_count") / BUDGET - 1).abs() <= BUDGET_TOLERANCE).alias(
        "on_budget"
    )
    return with_q(table.with_columns(on_budget)).sort(pl.col("on_budget").not_(), "loss")


def with_q(table: pl.DataFrame) -> pl.DataFrame:
    """``table`` with the false discovery rate ``q`` of each gap among all routers (Benjamini and
    Hochberg): of 26 intervals of 95 % one misses 0 by chance. Null for the reference.
    """
    df = table["seeds"].cast(pl.Int64).to_numpy() - 1
    half = ((table["gap_hi"] - table["gap_lo"]) / 2).to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * t.sf(np.abs(table["gap"].to_numpy()) * t.ppf(0.975, df) / half, df)
    q = false_discovery(np.where(half > 0, p, np.nan))
    return table.with_columns(pl.Series("q", q).fill_nan(None))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the finished sweep")
    parser.add_argument("--plugin", action="append", default=[], help="that the sweep ran with")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "router_shootout" / "results.parquet",
        help="the table",
    )
    args = parser.parse_args()
    for plugin in args.plugin:
        load(plugin)
    frame = table(args.folder)
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        float_precision=3,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
    ):
        print(frame)
    with atomic_path(args.out) as temporary:
        frame.with_columns(
            pl.lit(value).alias(name) for name, value in provenance().items()
        ).write_parquet(temporary)
    print("saved", args.out)


if __name__ == "__main__":
    main()
