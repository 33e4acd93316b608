"""The section on load: one heatmap per arm and ratio, within a budget of cells, and the unevenness
of each layer with its interval over documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from moe_lab.number_format import count_of, decimal, listing, whole
from moe_lab.report import figures
from moe_lab.report.depth_figures import MAX_SERIES
from moe_lab.report.figure_blocks import (
    Block,
    Plot,
    Variant,
    one_plot,
    representatives,
    table_of,
)
from moe_lab.report.frames import Frames
from moe_lab.report.load_figures import MAX_LOG2_LOAD
from moe_lab.report.sources import Material, NamedTrace

CELL_BUDGET = 110_000
"""Heatmap cells on one page, about 12 bytes each; what goes beyond it is named in the caption and
left out.
"""
MAX_MAPS = 12
"""Traces that have a map."""
SORT_ABOVE = 64
"""With more experts than this a map is also offered sorted within each layer."""
PIXELS = 2
"""The least width of an expert's column."""


def load_block(material: Material, frames: Frames) -> Block | None:
    """The load of one trace per arm and ratio; None without traces."""
    from moe_lab.analysis import expert_load, load_summary

    variants: list[Variant] = []
    loads, summaries, skipped, thinned = [], [], [], []
    left = CELL_BUDGET
    shown = representatives(material.traces)
    for named in shown:
        layers = _layers_that_fit(named)
        size = sum(_width(named, layer) for layer in layers)
        if size > left or len(loads) == MAX_MAPS:
            skipped.append(named.label)
            continue
        if len(layers) < len(named.trace.meta.layers):
            thinned.append(
                f"{len(layers)} of {len(named.trace.meta.layers)} layers of {named.label}"
            )
        frame = frames(expert_load, named.trace).filter(pl.col("layer").is_in(layers))
        added = _variants(named, frame, left // size)
        variants += added
        left -= size * len(added)
        loads.append(frame.select(pl.lit(named.label).alias("run"), pl.all()))
        summaries.append(
            frames(load_summary, named.trace).select(pl.lit(named.label).alias("run"), pl.all())
        )
    if not loads:
        return None
    data = pl.concat(loads, how="diagonal_relaxed")
    caption = _caption(data, shown)
    if any(variant.min_width for variant in variants):
        caption += " A wide map scrolls sideways."
    if thinned:
        caption += f" Drawn, to keep the page small, are {listing(thinned)}, evenly spaced."
    if skipped:
        caption += f" Not drawn, to keep the page small: {listing(skipped)}."
    table = table_of(pl.concat(summaries, how="diagonal_relaxed"))
    deaths = _deaths(data)
    finding = f"{deaths[:1].upper()}{deaths[1:]}."
    block = one_plot("expert_load", caption, _summary(data), variants, data, table, finding)
    return _side_by_side(block, shown) if material.about == "traces" else block


def _side_by_side(block: Block, traces: Sequence[NamedTrace]) -> Block:
    """Two traces with as many maps each as two drawings with one choice; others as they are."""
    drawn = block.plots[0].variants if block.plots else ()
    own = [
        tuple(
            variant
            for variant in drawn
            if variant.name in (named.label, f"{named.label}, sorted by load")
        )
        for named in traces
    ]
    if len(traces) != 2 or not own[0] or len(own[0]) != len(own[1]):
        return block
    plots = tuple(
        Plot(
            block.plots[0].summary,
            tuple(
                replace(variant, name=variant.name.removeprefix(named.label)[2:] or "by expert")
                for variant in variants
            ),
            named.label,
        )
        for named, variants in zip(traces, own, strict=True)
    )
    return replace(block, plots=plots)


def load_interval_block(material: Material, frames: Frames) -> Block | None:
    """Load CV over depth of one trace per arm and ratio; None without traces by token."""
    from moe_lab.analysis import load_interval

    shown = [named for named in representatives(material.traces) if named.trace.meta.per_token]
    shown = [named for named in shown if named.trace.num_tokens][:MAX_SERIES]
    if not shown:
        return None
    parts = [
        frames(load_interval, named.trace).select(pl.lit(named.label).alias("run"), pl.all())
        for named in shown
    ]
    data = pl.concat(parts)
    worst = data.drop_nulls("load_cv").sort("load_cv", descending=True).head(1).to_dicts()
    summary = "Coefficient of variation of the load over the real experts of each layer."
    finding = ""
    for row in worst:
        ends = decimal(row["load_cv"])
        if row["lo"] is not None:
            ends += f" (95 % interval {decimal(row['lo'])} to {decimal(row['hi'])})"
        finding = (
            f"The load is most uneven in layer {row['layer']} of {row['run']}: its CV is {ends}; a "
            f"router without preference shows {decimal(row['even'])}."
        )
    numbers = sorted({int(number) for number in data["n_docs"].to_list()})
    count = " to ".join(whole(number) for number in dict.fromkeys((numbers[0], numbers[-1])))
    caption = (
        f"n = {count} documents. Bars are 95 % intervals from resampling documents, none below "
        "five. Dotted: the CV that as many tokens give by chance, with no preference among experts "
        "(the first run)."
    )
    variant = [Variant("", figures.load_interval.canvas(data))]
    summary = f"{summary} {finding}"
    return one_plot("load_interval", caption, summary, variant, data, finding=finding)


def _variants(named: NamedTrace, frame: pl.DataFrame, room: int) -> list[Variant]:
    """By expert id, and sorted where there are many experts and ``room`` for a second map."""
    width = max(_width(named, layer.layer) for layer in named.trace.meta.layers)
    min_width = PIXELS * width + 80 if width > 128 else 0
    variants = [Variant(named.label, figures.expert_load.canvas(frame), min_width)]
    if width > SORT_ABOVE and room > 1:
        variants.append(
            Variant(
                f"{named.label}, sorted by load",
                figures.expert_load.canvas(frame, order="load"),
                min_width,
            )
        )
    return variants


def _layers_that_fit(named: NamedTrace) -> list[int]:
    """The layers of a trace, or as many evenly spaced ones as fit the whole budget."""
    layers = sorted(layer.layer for layer in named.trace.meta.layers)
    fit = max(1, CELL_BUDGET // max(_width(named, layer) for layer in layers))
    return [
        layers[index]
        for index in np.unique(
            np.linspace(0, len(layers) - 1, min(fit, len(layers))).round().astype(int)
        )
    ]


def _width(named: NamedTrace, layer: int) -> int:
    found = named.trace.meta.layer(layer)
    return found.num_choices if found else 0


def _caption(data: pl.DataFrame, shown: Sequence[NamedTrace]) -> str:
    counts = {named.trace.num_tokens for named in shown}
    n = whole(min(counts)) if len(counts) == 1 else f"{whole(min(counts))} to {whole(max(counts))}"
    zero = (
        " Zero-compute experts have a panel of their own, in the same unit."
        if data["is_zero"].any()
        else ""
    )
    return (
        "Slots that went to each expert ÷ the mean over the real experts of its layer (fair "
        f"share = 1), in n = {n} validation tokens: a count of all of them (below: the interval of "
        "its unevenness over documents). "
        f"The scale is symmetric in log₂ around 1 and ends at {2**MAX_LOG2_LOAD} times at most; "
        f"experts that no token reached are magenta: {_deaths(data)}.{zero}"
    )


def _summary(data: pl.DataFrame) -> str:
    from moe_lab.analysis.largest_by_chance import largest_ratio

    alive = data.filter(pl.col("load").is_not_null())
    if not alive.height:
        return "Load of each expert in each layer. No real expert ran."
    worst = alive.sort("load", descending=True).row(0, named=True)
    real = data.filter(~pl.col("is_zero"))
    fair = real.select(pl.col("count").mean().over("run", "layer"))["count"]
    by_chance = largest_ratio(fair.to_numpy())
    chance = (
        ""
        if by_chance is None
        else (f" (an even router: up to {by_chance:.2f} among {whole(real.height)} experts, 95 %)")
    )
    return (
        f"Load of each expert in each layer. The most loaded is expert {worst['expert']} of layer "
        f"{worst['layer']} in {worst['run']} with {worst['load']:.2f} times the fair share"
        f"{chance}; {_deaths(data)}."
    )


def _deaths(data: pl.DataFrame) -> str:
    dead = (
        data.filter((pl.col("count") == 0) & ~pl.col("is_zero"))
        .group_by("run", maintain_order=True)
        .len()
    )
    return (
        listing([f"{count_of(number, 'dead expert')} in {run}" for run, number in dead.rows()])
        or "there is no dead expert"
    )
