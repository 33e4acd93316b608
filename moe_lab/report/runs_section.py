"""The figures made from the records of runs: the frontier of losses, and the training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from moe_lab.number_format import count_of, decimal, listing, magnitude
from moe_lab.report import figures
from moe_lab.report.figure_blocks import Block, Legend, Plot, Variant, one_plot, table_of
from moe_lab.report.run_figures import MAX_POINTS, arms, line_style
from moe_lab.report.run_tables import later_token_note
from moe_lab.report.sources import Material, training_metrics
from moe_lab.runs.layout import TUNING
from moe_lab.seed_intervals import seed_intervals

if TYPE_CHECKING:
    from moe_lab.report.frames import Frames
    from moe_lab.scaling import WallStudy

CURVES = {
    "loss": "training loss, nats/token",
    "load_cv": "load cv",
    "max_violation": "MaxVio",
    "mean_ffn_count": "mean ffn_count",
    "grad_norm": "gradient norm",
}
"""The training metrics that are drawn where they were logged, with their axis titles."""
POINT_BUDGET = 45_000
"""Points of all training curves of a page, about 11 bytes each."""
FEWEST_POINTS = 50
MAX_CURVES = 120
"""Runs whose training is drawn; of more, as many evenly spaced over arms, ratios and seeds."""


def frontier_block(material: Material, judged: WallStudy | None = None) -> Block | None:
    """Loss against ratio, from the finished runs that have a loss; with the fitted form and its
    band where the runs are ``judged``. None without any.
    """
    # A mean over learning rates is no point of a frontier.
    runs = material.table.drop_nulls("loss").filter(pl.col("arm").ne_missing(TUNING))
    if not runs.height:
        return None
    means = seed_intervals(runs)
    if judged:  # and the arms without a ratio, which have no part in the study
        rest = means.filter(~pl.col("arm").is_in(judged.means["arm"].implode()))
        means = pl.concat([judged.means, rest], how="diagonal_relaxed")
    name = judged.arm if judged else arms(runs)[0]
    ends = means.filter(pl.col("arm") == name).sort("ratio")
    low, high = ends.row(0, named=True), ends.row(-1, named=True)
    summary = f"Validation loss against the total to active ratio for {listing(arms(runs))}. "
    finding = (
        f"The loss of {name} goes from {low['mean']:.4f} nats per token at ratio "
        f"{low['ratio']:g} to {high['mean']:.4f} at {high['ratio']:g}."
        if ends.height > 1 and ends["ratio"].null_count() == 0
        else f"The loss of {name} is {low['mean']:.4f} nats per token."
    )
    bars = _intervals(means["n"].to_list()) if judged is None else _fitted(judged)
    caption = (
        f"n = {count_of(runs.height, 'run')}. Small marks are single runs, large ones means over "
        f"seeds; {bars}."
    )
    if meanings := runs["ratio_meaning"].drop_nulls().unique(maintain_order=True).to_list():
        caption += f" The ratio is: {listing(meanings)}."
    if note := later_token_note(material.finished):
        caption += f" {note}"
    columns = "label arm ratio ratio_meaning seed loss total_params active_params train_tokens"
    data = runs.select(columns.split())
    curve = judged.band.curve if judged else None
    canvas = figures.frontier.canvas(runs, means=means, curve=curve)
    table = table_of(means, 4)
    return one_plot("frontier", caption, summary + finding, canvas, data, table, finding)


def begin_training(material: Material, frames: Frames) -> None:
    """Begin to read the runs of ``training_block``, which another process decodes."""
    if material.trained:
        frames.begin(training_metrics, material.trained[:: _step(material)])


def _step(material: Material) -> int:
    """One run in so many is drawn."""
    return -(-len(material.trained) // MAX_CURVES) or 1


def training_block(material: Material, frames: Frames) -> Block | None:
    """Small multiples of the training metrics of all runs that logged any, those that still run
    among them; None where none did.
    """
    step = _step(material)
    metrics = frames(training_metrics, material.trained[::step])
    names = [name for name in CURVES if name in metrics and metrics[name].drop_nulls().len()]
    if not names or "tokens" not in metrics:
        return None
    final = metrics.group_by("run", maintain_order=True).agg(pl.col("tokens", *names).last())
    runs = count_of(final.height, "run")
    points = min(MAX_POINTS, max(FEWEST_POINTS, POINT_BUDGET // (final.height * len(names))))
    plots = []
    for name in names:
        ends = final[name].drop_nulls()
        summary = (
            f"{CURVES[name]} over training tokens, {runs}, ending between {ends.min():.4g} and "
            f"{ends.max():.4g}."
        )
        log = name == "grad_norm" and bool((metrics[name].drop_nulls() > 0).all())
        canvas = figures.training_curves.canvas(
            metrics, name, title=CURVES[name], log=log, points=points
        )
        plots.append(Plot(summary, (Variant("", canvas),)))
    caption = (
        f"n = {runs}; one line is one run: logged steps as they were, no smoothing and no "
        f"interval, at most {points} points drawn. Load and counts are means over layers; MaxVio "
        "is the largest load over the mean, less 1. Seeds of one arm and ratio share a colour."
    )
    if step > 1:
        caption += (
            f" Drawn, to keep the page small, is one run in {step} of "
            f"{len(material.trained)}, evenly spaced over arms, ratios and seeds."
        )
    ends = final[names[0]].drop_nulls()
    low, high = (decimal(float(end)) for end in (ends.min(), ends.max()))  # type: ignore[arg-type]
    where = low if low == high else f"between {low} and {high}"
    far = magnitude(float(final["tokens"].max()))  # type: ignore[arg-type]
    finding = (
        f"{CURVES[names[0]].partition(',')[0].capitalize()} ends at {where}, after {far} tokens."
    )
    styles = enumerate(metrics["group"].unique(maintain_order=True))
    legend = [(group, line_style(index)) for index, group in styles]
    return Block(
        "training_curves",
        caption,
        tuple(plots),
        metrics.select("run", "group", "tokens", *names),
        table_of(final),
        tuple(Legend(group, style["color"], style["dash"]) for group, style in legend),
        finding,
    )


def _fitted(study: WallStudy) -> str:
    """What the bars and the line of a frontier with its band mean."""
    held = study.band.means.filter("held_out")["ratio"].to_list()
    without = f" without ratio {listing([f'{ratio:g}' for ratio in held])}" if held else ""
    bars = (
        f"bars are 90 % intervals from the noise between the runs of {study.arm}, pooled over its "
        "ratios and taken for the other arms too"
        if study.means["hi"].drop_nulls().len()
        else _intervals(study.means["n"].to_list())
    )
    return (
        f"{bars}. The curve is the {study.band.form} form, which has the smallest AICc, fitted to "
        f"{study.arm}{without} (open marks: not fitted); its 90 % band redraws the noise"
    )


def _intervals(counts: list[int]) -> str:
    """What the bars of the frontier mean, given the number of seeds of each of its points."""
    low, high = min(counts), max(counts)
    if high == 1:
        return (
            "each point is one seed, so there is no interval, and a difference between points may "
            "be noise"
        )
    number = f"n = {low} each" if low == high else f"n = {low} to {high}"
    missing = ", none where n = 1" if low == 1 else ""
    return f"bars are 95 % Student t-intervals over the seeds of a point ({number}){missing}"
