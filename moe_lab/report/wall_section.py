"""The evidence under the verdict: its figures and tables, from the records of a sweep's runs.

The arm that is judged is the one with most ratios; its shorter budget (``-short``), its runs at
other learning rates (``lr``) and the other arms serve the comparisons. Published frontiers come
from the coefficients of `scaling.LAWS`: no data is needed to draw them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from moe_lab.errors import MoELabError
from moe_lab.report import wall_figures as draw
from moe_lab.report.blocks import Block, Plot, Table, Variant, table_of
from moe_lab.report.format import NOTHING, count_of, decimal, magnitude
from moe_lab.report.sources import Material

if TYPE_CHECKING:
    from moe_lab.scaling import Band, Verdict

SEEDS = (2, 3, 4, 5, 8)
DRAWS = 200
TITLES = {
    "wall_frontier": "The frontier with its band",
    "wall_gain": "Gain per doubling, against the margin",
    "wall_elasticity": "Elasticity",
    "wall_power": "What this grid could tell",
    "against_experts": "Instead of more experts",
}


@dataclass(frozen=True)
class WallSection:
    """``forms`` compares the shapes of the frontier, ``confounds`` what else could have made or
    hidden a wall; ``optima`` says which ratio is best at fixed total parameters (W4), for the arms
    that hold them fixed.
    """

    blocks: tuple[Block, ...]
    forms: Table | None
    confounds: Table | None
    optima: tuple[str, ...] = ()

    @property
    def titles(self) -> Mapping[str, str]:
        """Heading by name of the block."""
        return {block.name: TITLES[block.name] for block in self.blocks}


def judged_runs(material: Material) -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """The finished runs with a loss and a ratio, those of the arm that the verdict is about, and
    its name.
    """
    from moe_lab.scaling import main_arm

    runs = material.table.drop_nulls("loss").with_columns(tokens=pl.col("train_tokens"))
    rated = runs.drop_nulls("ratio")
    frame, arm = main_arm(rated if rated.height else runs)
    return rated, frame, arm


def judge(runs: pl.DataFrame, frame: pl.DataFrame, arm: str) -> Verdict:
    """The verdict on ``frame``, with dL/dlnC measured where ``runs`` have the arm's shorter budget."""
    from moe_lab.scaling import wall_verdict, with_budgets

    return wall_verdict(frame, budgets=with_budgets(runs, arm))


def wall_section(material: Material) -> WallSection | None:
    """None where the runs are no sweep that can be judged."""
    if not material.finished:
        return None
    from moe_lab.scaling import confounds, fixed_total_optima, frontier_band

    runs, frame, arm = judged_runs(material)
    try:
        verdict, band = judge(runs, frame, arm), frontier_band(frame)
    except MoELabError:
        return None
    published = _published(frame)
    blocks: tuple[Block | None, ...] = (
        _frontier(runs, frame, arm, verdict, band, published),
        _gain(verdict),
        _elasticity(runs, frame, arm, verdict, published),
        _power(frame, verdict),
        _against(runs, arm, verdict),
    )
    try:
        found = confounds(runs, arm=arm)
        table = Table(("confound", "status", "detail"), tuple(found.rows()), (False, False, False))
    except MoELabError:
        table = None
    optima = tuple(
        f"Arm {name}: {best.sentence}." for name, best in fixed_total_optima(runs).items()
    )
    return WallSection(
        tuple(block for block in blocks if block is not None), _forms(verdict, band), table, optima
    )


def _frontier(
    runs: pl.DataFrame,
    frame: pl.DataFrame,
    arm: str,
    verdict: Verdict,
    band: Band,
    published: pl.DataFrame,
) -> Block:
    measured = _compute_saved(band, verdict)
    best = _best_of_budgets(runs, arm)
    held = band.means.filter("held_out")["ratio"].to_list()
    without = f" without ratio {held[0]:g}" if held else ""
    variants = (
        Variant("loss", draw.wall_frontier.canvas(band.curve, band.means)),
        Variant(
            "compute saved, with published frontiers", draw.wall_compute.canvas(measured, published)
        ),
        Variant(
            "loss against compute, with Marin's frontier", draw.wall_loss.canvas(best, _marin(best))
        ),
    )
    low, high = band.means.row(0, named=True), band.means.row(-1, named=True)
    summary = (
        f"Loss falls from {low['loss']:.4f} at ratio {low['ratio']:g} to {high['loss']:.4f} at {high['ratio']:g}; the {band.form} form is "
        f"drawn with its 90 % band."
    )
    caption = (
        f"n = {count_of(frame.height, 'run')} of arm {arm or 'without a name'}. Means over seeds with 90 % intervals (noise pooled over "
        f"ratios; none where it is unknown). The {band.form} form has the smallest AICc{without}; its band redraws the noise. Compute "
        f"saved is exp(gain / (dL/dlnC)) with dL/dlnC = {verdict.compute_slope:.3f}. Published: the laws of Ludziejewski and Ling at this "
        "size and budget, Clark's S-BASE at 15M and 1.3B (there compute is parameters), Kimi K2's slope (8-48); the column beyond of the "
        "data says where a law leaves the runs it was fitted on. Marin's frontier is of other text, tokens and sizes: compare its slope, "
        "not its level."
    )
    data = pl.concat(
        [measured.with_columns(frontier=pl.lit("this sweep")), published], how="diagonal"
    )
    return Block(
        "wall_frontier", caption, (Plot(summary, variants),), data, table_of(band.means, 4)
    )


def _compute_saved(band: Band, verdict: Verdict) -> pl.DataFrame:
    first = band.means["loss"][0]
    multiplier = lambda name: ((first - pl.col(name)) / verdict.compute_slope).exp()  # noqa: E731
    return band.means.select(
        "ratio", compute=multiplier("loss"), lo=multiplier("hi"), hi=multiplier("lo")
    )


def _published(frame: pl.DataFrame) -> pl.DataFrame:
    """[frontier, ratio, compute, beyond]: compute saved against the smallest ratio of the sweep, by
    published coefficients.
    """
    from moe_lab.scaling import LAWS

    ratios = frame["ratio"].cast(pl.Float64)
    low, high = float(ratios.min()), float(ratios.max())  # type: ignore[arg-type]
    grid = np.geomspace(low, high, 25)
    active, tokens = (
        float(frame[name].cast(pl.Float64).median()) for name in ("active_params", "tokens")
    )  # type: ignore[arg-type]
    here = {
        "active_params": active,
        "tokens": tokens,
        "granularity": 12.0,
        "compute": 6 * active * tokens,
    }
    asked = [
        ("Ludziejewski, at this size", "ludziejewski", here),
        ("Ling, at this compute", "ling", here),
        ("Clark S-BASE, 15M", "clark", {**here, "active_params": 1.5e7}),
        ("Clark S-BASE, 1.3B", "clark", {**here, "active_params": 1.3e9}),
        ("Kimi K2", "kimi", here),
    ]
    rows = []
    for name, law, point in asked:
        for ratio in grid:
            end = {**point, "ratio": float(ratio)}
            value = LAWS[law].compute_equivalent({**point, "ratio": low}, end)
            if math.isfinite(value) and value > 0:
                rows.append(
                    {
                        "frontier": name,
                        "ratio": float(ratio),
                        "compute": value,
                        "beyond": "; ".join(LAWS[law].outside(end)),
                    }
                )
    return pl.DataFrame(rows)


def _best_of_budgets(runs: pl.DataFrame, arm: str) -> pl.DataFrame:
    """[compute, loss, ratio]: the smallest mean loss of the arm at each of its token budgets."""
    from moe_lab.scaling import SHORT

    mine = runs.filter(pl.col("arm").is_in([arm, arm + SHORT])) if arm else runs
    means = mine.group_by("tokens", "ratio").agg(
        pl.col("loss").mean(),
        compute=(pl.col("flops_per_token") * pl.col("tokens")).mean(),
        plain=(6.0 * pl.col("active_params") * pl.col("tokens")).mean(),
    )
    means = means.with_columns(compute=pl.coalesce("compute", "plain"))
    return (
        means.sort("loss")
        .group_by("tokens", maintain_order=True)
        .first()
        .sort("tokens")
        .select("compute", "loss", "ratio")
    )


def _marin(best: pl.DataFrame) -> pl.DataFrame:
    from moe_lab.scaling import LAWS

    law = LAWS["marin"]
    compute = np.geomspace(min(float(best["compute"].min()), 1e18), 1e21, 30)  # type: ignore[arg-type]
    return pl.DataFrame(
        {
            "frontier": law.title,
            "compute": compute,
            "loss": np.asarray(law.predict({"compute": compute})),
        }
    )


def _gain(verdict: Verdict) -> Block:
    gains = verdict.gain_table()
    last = gains.row(-1, named=True)
    summary = f"The last doubling bought {last['gain']:.4f} nats ({last['lo']:.4f} to {last['hi']:.4f}); the margin is {last['margin']:.4f}."
    caption = (
        f"n = {count_of(gains.height, 'step')}. Bars are {100 * verdict.confidence:g} % intervals. Grey: gains worth less than 5 % of "
        "compute. W1 asks for every interval inside the grey from some ratio on; a bar that merely crosses zero proves nothing."
    )
    return Block(
        "wall_gain",
        caption,
        (Plot(summary, (Variant("", draw.wall_gain.canvas(gains)),)),),
        gains,
        table_of(gains, 4),
    )


def _elasticity(
    runs: pl.DataFrame, frame: pl.DataFrame, arm: str, verdict: Verdict, published: pl.DataFrame
) -> Block:
    from moe_lab.scaling import TUNING

    rows = [
        _elasticity_row(
            f"{arm or 'this sweep'}, {magnitude(float(frame['tokens'].max()))} tokens", verdict
        )
    ]  # type: ignore[arg-type]
    for other in runs["arm"].unique(maintain_order=True).drop_nulls().to_list() if arm else []:
        part = runs.filter(pl.col("arm") == other)
        if other in (arm, TUNING) or part["ratio"].n_unique() < 3 or part["tokens"].n_unique() > 1:
            continue
        try:
            rows.append(
                _elasticity_row(
                    f"{other}, {magnitude(float(part['tokens'].max()))} tokens",
                    judge(runs, part, arm),
                )
            )  # type: ignore[arg-type]
        except MoELabError:
            continue
    rows += _published_elasticities(published)
    table = pl.DataFrame(rows, schema_overrides={"lo": pl.Float64, "hi": pl.Float64})
    margin = 0.05 / math.log(2)
    low, high = verdict.interval
    summary = f"Elasticity of {rows[0]['what']}: {verdict.elasticity:.2f}, {low:.2f} to {high:.2f}; the margin is {margin:.2f}."
    caption = (
        f"n = {count_of(frame.height, 'run')}. How much compute, in per cent, a per cent of ratio is worth over the last two doublings "
        "(W3), with 90 % intervals; published: the same two doublings by Ludziejewski's and Ling's laws here, and Kimi K2's slope."
    )
    return Block(
        "wall_elasticity",
        caption,
        (Plot(summary, (Variant("", draw.wall_elasticity.canvas(table, margin)),)),),
        table,
        table_of(table, 3),
    )


def _elasticity_row(what: str, verdict: Verdict) -> dict[str, object]:
    low, high = verdict.interval
    known = math.isfinite(low)
    return {
        "what": what,
        "elasticity": verdict.elasticity,
        "lo": low if known else None,
        "hi": high if known else None,
        "published": False,
    }


def _published_elasticities(published: pl.DataFrame) -> list[dict[str, object]]:
    rows = []
    for name in ("Ludziejewski, at this size", "Ling, at this compute", "Kimi K2"):
        part = published.filter(pl.col("frontier") == name)
        part = part.filter(pl.col("ratio") >= part["ratio"].max() / 4 - 1e-9)  # type: ignore[operator]
        if part.height > 1:
            x, y = part["ratio"].log(), part["compute"].log()
            slope = float((y[-1] - y[0]) / (x[-1] - x[0]))
            rows.append(
                {"what": name, "elasticity": slope, "lo": None, "hi": None, "published": True}
            )
    return rows


def _power(frame: pl.DataFrame, verdict: Verdict) -> Block:
    from moe_lab.scaling import Design, default_truths, power, typical_noise

    ratios = tuple(sorted(float(ratio) for ratio in frame["ratio"].unique()))
    active, tokens = (
        float(frame[name].cast(pl.Float64).median()) for name in ("active_params", "tokens")
    )  # type: ignore[arg-type]
    known = math.isfinite(verdict.noise_sd) and verdict.noise_sd > 0
    noise = verdict.noise_sd if known else typical_noise(active)[0]
    plans = [Design(ratios, seeds, active, tokens) for seeds in SEEDS]
    table = power(plans, default_truths(), noise_sd=noise, draws=DRAWS).select(
        "truth", "seeds", "wall", "no_wall", "cannot_tell", "settled"
    )
    summary = f"The chance of the right verdict at {noise:.4f} nats of noise, by seeds."
    caption = (
        f"n = {DRAWS} simulated sweeps per point on this grid at {magnitude(tokens)} tokens, noise {noise:.4f} nats "
        f"({'as measured here' if known else 'typical of the size'}). Settled: the verdict that a sweep without noise gives; a law whose "
        "gains fade within the margin has none, and counts unless a wall is claimed. Below 1M tokens per expert every sweep cannot "
        "tell. A share of .9 has a 90 % interval of ±.03."
    )
    return Block(
        "wall_power",
        caption,
        (Plot(summary, (Variant("", draw.wall_power.canvas(table)),)),),
        table,
        table_of(table, 2),
    )


def _against(runs: pl.DataFrame, arm: str, verdict: Verdict) -> Block | None:
    """None where no arm is an alternative to experts."""
    from moe_lab.scaling import against_experts, crossing

    try:
        table = against_experts(runs, arm=arm or None, compute_slope=verdict.compute_slope)
    except (
        MoELabError
    ):  # an arm of that name in a sweep of another design, or one that is not at its end
        return None
    if table.is_empty():
        return None
    told = "; ".join(
        f"{kind} {crossing(part)}"
        for (kind,), part in table.group_by("alternative", maintain_order=True)
    )
    seeds = table["seeds"]
    number = f"{seeds.min()}" if seeds.n_unique() == 1 else f"{seeds.min()} to {seeds.max()}"
    caption = (
        f"n = {number} pairs of runs per point: the same seed, the same total parameters (within 2 %), and no more training FLOPs than "
        "the runs with experts. Below 0 the alternative is better. Bars are 95 % Student t-intervals over the pairs, not corrected for "
        f"how many there are. {told[:1].upper()}{told[1:]}. Compute is exp(-difference / (dL/dlnC)) with dL/dlnC = "
        f"{verdict.compute_slope:.3f}; differences worth less than 5 % of it count as none."
    )
    summary = f"Loss of each alternative less that of more experts, by ratio: {told}."
    variants = (Variant("", draw.against_experts.canvas(table)),)
    return Block("against_experts", caption, (Plot(summary, variants),), table, table_of(table, 4))


def _forms(verdict: Verdict, band: Band) -> Table:
    """AICc on all ratios beside the misses at the ratio that was held out: a form that fits may
    still not foresee.
    """
    missed = {row["form"]: row for row in band.forms.iter_rows(named=True)}
    rows = tuple(
        (
            form.name,
            decimal(form.delta_aicc, 1) if math.isfinite(form.delta_aicc) else NOTHING,
            decimal(form.weight, 2),
            NOTHING if form.break_at is None else f"{form.break_at:.3g}",
            decimal(missed[form.name]["error"], 4),
        )
        for form in verdict.forms
    )
    return Table(
        ("form", "ΔAICc", "weight", "break at ratio", "miss at the held-out ratio, nats"),
        rows,
        (False, True, True, True, True),
    )
