"""Confounds: other causes that could have made or hidden a wall, one line each, from the columns of
a sweep (docs/scaling.md).

A learning rate a factor of two off costs as much as a doubling of the experts: on the misfit runs
the gain from 64 to 256 experts is .0013 nats per doubling at the best rate of the grid and
.016-.024 at its neighbours, a wall made by a grid of factor two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, require
from moe_lab.routing.facts import LATER_TOKENS
from moe_lab.runs.layout import TUNING
from moe_lab.scaling.compute_slope import MARGIN, law_slope
from moe_lab.scaling.sweep_losses import TOKENS_PER_EXPERT, typed
from moe_lab.scaling.wall_rule import Outcome
from moe_lab.seed_intervals import mean_interval

DROPPED = 0.01  # share of token slots beyond which dropping differs between ratios enough to matter
DEAD = 0.01
SHORT = "-short"  # ends the name of an arm's runs at a smaller token budget
SURE = 1.645  # standard errors by which a difference is taken to be one
SEES_LATER = "sees_later_tokens"
UNEVEN = 1.5  # growth of load_cv over the grid that asks for a look


class Status(StrEnum):
    CLEAR = "clear"
    SUSPECT = "suspect"
    NOT_MEASURED = "not measured"


Finding = tuple[Status, str]
END = frozenset({Outcome.WALL, Outcome.BELOW_MARGIN})
ANY = END | {Outcome.NO_WALL}
NONE: frozenset[Outcome] = frozenset()
MAKES: dict[str, tuple[frozenset[Outcome], frozenset[Outcome]]] = {
    "learning rate bracketed": (ANY, ANY),
    "learning rate spacing": (END, NONE),
    "gain depends on learning rate": (ANY, NONE),
    "learning rate moves with ratio": (ANY, NONE),
    "tokens per expert": (END, END),
    "break moves with tokens": (END, END),
    "dropped tokens": (END, NONE),
    "dead experts": (END, NONE),
    "load": (END, NONE),
    "hash-routing control": (ANY, END),
    "held-out text": (ANY, NONE),
    "causal loss": (ANY, NONE),
}
"""Confound -> the outcomes that it could have made where it is suspect, and where it was not
measured. What is not here (seeds, active size) is in the intervals or charged already.
"""


def caveats(table: pl.DataFrame, outcome: Outcome) -> tuple[str, ...]:
    """The confounds in ``table`` (as `confounds`) that are not excluded as the cause of
    ``outcome``.
    """
    found = []
    for name, status, _ in table.rows():
        suspect, unmeasured = MAKES.get(name, (NONE, NONE))
        could = suspect if status == Status.SUSPECT else unmeasured
        if status != Status.CLEAR and outcome in could:
            found.append(f"{name} ({status})")
    return tuple(found)


@dataclass(frozen=True)
class Sweeps:
    """The runs of one arm, which may hold several token budgets and learning rates; ``tuning``,
    those with its runs at other learning rates; ``controls``, the runs of arms with hash routing;
    the names of all ``arms``; the margin in nats per doubling.
    """

    frame: pl.DataFrame
    tuning: pl.DataFrame
    controls: pl.DataFrame
    arms: tuple[str, ...]
    margin: float

    def has(self, *names: str) -> bool:
        return all(
            name in self.frame.columns and self.frame[name].null_count() < self.frame.height
            for name in names
        )

    def largest_budget(self) -> pl.DataFrame:
        return self.frame.filter(pl.col("tokens") == pl.col("tokens").max())

    def tuned(self) -> pl.DataFrame:
        """The ratios that were run at several learning rates, at the largest token budget and with
        the seeds that have them; all runs of the largest budget where none was.
        """
        rates = self.tuning.group_by("tokens", "ratio").agg(
            pl.col("learning_rate").n_unique().alias("rates")
        )
        several = rates.filter(pl.col("rates") > 1)
        if several.is_empty():
            return self.largest_budget()
        chosen = several.filter(pl.col("tokens") == pl.col("tokens").max())
        runs = self.tuning.join(chosen, on=["tokens", "ratio"], how="semi")
        if "seed" not in runs.columns:
            return runs
        # The mean of three seeds at one rate beside single seeds at its neighbours would be a
        # difference of seeds.
        full = runs.group_by("ratio", "seed").agg(pl.col("learning_rate").n_unique().alias("rates"))
        full = full.filter(pl.col("rates") == pl.col("rates").max().over("ratio"))
        return runs.join(full, on=["ratio", "seed"], how="semi")

    def by_ratio(
        self, column: str, how: Callable[[pl.Expr], pl.Expr] = pl.Expr.mean
    ) -> pl.DataFrame:
        return self.frame.group_by("ratio").agg(how(pl.col(column)).alias(column)).sort("ratio")


def confounds(
    frame: pl.DataFrame | pl.LazyFrame, *, margin: float | None = None, arm: str | None = None
) -> pl.DataFrame:
    """[confound, status ("clear", "suspect", "not measured"), detail] for runs of [ratio, loss,
    active_params, tokens] and whatever else they have: seed, learning_rate, drop_rate, dead_experts
    (share), load_cv, arm, bits_per_byte, sees_later_tokens. Several token budgets and learning
    rates are welcome. ``margin`` in nats per doubling; by default 5 % of compute from the published
    law. ``arm``: the arm that is judged; ``arm``-short holds its runs at a smaller token budget and
    "lr" those at other learning rates; an arm whose name holds "hash" is the control of the router.
    """
    frame = typed(frame.lazy().collect())
    missing = [
        name for name in ("ratio", "loss", "active_params", "tokens") if name not in frame.columns
    ]
    require(
        not missing,
        "columns ratio, loss, active_params, tokens",
        f"none called {', '.join(missing)}",
        error=AnalysisError,
        field=missing[0] if missing else "",
    )
    runs = tuning = frame.filter(pl.col("loss").is_finite())
    if arm is not None:
        runs, tuning = (
            runs.filter(pl.col("arm").cast(pl.String).is_in(names))
            for names in ((arm, arm + SHORT), (arm, arm + SHORT, TUNING))
        )
    require(
        runs["ratio"].n_unique() >= 2,
        "two or more ratios with finite losses",
        runs["ratio"].n_unique(),
        error=AnalysisError,
        field="ratio",
    )
    if margin is None:
        ratios = runs["ratio"].cast(pl.Float64)
        middle = math.sqrt(cast(float, ratios.min()) * cast(float, ratios.max()))
        active, tokens = (
            cast(float, runs[name].cast(pl.Float64).median())
            for name in ("active_params", "tokens")
        )
        margin = (MARGIN - 1) * law_slope(active, tokens, middle).value
    arms = (
        tuple(sorted(set(frame["arm"].drop_nulls().cast(pl.String))))
        if "arm" in frame.columns
        else ()
    )
    hashed = frame.filter(pl.col("arm").cast(pl.String).str.contains("hash")) if arms else frame[:0]
    sweeps = Sweeps(runs, tuning, hashed.filter(pl.col("loss").is_finite()), arms, margin)
    rows = [(name, *check(sweeps)) for name, check in CHECKS.items()]
    return pl.DataFrame(
        rows, schema={"confound": pl.String, "status": pl.String, "detail": pl.String}, orient="row"
    )


def _seeds(s: Sweeps) -> Finding:
    if not s.has("seed"):
        return Status.NOT_MEASURED, "no column seed"
    least = int(s.largest_budget().group_by("ratio").agg(pl.col("seed").n_unique())["seed"].min())  # type: ignore[arg-type]
    return (
        Status.CLEAR if least >= 3 else Status.SUSPECT
    ), f"{least} at the ratio that has fewest; three separate noise from trend"


def _learning_rate_bracket(s: Sweeps) -> Finding:
    if not s.has("learning_rate"):
        return Status.NOT_MEASURED, "no column learning_rate"
    open_ended = [ratio for ratio, curve in _curves(s) if not curve.bracketed]
    if open_ended:
        return (
            Status.SUSPECT,
            f"no better rate on both sides of the best at ratio "
            f"{', '.join(f'{r:g}' for r in open_ended)}",
        )
    return Status.CLEAR, "the best rate of every ratio has a worse one on either side"


def _learning_rate_grid(s: Sweeps) -> Finding:
    """What half a grid step costs: gains smaller than this may be made or hidden by the rates."""
    if not s.has("learning_rate"):
        return Status.NOT_MEASURED, "no column learning_rate"
    curves = [curve for _, curve in _curves(s) if curve.bracketed]
    if not curves:
        return Status.NOT_MEASURED, "no ratio has three rates around its best"
    cost = max(curve.half_step_cost for curve in curves)
    step = max(curve.step for curve in curves)
    text = (
        f"rates a factor {step:.2g} apart leave up to {cost:.4f} nats untuned against a margin of "
        f"{s.margin:.4f}"
    )
    return (
        (Status.SUSPECT, text + "; space them by the square root of two")
        if cost > s.margin
        else (Status.CLEAR, text)
    )


def _gain_by_learning_rate(s: Sweeps) -> Finding:
    """The last gain at every rate both ratios share: a wall at one rate that is none at the next is
    a wall of the tuning.
    """
    if not s.has("learning_rate"):
        return Status.NOT_MEASURED, "no column learning_rate"
    runs = s.tuned()
    ratios = runs["ratio"].unique().sort()
    if len(ratios) < 2:
        return Status.NOT_MEASURED, "fewer than two ratios have several rates"
    low, high = ratios[-2:]
    table = runs.group_by("ratio", "learning_rate").agg(pl.col("loss").mean())
    at = {
        r: dict(table.filter(pl.col("ratio") == r).select("learning_rate", "loss").iter_rows())
        for r in (low, high)
    }
    doublings = math.log2(high / low)
    gains = {
        rate: (at[low][rate] - at[high][rate]) / doublings
        for rate in sorted(at[low].keys() & at[high].keys())
    }
    if len(gains) < 2:
        return Status.NOT_MEASURED, "the last two ratios share fewer than two rates"
    best = min(gains, key=lambda rate: at[low][rate] + at[high][rate])
    rates = list(gains)
    near = rates[max(0, rates.index(best) - 1) : rates.index(best) + 2]
    spread = max(gains[rate] for rate in near) - min(gains[rate] for rate in near)
    text = f"gain per doubling {low:g} to {high:g}: " + ", ".join(
        f"{gains[rate]:z.4f} at {rate:g}" for rate in near
    )
    if spread > s.margin and min(gains[rate] for rate in near) < s.margin < max(
        gains[rate] for rate in near
    ):
        return (
            Status.SUSPECT,
            text + f"; on both sides of the margin {s.margin:.4f}, "
            "so a wall here would be the learning rate's",
        )
    return Status.CLEAR, text


def _learning_rate_shift(s: Sweeps) -> Finding:
    if not s.has("learning_rate"):
        return Status.NOT_MEASURED, "no column learning_rate"
    best = [(ratio, curve.best) for ratio, curve in _curves(s) if curve.bracketed]
    if len(best) < 2:
        return Status.NOT_MEASURED, "fewer than two ratios have a bracketed best rate"
    factor = max(rate for _, rate in best) / min(rate for _, rate in best)
    text = (
        f"the best rate moves by a factor {factor:.2f} from ratio {best[0][0]:g} "
        f"({best[0][1]:.3g}) to {best[-1][0]:g} ({best[-1][1]:.3g})"
    )
    return (
        (Status.SUSPECT, text + "; tune every ratio")
        if factor > math.sqrt(2)
        else (Status.CLEAR, text)
    )


@dataclass(frozen=True)
class RateCurve:
    """Loss against ln learning rate at one ratio: whether the best rate is inside, the vertex of a
    parabola, what half a step costs.
    """

    bracketed: bool
    best: float
    step: float
    half_step_cost: float


def _curves(s: Sweeps) -> list[tuple[float, RateCurve]]:
    curves = []
    for (ratio,), runs in s.tuned().sort("ratio").group_by("ratio", maintain_order=True):
        table = runs.group_by("learning_rate").agg(pl.col("loss").mean()).sort("learning_rate")
        rate, loss = np.log(table["learning_rate"].to_numpy()), table["loss"].to_numpy()
        middle = int(loss.argmin())
        if not 0 < middle < len(loss) - 1:
            curves.append(
                (float(ratio), RateCurve(False, math.exp(rate[middle]), math.nan, math.nan))
            )  # type: ignore[arg-type]
            continue
        near = slice(middle - 1, middle + 2)
        curve = np.polyfit(rate[near], loss[near], 2)
        step = float(np.diff(rate[near]).max())
        cost = float(curve[0]) * (step / 2) ** 2
        curves.append(
            (
                float(ratio),
                RateCurve(True, math.exp(-curve[1] / (2 * curve[0])), math.exp(step), cost),
            )
        )  # type: ignore[arg-type]
    return curves


def _tokens_per_expert(s: Sweeps) -> Finding:
    fewest = float((s.largest_budget()["tokens"] / s.largest_budget()["ratio"]).min())  # type: ignore[arg-type]
    text = f"{fewest:.3g} tokens per expert at the largest ratio"
    return (
        (Status.CLEAR, text)
        if fewest >= TOKENS_PER_EXPERT
        else (Status.SUSPECT, text + f", below {TOKENS_PER_EXPERT:.0e}")
    )


def _token_budget(s: Sweeps) -> Finding:
    """Whether the last gain grows with the tokens: then what ended it was data, not sparsity."""
    budgets = s.frame["tokens"].unique().sort().to_list()
    if budgets[-1] < 2 * budgets[0]:
        return (
            Status.NOT_MEASURED,
            "one token budget: a wall of sparsity and a shortage of data look alike",
        )
    gains, errors = {}, []
    for budget in (budgets[0], budgets[-1]):
        runs = (
            s.frame.filter(pl.col("tokens") == budget)
            .group_by("ratio")
            .agg(pl.col("loss").mean(), pl.len())
            .sort("ratio")
            .tail(2)
        )
        if runs.height == 2:
            step = float(np.diff(np.log2(runs["ratio"]))[0])
            gains[budget] = float(-np.diff(runs["loss"])[0] / step)
            errors.append(_noise(s.frame) * math.sqrt(float((1 / runs["len"]).sum())) / step)
    if len(gains) < 2:
        return Status.NOT_MEASURED, "the budgets do not share two ratios"
    few, many = gains.values()
    text = (
        f"the last gain is {few:z.4f} at {budgets[0]:.3g} tokens and {many:z.4f} at "
        f"{budgets[-1]:.3g}"
    )
    moved = many - few > max(s.margin / 2, SURE * math.hypot(*errors))
    return (Status.SUSPECT, text + ": data, not sparsity") if moved else (Status.CLEAR, text)


def _noise(frame: pl.DataFrame) -> float:
    """Nats between runs of one budget, ratio and rate, pooled; 0 where there are no two."""
    alike = [name for name in ("tokens", "ratio", "learning_rate") if name in frame.columns]
    within = frame.select(residual=pl.col("loss") - pl.col("loss").mean().over(alike))["residual"]
    df = frame.height - frame.select(alike).n_unique()
    return math.sqrt(float((within**2).sum()) / df) if df else 0.0


def _active_size(s: Sweeps) -> Finding:
    sizes = s.frame["active_params"].cast(pl.Float64)
    spread = float(sizes.max() / sizes.min()) - 1  # type: ignore[operator]
    return (
        Status.CLEAR if spread < 0.05 else Status.SUSPECT
    ), f"active parameters differ by {100 * spread:.1f} %"


def _worst_share(column: str, limit: float, what: str) -> Callable[[Sweeps], Finding]:
    def check(s: Sweeps) -> Finding:
        if not s.has(column):
            return Status.NOT_MEASURED, f"no column {column}"
        table = s.by_ratio(column)
        worst = table.sort(column, descending=True).row(0, named=True)
        text = f"at most {100 * worst[column]:.2g} % {what}, at ratio {worst['ratio']:g}"
        return (Status.SUSPECT if worst[column] > limit else Status.CLEAR), text

    return check


def _load(s: Sweeps) -> Finding:
    if not s.has("load_cv"):
        return Status.NOT_MEASURED, "no column load_cv"
    table = s.by_ratio("load_cv")["load_cv"]
    text = f"load_cv goes from {table[0]:.2f} to {table[-1]:.2f} over the grid"
    return (Status.SUSPECT if table[-1] > UNEVEN * max(table[0], 0.05) else Status.CLEAR), text


def _control(s: Sweeps) -> Finding:
    """Whether the learned router is better than a table of token ids, which has the same experts: a
    gain that hashing has too is not the router's, and one that only hashing has is lost by it.
    """
    if s.controls.is_empty() or not s.has("seed"):
        others = f" among {', '.join(s.arms)}" if s.arms else ", as there is no column arm"
        return Status.NOT_MEASURED, f"no arm with hash routing{others}"
    own = s.frame.select("ratio", "tokens", "seed", "loss")
    pairs = s.controls.select("ratio", "tokens", "seed", hashed="loss").join(
        own, on=["ratio", "tokens", "seed"]
    )
    if pairs.is_empty():
        return Status.NOT_MEASURED, "no run with hash routing has a twin of its ratio and seed"
    worse, lines = False, []
    for (ratio,), group in pairs.sort("ratio").group_by("ratio", maintain_order=True):
        difference = (group["loss"] - group["hashed"]).to_numpy()
        mean, low, high = mean_interval(difference)
        worse |= mean > s.margin and (low is None or low > 0)
        interval = "" if low is None else f" [{low:+z.4f}, {high:+z.4f}]"
        lines.append(f"{mean:+z.4f}{interval} at ratio {ratio:g}")
    text = f"loss less that of hash routing, nats: {', '.join(lines)}"
    if worse:
        return Status.SUSPECT, text + "; a fixed table beats the learned router"
    return Status.CLEAR, text


def _held_out(s: Sweeps) -> Finding:
    if not s.has("bits_per_byte"):
        return Status.NOT_MEASURED, "no column bits_per_byte"
    order = np.corrcoef(s.frame["loss"].to_numpy(), s.frame["bits_per_byte"].to_numpy())[0, 1]
    return (
        Status.CLEAR if order > 0.9 else Status.SUSPECT
    ), f"loss and held-out bits per byte correlate at {order:.2f}"


def _causal(s: Sweeps) -> Finding:
    """Routers that choose among the tokens of a batch or sequence look ahead in evaluation too."""
    if not s.has(SEES_LATER):
        return Status.NOT_MEASURED, f"no column {SEES_LATER}"
    looks = s.frame[SEES_LATER].cast(pl.String).str.to_lowercase().is_in(["true", "1", "1.0"])
    if looks.any():
        return Status.SUSPECT, LATER_TOKENS
    return Status.CLEAR, "no router looks at later tokens"


CHECKS: dict[str, Callable[[Sweeps], Finding]] = {
    "seeds": _seeds,
    "learning rate bracketed": _learning_rate_bracket,
    "learning rate spacing": _learning_rate_grid,
    "gain depends on learning rate": _gain_by_learning_rate,
    "learning rate moves with ratio": _learning_rate_shift,
    "tokens per expert": _tokens_per_expert,
    "break moves with tokens": _token_budget,
    "active size": _active_size,
    "dropped tokens": _worst_share("drop_rate", DROPPED, "of slots dropped"),
    "dead experts": _worst_share("dead_experts", DEAD, "of experts dead"),
    "load": _load,
    "hash-routing control": _control,
    "held-out text": _held_out,
    "causal loss": _causal,
}
