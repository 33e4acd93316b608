"""Everything that is said about one set of runs and the sparsity wall, computed once: the command
line prints it, the page draws it.

In: a frame with one row per run, several arms, token budgets and learning rates welcome. Out: a
`WallStudy` of verdicts and frames. The arm that is judged is the one with most ratios; its shorter
budget (``-short``), its runs at other learning rates (``lr``) and the other arms serve the
comparisons. Published frontiers come from the coefficients of `LAWS`: no data is needed for them.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, MoELabError
from moe_lab.number_format import magnitude
from moe_lab.progress import tell
from moe_lab.runs.layout import TUNING
from moe_lab.scaling.alternatives_compared import against_experts
from moe_lab.scaling.confounds import SHORT, Status, caveats, confounds
from moe_lab.scaling.fit import Fit, fit
from moe_lab.scaling.fit_quality import Quality, quality, rival_laws
from moe_lab.scaling.frontier_band import Band, frontier_band
from moe_lab.scaling.laws import LAWS
from moe_lab.scaling.optimum import Optimum, fixed_total_optima
from moe_lab.scaling.run_files import main_arm, with_budgets
from moe_lab.scaling.sweep_losses import read_sweep, typed
from moe_lab.scaling.wall_planner import typical_noise, what_would_settle
from moe_lab.scaling.wall_power import Design, default_truths, power
from moe_lab.scaling.wall_rule import Outcome
from moe_lab.scaling.wall_verdict import Verdict, verdict_by_budget, wall_verdict

SEEDS = (2, 3, 4, 5, 8)
"""Seeds for which the power of a sweep's own grid is simulated."""
DRAWS = 200
PUBLISHED_POINTS = 25
PUBLISHED_HERE = {
    "Ludziejewski, at this size": ("ludziejewski", {}),
    "Ling, at this compute": ("ling", {}),
    "Clark S-BASE, 15M": ("clark", {"active_params": 1.5e7}),
    "Clark S-BASE, 1.3B": ("clark", {"active_params": 1.3e9}),
    "Kimi K2": ("kimi", {}),
}
"""Name of a published frontier -> its law, and the variables that differ from the sweep's own."""
OF_RATIO = ("line", "power", "saturation", "hinge", "plateau")
COMPARED = ("Ludziejewski, at this size", "Ling, at this compute", "Kimi K2")
"""Published frontiers whose elasticity is shown with that of the sweep."""


@dataclass(frozen=True)
class WallStudy:
    """All that is computed about one set of runs. ``runs`` all runs; ``judged`` those of ``arm``;
    ``verdicts`` one per token budget (None where there is one verdict). The frames are computed on
    first use and kept.
    """

    runs: pl.DataFrame
    judged: pl.DataFrame
    arm: str
    verdicts: dict[float | None, Verdict]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the fitted law, whose formula is a function."""
        return {name: value for name, value in vars(self).items() if name != "law"}

    @property
    def verdict(self) -> Verdict:
        """The only verdict, or that of the smallest budget."""
        return next(iter(self.verdicts.values()))

    @property
    def margin(self) -> float:
        """The one margin that everything here is compared with, nats: of the largest budget."""
        return list(self.verdicts.values())[-1].margin

    @cached_property
    def settles(self) -> str:
        """The sweep that would settle a verdict that cannot tell, as `what_would_settle`; else
        empty.
        """
        if self.verdict.outcome is not Outcome.CANNOT_TELL or len(self.verdicts) > 1:
            return ""
        return what_would_settle(read_sweep(self.judged), self.verdict)

    @cached_property
    def confounds(self) -> pl.DataFrame:
        """[confound, status, detail]; one row that says why where the runs do not allow any."""
        try:
            frame = self.runs if "arm" in self.runs.columns else self.judged
            return confounds(frame, arm=self.arm or None, margin=self.margin)
        except MoELabError as error:
            row = ("all", Status.NOT_MEASURED.value, str(error))
            return pl.DataFrame([row], schema=["confound", "status", "detail"], orient="row")

    @cached_property
    def alternatives(self) -> pl.DataFrame:
        """The table of `against_experts`; empty if no arm is an alternative, or the runs lack the
        columns.

        Raises ``AnalysisError`` where an alternative has no run with experts of its total.
        """
        if not {"arm", "seed", "total_params"} <= set(self.runs.columns):
            return pl.DataFrame()
        slope = self.verdict.compute_slope
        return against_experts(self.runs, arm=self.arm or None, compute_slope=slope)

    @cached_property
    def optima(self) -> dict[str, Optimum]:
        """W4: arm -> its best ratio at fixed total parameters, apart from any verdict."""
        return fixed_total_optima(self.runs)

    @cached_property
    def band(self) -> Band:
        """The frontier of the judged runs, fitted without its largest ratio."""
        return frontier_band(self.judged)

    @cached_property
    def means(self) -> pl.DataFrame:
        """[arm, ratio, n, mean, lo, hi, held_out]: mean loss of every arm and ratio, the judged arm
        first, with one kind of interval.

        Those of the judged arm are the means of `band`. The other arms take the noise of its
        nearest ratio. lo and hi are null where the noise is unknown or the arm has no ratio.
        """
        noise = self.band.means.join(_means_over_seeds(self.judged), on="ratio").sort("ratio")
        noise = noise.with_columns(half=(pl.col("hi") - pl.col("loss")) * pl.col("n").sqrt())
        judged = noise.select(
            pl.lit(self.arm).alias("arm"), "ratio", "n", "lo", "hi", "held_out", mean="loss"
        )
        arms = self.runs["arm"].unique(maintain_order=True).drop_nulls() if self.arm else ()
        parts = [judged]
        for arm in arms:
            if arm not in (self.arm, TUNING):
                part = _means_over_seeds(self.runs.filter(pl.col("arm") == arm))
                near = part.join_asof(noise.select("ratio", "half"), on="ratio", strategy="nearest")
                half = pl.col("half") / pl.col("n").sqrt()
                ends = {"lo": pl.col("mean") - half, "hi": pl.col("mean") + half}
                parts.append(near.with_columns(**ends, arm=pl.lit(arm), held_out=False))
        columns = ["arm", "ratio", "n", "mean", "lo", "hi", "held_out"]
        table = pl.concat([part.select(columns) for part in parts], how="vertical_relaxed")
        return table.with_columns(pl.col("lo", "hi").fill_nan(None))

    @cached_property
    def law(self) -> tuple[Fit, Quality]:
        """The law of the ratio alone (`OF_RATIO`) with the smallest AICc on the judged runs of the
        largest budget, and its quality.
        """
        runs = self.judged.filter(pl.col("tokens") == pl.col("tokens").max())
        rivals = rival_laws(fit(OF_RATIO[0], runs), OF_RATIO)
        best = fit(str(rivals["law"][0]), runs)
        return best, replace(quality(best, rivals=()), rivals=rivals)

    @cached_property
    def compute_saved(self) -> pl.DataFrame:
        """[ratio, compute, lo, hi]: compute multipliers against the smallest ratio, from losses."""
        first = self.band.means["loss"][0]
        worth = {
            name: ((first - pl.col(loss)) / self.verdict.compute_slope).exp()
            for name, loss in (("compute", "loss"), ("lo", "hi"), ("hi", "lo"))
        }
        return self.band.means.select("ratio", **worth)

    @cached_property
    def published(self) -> pl.DataFrame:
        """[frontier, ratio, compute, beyond]: compute saved against the smallest ratio by published
        coefficients, and which ranges of the runs behind them this leaves.
        """
        ratios = self.judged["ratio"].cast(pl.Float64)
        low, high = float(ratios.min()), float(ratios.max())  # type: ignore[arg-type]
        active, tokens = self._size
        own = {"active_params": active, "tokens": tokens, "granularity": 12.0}
        own["compute"] = 6 * active * tokens
        rows = []
        for name, (law, other) in PUBLISHED_HERE.items():
            start = own | other | {"ratio": low}
            for ratio in np.geomspace(low, high, PUBLISHED_POINTS).tolist():
                end = start | {"ratio": ratio}
                value = LAWS[law].compute_equivalent(start, end)
                if math.isfinite(value) and value > 0:
                    rows.append((name, ratio, value, "; ".join(LAWS[law].outside(end))))
        return pl.DataFrame(rows, schema=["frontier", "ratio", "compute", "beyond"], orient="row")

    @cached_property
    def best_of_budgets(self) -> pl.DataFrame:
        """[compute (FLOPs), loss, ratio]: the smallest mean loss of the arm at each budget."""
        arms = [self.arm, self.arm + SHORT]
        mine = self.runs.filter(pl.col("arm").is_in(arms)) if self.arm else self.runs
        means = mine.group_by("tokens", "ratio").agg(
            pl.col("loss").mean(),
            compute=(pl.col("flops_per_token") * pl.col("tokens")).mean(),
            plain=(6.0 * pl.col("active_params") * pl.col("tokens")).mean(),
        )
        best = means.sort("loss").group_by("tokens", maintain_order=True).first().sort("tokens")
        return best.select(pl.coalesce("compute", "plain").alias("compute"), "loss", "ratio")

    @cached_property
    def marin(self) -> pl.DataFrame:
        """[frontier, compute, loss]: Marin's frontier from this sweep's compute on."""
        law = LAWS["marin"]
        lowest = float(self.best_of_budgets["compute"].min())  # type: ignore[arg-type]
        compute = np.geomspace(min(lowest, 1e18), 1e21, 30)
        loss = np.asarray(law.predict({"compute": compute}))
        return pl.DataFrame({"frontier": law.title, "compute": compute, "loss": loss})

    @cached_property
    def elasticities(self) -> pl.DataFrame:
        """[what, elasticity, lo, hi, published]: of the judged arm, of every other arm that can be
        judged, and of published laws over the same two doublings.
        """
        rows = [self._elasticity(self.arm or "this sweep", self.judged, self.verdict)]
        arms = self.runs["arm"].unique(maintain_order=True).drop_nulls().to_list()
        for other in arms if self.arm else []:
            part = self.runs.filter(pl.col("arm") == other)
            several = part["tokens"].n_unique() > 1 or part["ratio"].n_unique() < 3
            if other in (self.arm, TUNING) or several:
                continue
            try:
                verdict = wall_verdict(part, budgets=with_budgets(self.runs, self.arm))
            except AnalysisError:
                continue
            rows.append(self._elasticity(other, part, verdict))
        for name in COMPARED:
            part = self.published.filter(pl.col("frontier") == name)
            part = part.filter(pl.col("ratio") >= pl.col("ratio").max() / 4 - 1e-9)
            if part.height > 1:
                x, y = part["ratio"].log(), part["compute"].log()
                rows.append((name, float((y[-1] - y[0]) / (x[-1] - x[0])), None, None, True))
        schema = {"what": pl.String, **dict.fromkeys(("elasticity", "lo", "hi"), pl.Float64)}
        return pl.DataFrame(rows, schema=schema | {"published": pl.Boolean}, orient="row")

    @staticmethod
    def _elasticity(arm: str, runs: pl.DataFrame, verdict: Verdict) -> tuple[object, ...]:
        tokens = magnitude(float(runs["tokens"].max()))  # type: ignore[arg-type]
        known = math.isfinite(verdict.interval[0])
        ends = verdict.interval if known else (None, None)
        return (f"{arm}, {tokens} tokens", verdict.elasticity, *ends, False)

    @property
    def noise(self) -> tuple[float, bool]:
        """Nats between runs, and whether they were measured here (else typical of the size)."""
        sd = self.verdict.noise_sd
        known = math.isfinite(sd) and sd > 0
        return (sd, True) if known else (typical_noise(self._size[0])[0], False)

    @cached_property
    def power(self) -> pl.DataFrame:
        """The table of `power` for this grid with `SEEDS`, at `noise`."""
        ratios = tuple(sorted(float(ratio) for ratio in self.judged["ratio"].unique()))
        slope = self.verdict.compute_slope
        plans = [Design(ratios, seeds, *self._size, compute_slope=slope) for seeds in SEEDS]
        return power(plans, default_truths(), noise_sd=self.noise[0], draws=DRAWS)

    @property
    def _size(self) -> tuple[float, float]:
        """Median active parameters and tokens of the judged runs."""
        medians = self.judged.select(
            pl.col("active_params", "tokens").cast(pl.Float64).median()
        ).row(0)
        return float(medians[0]), float(medians[1])


def _means_over_seeds(runs: pl.DataFrame) -> pl.DataFrame:
    """[ratio, n, mean] of the finite losses, by rising ratio."""
    finite = runs.filter(pl.col("loss").is_finite()).with_columns(pl.col("ratio").cast(pl.Float64))
    return finite.group_by("ratio").agg(n=pl.len(), mean=pl.col("loss").mean()).sort("ratio")


def wall_study(
    runs: pl.DataFrame,
    *,
    arm: str | None = None,
    by_budget: bool = False,
    noise_sd: float | None = None,
    vocab_size: int | None = None,
) -> WallStudy:
    """The study of ``runs``; ``arm`` is judged (default: that with most ratios).

    ``by_budget``: one verdict per token budget where the arm has several. ``noise_sd`` and
    ``vocab_size`` as for `wall_verdict`, whose ``AnalysisError`` it raises.
    """
    runs = typed(runs)
    judged, name = main_arm(runs, arm)
    options = {"noise_sd": noise_sd, "vocab_size": vocab_size}
    verdicts: dict[float | None, Verdict] = {}
    tell(f"judging {judged.height:,} runs", 0, 1)
    if by_budget and "tokens" in judged.columns and judged["tokens"].n_unique() > 1:
        verdicts |= verdict_by_budget(judged, **options)
    else:
        budgets = with_budgets(runs, name)
        verdicts[None] = wall_verdict(judged, budgets=budgets, **options)  # type: ignore[arg-type]
    study = WallStudy(runs, judged, name, verdicts)
    for tokens, verdict in verdicts.items():
        found = caveats(study.confounds, verdict.outcome)
        verdicts[tokens] = verdict.with_caveats(found)
    return study
