"""Is there a sparsity wall? One sweep over the total:active ratio in, one of four answers out, with
its reasons.

The rule is that of `wall_rule`. A sweep whose experts saw fewer tokens than any published sweep's,
or whose noise is unknown, cannot tell: the first measures early training.
"""

import math
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, expected, require
from moe_lab.html_table import html_table
from moe_lab.scaling.compute_slope import MARGIN, ComputeSlope, law_slope, measured_slope
from moe_lab.scaling.sweep_losses import Sweep, read_sweep
from moe_lab.scaling.two_way import unlike_ratio
from moe_lab.scaling.wall_rule import Judgement, Outcome, Price, doublings, judge
from moe_lab.scaling.wall_sentences import Case, reasons, sentence

NEAR = 0.25  # doublings

LARGEST_EXPONENT = 700.0  # of a float


@dataclass(frozen=True)
class Gain:
    """The gain of one step of the ratio: nats per doubling, its interval, and the interval as
    compute multipliers per doubling.
    """

    ratio_from: float
    ratio_to: float
    gain: float
    lo: float
    hi: float
    compute: float
    compute_lo: float
    compute_hi: float


@dataclass(frozen=True)
class FormScore:
    """A form of the frontier: AICc minus the best form's, the Akaike weight, and the ratio it bends
    at (None for smooth forms and for a bend at the edge of what was searched).
    """

    name: str
    delta_aicc: float
    weight: float
    break_at: float | None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one sweep. ``at``: the ratio the wall stands at, or the ratio up to which
    there is none, or None. ``r_star``: the ratio up to which a doubling still paid and the one past
    which none did, at ``confidence``, each None where not found; it needs returns that do not grow
    with the ratio. ``pays``: probability that the last gain is above the margin. ``outlier``: the
    run that does not fit the others, in words, and ``without`` what the outcome would be without
    it. ``caveats``: what was not excluded and could make this outcome. ``elasticity``: d ln
    C_equivalent / d ln ratio over the last two doublings (0.07 is 5 % of compute per doubling) with
    its ``interval``. ``sentence`` is what a report prints first. ``margin``: nats per doubling;
    ``compute_slope``: -dL/dlnC; ``noise_sd``: nats between runs of one ratio (NaN: unknown).
    """

    outcome: Outcome
    at: float | None
    elasticity: float
    interval: tuple[float, float]
    reasons: tuple[str, ...]
    sentence: str
    margin: float
    compute_slope: float
    noise_sd: float
    confidence: float
    r_star: tuple[float | None, float | None]
    pays: float
    outlier: str | None
    without: Outcome
    caveats: tuple[str, ...]
    gains: tuple[Gain, ...]
    forms: tuple[FormScore, ...]

    def __repr__(self) -> str:
        lines = [f"Verdict({self.outcome.value})", self.sentence, *self.reasons]
        return "\n  ".join(part for line in lines for part in wrap(line, 110)[:4])

    def _repr_html_(self) -> str:
        """The sentence, the gain of each doubling, and the reasons."""
        names = ("from ratio", "to", "gain, nats", "from", "to", "compute")
        rows = [(g.ratio_from, g.ratio_to, g.gain, g.lo, g.hi, g.compute) for g in self.gains]
        return html_table(names, rows, self.sentence, "\n".join(self.reasons))

    def with_caveats(self, caveats: tuple[str, ...]) -> "Verdict":
        """The verdict whose sentence ends in what was not excluded."""
        if not caveats:
            return self
        sentence = f"{self.sentence} Not excluded: {'; '.join(caveats)}."
        return replace(self, caveats=caveats, sentence=sentence)

    def gain_table(self) -> pl.DataFrame:
        """[ratio_from, ratio_to, gain, lo, hi, compute, compute_lo, compute_hi, margin]: nats, and
        compute multipliers, per doubling.
        """
        return pl.DataFrame(list(self.gains)).with_columns(margin=pl.lit(self.margin))

    def form_table(self) -> pl.DataFrame:
        """[name, delta_aicc, weight, break_at], best form first."""
        return pl.DataFrame(list(self.forms), schema_overrides={"break_at": pl.Float64}).sort(
            "delta_aicc"
        )


def wall_verdict(
    frame: pl.DataFrame | pl.LazyFrame,
    *,
    budgets: pl.DataFrame | None = None,
    compute_slope: float | None = None,
    noise_sd: float | None = None,
    margin: float = MARGIN,
    confidence: float = 0.9,
    vocab_size: int | None = None,
) -> Verdict:
    """Judge one sweep of [ratio, seed, loss (nats/token), active_params, tokens] at fixed active
    compute and one token budget.

    ``budgets``: runs of the same columns at other budgets, from which dL/dlnC is measured;
    ``compute_slope`` states it; without either
    it comes from a published law. ``noise_sd``: nats between seeds known from elsewhere, which
    makes one seed enough. ``margin``: the compute multiplier per doubling that counts as nothing.
    ``vocab_size`` lets losses in bits be recognised. Raises ``AnalysisError`` on a frame that is no
    such sweep.
    """
    require(
        margin > 1 and 0.5 < confidence < 1,
        "a margin above 1 and a confidence in (0.5, 1)",
        f"{margin} and {confidence}",
        error=AnalysisError,
    )
    if noise_sd is not None and not noise_sd > 0:
        raise AnalysisError(expected("a noise_sd above 0 nats", noise_sd))
    sweep = read_sweep(frame, vocab_size=vocab_size)
    steps = np.diff(np.unique(sweep.log2))
    if not (np.isfinite(steps).all() and steps.min(initial=np.inf) > 1e-6):
        raise _alike(sweep)
    slope = _slope(sweep, budgets, compute_slope)
    low, high = doublings(sweep.log2).T
    growth = np.log(sweep.active[high] / sweep.active[low]) / (sweep.log2[high] - sweep.log2[low])
    charge = slope.value * growth
    share = margin - 1
    price = Price(share * slope.value, share * (slope.error or 0.0), charge)
    try:
        judged = judge(
            sweep.layout, sweep.losses[None], price, known=noise_sd, confidence=confidence
        )
    except np.linalg.LinAlgError:
        raise _alike(sweep) from None
    assert judged.without is not None
    case = Case(
        sweep,
        slope,
        price,
        margin,
        confidence,
        charge,
        judged,
        Outcome(judged.outcomes()[0]),
        Outcome(judged.without[0]),
        unlike_ratio(sweep.layout, sweep.losses, noise_sd),
    )
    if case.blind or case.starved:
        case = replace(case, outcome=Outcome.CANNOT_TELL)
    at = {
        Outcome.WALL: wall_at(judged, sweep.log2),
        Outcome.NO_WALL: float(sweep.ratios[-1]),
    }.get(case.outcome)
    edge, half = case.elasticity
    return Verdict(
        outcome=case.outcome,
        at=at,
        elasticity=edge,
        interval=(edge - half, edge + half),
        reasons=tuple(reasons(case)),
        sentence=sentence(case, at),
        margin=price.margin,
        compute_slope=slope.value,
        noise_sd=float(judged.found.sd[0]),
        confidence=confidence,
        r_star=case.r_star,
        pays=float(judged.last.above[0]),
        outlier=None if case.outlier is None else sweep.run(case.outlier),
        without=case.without,
        caveats=(),
        gains=_gains(case),
        forms=_forms(case),
    )


def verdict_by_budget(frame: pl.DataFrame | pl.LazyFrame, **options: Any) -> dict[float, Verdict]:
    """One verdict per token budget, tokens -> verdict, each with dL/dlnC measured over all budgets
    where they share ratios.

    A wall that moves to larger ratios with more tokens is a shortage of data. ``options`` are
    `wall_verdict`'s.
    """
    frame = frame.lazy().collect()
    require(
        "tokens" in frame.columns,
        "a column tokens",
        f"columns {', '.join(frame.columns)}",
        error=AnalysisError,
    )
    budgets = sorted(frame["tokens"].unique().to_list())
    if len(budgets) > 1 and not options.keys() & {"budgets", "compute_slope"}:
        options = {**options, "budgets": frame}
    verdicts = {}
    for tokens in budgets:
        try:
            verdicts[float(tokens)] = wall_verdict(frame.filter(tokens=tokens), **options)
        except AnalysisError as error:
            if error.field == "budgets":  # of all budgets together
                raise
            raise AnalysisError(f"runs of {tokens:,.0f} tokens: {error}", error.field) from error
    return verdicts


def _alike(sweep: Sweep) -> AnalysisError:
    got = f"ratios {sweep.log2.min():.3g} to {sweep.log2.max():.3g} doublings"
    what = "ratios and losses that a fit can tell apart"
    return AnalysisError(expected(what, got, "leaving the odd run out"))


def _slope(sweep: Sweep, budgets: pl.DataFrame | None, stated: float | None) -> ComputeSlope:
    if stated is not None:
        require(
            stated > 0,
            "a compute_slope above 0 nats per e-fold of compute",
            stated,
            error=AnalysisError,
        )
        return ComputeSlope(stated, None, f"the margin's dL/dlnC = {stated:.4f} was given")
    if budgets is not None:
        return measured_slope(budgets)
    return law_slope(sweep.size, sweep.tokens, math.sqrt(float(sweep.ratios[0] * sweep.ratios[-1])))


def wall_at(judged: Judgement, x: np.ndarray, draw: int = 0) -> float:
    """The ratio of the break: the measured one nearest to it (within a quarter of a doubling, or in
    the break's interval), else the break as fitted.
    """
    fitted = float(judged.break_at[draw])
    nearest = float(x[np.abs(x - fitted).argmin()])
    inside = judged.break_lower[draw] <= nearest <= judged.break_upper[draw]
    return 2.0 ** (nearest if inside or abs(nearest - fitted) < NEAR else fitted)


def _gains(case: Case) -> tuple[Gain, ...]:
    ratios, judged = case.sweep.ratios, case.judged
    rows = []
    for index, (gain, half) in enumerate(
        zip(judged.gains[0].tolist(), judged.half[0].tolist(), strict=True)
    ):
        nats = (gain, gain - half, gain + half)
        low, high = judged.steps[index]
        rows.append(
            Gain(
                float(ratios[low]),
                float(ratios[high]),
                *nats,
                *np.exp(np.minimum(np.array(nats) / case.slope.value, LARGEST_EXPONENT)).tolist(),
            )
        )
    return tuple(rows)


def _forms(case: Case) -> tuple[FormScore, ...]:
    scores = {name: float(values[0]) for name, values in case.judged.aicc.items()}
    lowest = min(scores.values())
    delta = {
        name: score - lowest if math.isfinite(score) else math.inf for name, score in scores.items()
    }
    total = sum(math.exp(-d / 2) for d in delta.values())
    rows = []
    for name, fit in case.judged.fits.items():
        at = None
        if fit.breaks is not None and fit.profile is not None:
            best = int(fit.profile[0].argmin())
            at = float(2.0 ** fit.breaks[best]) if best < len(fit.breaks) - 1 else None
        # With one run per ratio there are too few runs for any form's AICc: then no form has a
        # weight.
        rows.append(
            FormScore(
                name, delta[name], math.exp(-delta[name] / 2) / total if total else math.nan, at
            )
        )
    return tuple(sorted(rows, key=lambda row: row.delta_aicc))
