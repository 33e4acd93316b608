"""Reading a sweep over the total:active ratio: what `wall_verdict` accepts, checked.

In: a frame with one row per run. Out: `Sweep`, the losses and which ratio and seed each has.
Diverged runs are left out, and named.
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, expected, require
from moe_lab.scaling.two_way import Estimate, Layout, estimate

COLUMNS = ("ratio", "seed", "loss", "active_params", "tokens")
SIZES = ("ratio", "active_params", "tokens")
MEASURES = (
    "learning_rate", "load_cv", "dead_experts", "drop_rate", "bits_per_byte", "vocab_size",
    "total_params", "flops_per_token",
)  # fmt: skip
"""Columns of numbers that a sweep may have."""
MOST_RUNS = 4096
HIGHEST_PLAUSIBLE_NATS = (
    15.0  # above ln(2^20); a perplexity or a wrong unit, not a cross-entropy per token
)
TOKENS_PER_EXPERT = (
    1e6  # the smallest published MoE sweep (misfit, 262M tokens, top-2 of 256) gave each expert 2e6
)
BUDGET_TOLERANCE = 0.005  # rounding to whole batches
ACTIVE_TOLERANCE = (
    1.5  # router weights grow with the number of experts; anything more is another experiment
)


class MissingColumnsError(AnalysisError):
    """Runs without a column that a sweep needs; ``missing`` names them."""

    def __init__(self, missing: tuple[str, ...], columns: list[str]) -> None:
        got = f"none called {', '.join(missing)} among {', '.join(columns) or 'none'}"
        super().__init__(expected(f"columns {', '.join(COLUMNS)}", got, "renaming yours"))
        self.missing, self.columns = missing, tuple(columns)


class SeveralBudgetsError(AnalysisError):
    """Runs of several token budgets (``budgets``, as text) where one is judged."""

    def __init__(self, budgets: str) -> None:
        hint = "one verdict per budget and the others as budgets="
        super().__init__(expected("one token budget", budgets, hint))
        self.budgets = budgets


@dataclass(frozen=True)
class Sweep:
    """R ratios of one sweep at one token budget.

    ``ratios`` [R] ascending, ``layout`` of its n runs, ``losses`` [n] nats/token, ``seeds`` their
    labels by index of ``layout.seed``, ``active`` [R] active parameters (they grow with the
    router's rows), ``diverged`` the (ratio, seed) of runs without a finite loss, left out.
    """

    ratios: np.ndarray
    layout: Layout
    losses: np.ndarray
    seeds: tuple[object, ...]
    active: np.ndarray
    tokens: float
    diverged: tuple[tuple[float, object], ...] = ()

    @property
    def log2(self) -> np.ndarray:
        return self.layout.x

    @property
    def size(self) -> float:
        """Active parameters in the middle of the grid."""
        return float(np.exp(np.log(self.active).mean()))

    def estimate(self, known: float | None = None) -> Estimate:
        """Means and noise; ``known`` states the noise between runs."""
        return estimate(self.layout, self.losses[None], known)

    def run(self, index: int) -> str:
        """The name of a run in a sentence: ``ratio 8 seed 1``."""
        ratio = self.ratios[self.layout.ratio[index]]
        return f"ratio {ratio:g} seed {self.seeds[self.layout.seed[index]]}"


def read_sweep(frame: pl.DataFrame | pl.LazyFrame, *, vocab_size: int | None = None) -> Sweep:
    """Check a frame of runs and take it apart.

    Raises ``AnalysisError`` with one line on the first thing that is wrong.
    """
    frame = typed(frame.lazy().collect())
    _check_columns(frame)
    finite = frame["loss"].cast(pl.Float64).is_finite()
    lost = frame.filter(~finite).sort("ratio", "seed")
    kept = frame.filter(finite).sort("ratio", "seed")
    if kept["ratio"].n_unique() < frame["ratio"].n_unique():
        gone = lost.filter(~pl.col("ratio").is_in(kept["ratio"].implode())).row(0, named=True)
        where = f"{gone['loss']} at ratio {gone['ratio']:g} seed {gone['seed']}"
        got = f"{where} ({lost.height} of {frame.height} runs)"
        raise AnalysisError(expected("a finite loss at every ratio", got, "leaving out that ratio"))
    _check_losses(kept, vocab_size)
    _check_design(kept)
    grouped = kept.group_by("ratio", maintain_order=True).agg(pl.col("active_params").mean())
    ratios = grouped["ratio"].cast(pl.Float64).to_numpy()
    seeds = kept["seed"].unique(maintain_order=True).sort()
    index = {seed: place for place, seed in enumerate(seeds.to_list())}
    layout = Layout(
        np.log2(ratios),
        np.searchsorted(ratios, kept["ratio"].cast(pl.Float64).to_numpy()),
        np.array([index[seed] for seed in kept["seed"].to_list()]),
    )
    return Sweep(
        ratios=ratios,
        layout=layout,
        losses=kept["loss"].cast(pl.Float64).to_numpy(),
        seeds=tuple(seeds.to_list()),
        active=grouped["active_params"].to_numpy(),
        tokens=float(kept["tokens"].cast(pl.Float64).median()),  # type: ignore[arg-type]
        diverged=tuple(lost.select("ratio", "seed").rows()),
    )


def typed(frame: pl.DataFrame) -> pl.DataFrame:
    """``frame`` with decimals as floats. Raises ``AnalysisError`` for a known column of another
    type.
    """
    for name in (*COLUMNS, *MEASURES, "arm", "sees_later_tokens"):
        kind = frame.schema.get(name, pl.Null())
        numbers = name in MEASURES or (name in COLUMNS and name != "seed")
        empty = isinstance(kind, pl.Null | pl.Boolean) and name not in COLUMNS
        require(
            kind.is_numeric() or empty or name not in frame.columns
            if numbers
            else not kind.is_nested(),
            f"{'numbers' if numbers else 'one value a run'} in {name}",
            f"{kind}",
            "casting the column",
            error=AnalysisError,
            field=name,
        )
    return frame.with_columns(pl.selectors.decimal().cast(pl.Float64))


def _check_columns(frame: pl.DataFrame) -> None:
    missing = tuple(name for name in COLUMNS if name not in frame.columns)
    if missing:
        raise MissingColumnsError(missing, frame.columns)
    require(
        not frame.is_empty(),
        "one row per run",
        "an empty frame",
        "pointing at a sweep with finished runs",
        error=AnalysisError,
    )
    require(
        frame.height <= MOST_RUNS,
        f"at most {MOST_RUNS:,} runs of one arm",
        f"{frame.height:,}",
        "one row per run, of one arm and one token budget",
        error=AnalysisError,
    )
    for name in COLUMNS:
        bad = frame[name].null_count()
        require(
            not bad,
            f"a value of {name} in every run",
            f"{bad} empty",
            "dropping those runs",
            error=AnalysisError,
        )
    for name in SIZES:
        values = frame[name].cast(pl.Float64)
        wrong = values.filter(~(values.is_finite() & (values > 0)))
        require(
            wrong.is_empty(),
            f"finite numbers above 0 in {name}",
            f"{wrong[0] if len(wrong) else 0:g} in {len(wrong)} of {frame.height} runs",
            "leaving out those runs",
            error=AnalysisError,
            field=name,
        )


def _check_losses(frame: pl.DataFrame, vocab_size: int | None) -> None:
    loss = frame["loss"].cast(pl.Float64)
    require(
        "bits_per_byte" not in frame.columns
        or frame["bits_per_byte"].null_count() != 0
        or (loss - frame["bits_per_byte"]).abs().max() != 0,
        "losses in nats per token",
        "the column bits_per_byte again",
        "the cross-entropy itself",
        error=AnalysisError,
    )
    lowest, highest = float(loss.min()), float(loss.max())  # type: ignore[arg-type]
    require(
        lowest > 0 and highest <= HIGHEST_PLAUSIBLE_NATS,
        f"losses in nats per token, between 0 and {HIGHEST_PLAUSIBLE_NATS:g}",
        f"{lowest if lowest <= 0 else highest:g}",
        "ln of a perplexity",
        error=AnalysisError,
    )
    if vocab_size is None and "vocab_size" in frame.columns:
        known = frame["vocab_size"].cast(pl.Float64).drop_nulls().drop_nans()
        vocab_size = int(known.max()) if len(known) and known.is_finite().all() else None  # type: ignore[arg-type]
    if vocab_size and vocab_size > 1 and lowest > math.log(vocab_size):
        what = (
            f"losses in nats, at most ln({vocab_size}) = {math.log(vocab_size):.2f} for a uniform "
            f"guess"
        )
        raise AnalysisError(
            expected(
                what, f"all above it (lowest {lowest:.2f})", "multiplying by ln 2 if they are bits"
            )
        )


def _check_design(frame: pl.DataFrame) -> None:
    ratios = frame["ratio"].n_unique()
    require(
        ratios >= 3,
        "three or more ratios",
        f"{ratios}",
        "a sweep with eight, each twice the last",
        error=AnalysisError,
    )
    if float(frame["ratio"].min()) < 1:  # type: ignore[arg-type]
        raise AnalysisError(
            expected(
                "ratios total:active of at least 1", f"{frame['ratio'].min():g}", "E/k, not k/E"
            )
        )
    budgets = sorted(frame["tokens"].unique().to_list())
    if budgets[0] <= 0 or budgets[-1] / budgets[0] - 1 > BUDGET_TOLERANCE:
        raise SeveralBudgetsError(", ".join(f"{tokens:g}" for tokens in budgets[:4]))
    twice = frame.group_by("ratio", "seed").len().filter(pl.col("len") > 1).sort("ratio", "seed")
    if twice.height:
        first = twice.row(0, named=True)
        got = f"{first['len']} at ratio {first['ratio']:g} seed {first['seed']}"
        mixed = "learning_rate" in frame.columns and frame["learning_rate"].n_unique() > 1
        hint = (
            "the best learning rate of each ratio alone"
            if mixed
            else "one arm and one token budget at a time"
        )
        raise AnalysisError(expected("one run per ratio and seed", got, hint))
    low, high = float(frame["active_params"].min()), float(frame["active_params"].max())  # type: ignore[arg-type]
    require(
        low > 0 and high / low <= ACTIVE_TOLERANCE,
        "one active size (within 50 %)",
        f"{low:g} to {high:g}",
        "constrained_optimum for an arm of fixed total",
        error=AnalysisError,
    )
