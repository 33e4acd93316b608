"""Reading a sweep over the total:active ratio: what `wall_verdict` accepts, checked, and reduced to
one mean per ratio.

In: a frame with one row per run. Out: `Sweep`, the sufficient statistics (means, counts, pooled
noise) every later step uses. Runs that share a seed share their data order, so in a complete seeds
x ratios table the seed's own effect is removed from the noise (paired differences,
docs/scaling.md); otherwise the noise is the pooled spread within each ratio.
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, expected

COLUMNS = ("ratio", "seed", "loss", "active_params", "tokens")
HIGHEST_PLAUSIBLE_NATS = (
    15.0  # above ln(2^20); a perplexity or a wrong unit, not a cross-entropy per token
)
BUDGET_TOLERANCE = 0.005  # rounding to whole batches
ACTIVE_TOLERANCE = (
    1.5  # router weights grow with the number of experts; anything more is another experiment
)


class SeveralBudgetsError(AnalysisError):
    """Runs of several token budgets (``budgets``, as text) where one is judged."""

    def __init__(self, budgets: str) -> None:
        hint = "one verdict per budget and the others as budgets="
        super().__init__(expected("one token budget", budgets, hint))
        self.budgets = budgets


@dataclass(frozen=True)
class Sweep:
    """R ratios of one sweep at one token budget.

    ``ratios`` [R] ascending, ``means`` [R] nats/token, ``counts`` [R] runs per ratio, ``within``
    the residual sum of squares (nats^2) around the means on ``df`` degrees of freedom, ``nuisance``
    the number of seed effects removed, ``active`` [R] active parameters (they grow with the
    router's rows).
    """

    ratios: np.ndarray
    means: np.ndarray
    counts: np.ndarray
    within: float
    df: int
    nuisance: int
    seeds: int
    active: np.ndarray
    tokens: float

    @property
    def log2(self) -> np.ndarray:
        return np.log2(self.ratios)

    @property
    def runs(self) -> int:
        return int(self.counts.sum())

    @property
    def size(self) -> float:
        """Active parameters in the middle of the grid."""
        return float(np.exp(np.log(self.active).mean()))

    @property
    def paired(self) -> bool:
        return self.nuisance > 0


def read_sweep(frame: pl.DataFrame | pl.LazyFrame, *, vocab_size: int | None = None) -> Sweep:
    """Check a frame of runs and reduce it.

    Raises ``AnalysisError`` with one line on the first thing that is wrong.
    """
    frame = frame.lazy().collect()
    _check_columns(frame)
    _check_losses(frame, vocab_size)
    _check_design(frame)
    frame = frame.sort("ratio", "seed")
    grouped = frame.group_by("ratio", maintain_order=True).agg(
        pl.col("loss", "active_params").mean(), pl.len().alias("count")
    )
    seeds = frame["seed"].n_unique()
    within, df, nuisance = _noise(frame, grouped, seeds)
    return Sweep(
        ratios=grouped["ratio"].cast(pl.Float64).to_numpy(),
        means=grouped["loss"].cast(pl.Float64).to_numpy(),
        counts=grouped["count"].cast(pl.Int64).to_numpy(),
        within=within,
        df=df,
        nuisance=nuisance,
        seeds=seeds,
        active=grouped["active_params"].to_numpy(),
        tokens=float(frame["tokens"].cast(pl.Float64).median()),  # type: ignore[arg-type]
    )


def _noise(frame: pl.DataFrame, grouped: pl.DataFrame, seeds: int) -> tuple[float, int, int]:
    """Residual sum of squares around ratio means (and seed effects where every seed ran every
    ratio), its df, the seed effects.
    """
    residual = frame.with_columns(pl.col("loss") - pl.col("loss").mean().over("ratio"))
    complete = frame.height == seeds * grouped.height
    if complete and seeds > 1:
        residual = residual.with_columns(pl.col("loss") - pl.col("loss").mean().over("seed"))
    nuisance = seeds - 1 if complete else 0
    return (
        float((residual["loss"].cast(pl.Float64) ** 2).sum()),
        frame.height - grouped.height - nuisance,
        nuisance,
    )


def _check_columns(frame: pl.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise AnalysisError(
            expected(
                f"columns {', '.join(COLUMNS)}",
                f"none called {', '.join(missing)}",
                "renaming yours",
            )
        )
    if frame.is_empty():
        raise AnalysisError(
            expected("one row per run", "an empty frame", "pointing at a sweep with finished runs")
        )
    for name in COLUMNS:
        bad = frame[name].null_count()
        if bad:
            raise AnalysisError(
                expected(f"a value of {name} in every run", f"{bad} empty", "dropping those runs")
            )
        if name != "seed" and not frame[name].dtype.is_numeric():
            raise AnalysisError(
                expected(f"numbers in {name}", f"{frame[name].dtype}", "casting the column")
            )


def _check_losses(frame: pl.DataFrame, vocab_size: int | None) -> None:
    loss = frame["loss"].cast(pl.Float64)
    bad = frame.filter(~loss.is_finite())
    if bad.height:
        where = f"{bad['loss'][0]} at ratio {bad['ratio'][0]:g} seed {bad['seed'][0]} ({bad.height} of {frame.height} runs)"
        raise AnalysisError(
            expected("finite losses", where, "dropping the runs that diverged, and saying so")
        )
    if (
        "bits_per_byte" in frame.columns
        and frame["bits_per_byte"].null_count() == 0
        and (loss - frame["bits_per_byte"]).abs().max() == 0
    ):
        raise AnalysisError(
            expected(
                "losses in nats per token",
                "the column bits_per_byte again",
                "the cross-entropy itself",
            )
        )
    lowest, highest = float(loss.min()), float(loss.max())  # type: ignore[arg-type]
    if lowest <= 0 or highest > HIGHEST_PLAUSIBLE_NATS:
        got = f"{lowest if lowest <= 0 else highest:g}"
        raise AnalysisError(
            expected(
                f"losses in nats per token, between 0 and {HIGHEST_PLAUSIBLE_NATS:g}",
                got,
                "ln of a perplexity",
            )
        )
    if vocab_size is None and "vocab_size" in frame.columns:
        vocab_size = int(frame["vocab_size"].max())  # type: ignore[arg-type]
    if vocab_size and lowest > math.log(vocab_size):
        what = f"losses in nats, at most ln({vocab_size}) = {math.log(vocab_size):.2f} for a uniform guess"
        raise AnalysisError(
            expected(
                what, f"all above it (lowest {lowest:.2f})", "multiplying by ln 2 if they are bits"
            )
        )


def _check_design(frame: pl.DataFrame) -> None:
    ratios = frame["ratio"].n_unique()
    if ratios < 3:
        raise AnalysisError(
            expected("three or more ratios", f"{ratios}", "a sweep with eight, each twice the last")
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
    if low <= 0 or high / low > ACTIVE_TOLERANCE:
        got = f"{low:g} to {high:g}"
        raise AnalysisError(
            expected(
                "one active size (within 50 %)",
                got,
                "constrained_optimum for an arm of fixed total",
            )
        )
