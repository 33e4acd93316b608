"""The section on compute: ffn_count where routers choose how many real experts a token gets, and
how certain they are of their choice where k is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from moe_lab.number_format import decimal, listing, whole
from moe_lab.report import figures
from moe_lab.report.difficulty_figures import ALIGN_LABELS
from moe_lab.report.difficulty_figures import difficulty_curves as difficulty_figure
from moe_lab.report.difficulty_section import trace_difficulty
from moe_lab.report.figure_blocks import (
    Block,
    Plot,
    Variant,
    looked_into,
    representatives,
    table_of,
)
from moe_lab.report.frames import Frames
from moe_lab.report.sources import NamedTrace
from moe_lab.runs.record import number

CLASS_COLUMNS = {
    "lexer": "lexer class",
    "subword": "subword position",
    "freq_band": "frequency band",
}
"""Columns of the token table that classify tokens, with their names in words; those a trace lacks
are skipped.
"""
CERTAINTIES = {"entropy": "router entropy", "margin": "margin", "gate_mass_ffn": "gate mass"}
"""Routing columns that say how certain a router is, with their names in words."""
CERTAINTY_NOTE = (
    "A certain router has a low entropy, a large margin and, where the weights are not normalised, "
    "a large gate mass."
)
SMALLEST_RANGE = 0.002
"""Weights are stored with 11 bits: what varies by less is one number."""
CURVE_LAYERS = 3
CURVE_RESAMPLES = 200
MAX_TRACES = 4
RESAMPLES = 1000


@dataclass(frozen=True)
class ComputeSection:
    """``fixed`` names the traces whose ffn_count is one number, in words; the blocks, under their
    headings, cover the others, of which ``first`` is one, or the certainty of fixed ones.
    """

    fixed: str
    blocks: tuple[tuple[str, Block], ...]
    first: NamedTrace | None


def compute_section(traces: tuple[NamedTrace, ...], frames: Frames) -> ComputeSection:
    """Spread and class profile of ffn_count for up to ``MAX_TRACES`` traces in which it varies;
    where it varies in none, entropy, margin and gate mass by class and difficulty.
    """
    counts = [(named, frames(distinct_counts, named)) for named in representatives(traces)]
    varying = [named for named, values in counts if len(values) > 1]
    constant = [(named, values[0]) for named, values in counts if len(values) == 1]
    if varying:
        shown = varying[:MAX_TRACES]
        blocks = (
            ("Spread over tokens", _spread_block(shown, frames)),
            ("By class of token", _profile_block(shown, frames)),
        )
    else:
        shown = looked_into([named for named, _ in constant])
        blocks = (
            ("Certainty by class of token", _certainty_block(shown, frames)),
            ("Certainty by tenth of difficulty", _certainty_curves(shown, frames)),
        )
    drawn = tuple((heading, block) for heading, block in blocks if block is not None)
    fixed = _fixed_sentence(constant)
    if constant and not varying and not drawn:
        fixed += (
            " How certain the router was, by class of token, needs a trace with scores and text: "
            "this one has none."
        )
    return ComputeSection(fixed, drawn, varying[0] if varying else None)


def distinct_counts(named: NamedTrace) -> list[int]:
    """The one ffn_count of all tokens of a trace, or the least and the largest."""
    ends = []
    for layer in named.layers:
        found = [batch["ffn_count"] for batch in named.trace.batches(layer, ["ffn_count"])]
        values = [
            int(end)  # type: ignore[arg-type]
            for column in found
            if len(column)
            for end in (column.min(), column.max())
        ]
        ends += [(min(values), max(values))] if values else []
    if any(low < high for low, high in ends):
        return [min(low for low, _ in ends), max(high for _, high in ends)]
    return sorted({low for low, _ in ends})[:1]


def _fixed_sentence(constant: list[tuple[NamedTrace, int]]) -> str:
    if not constant:
        return ""
    values = sorted({value for _, value in constant})
    parts = [
        f"{value} in {listing([named.group for named, own in constant if own == value])}"
        for value in values
    ]
    return (
        "With a fixed k every token runs the same number of real experts: ffn_count is "
        f"{'; '.join(parts)}."
    )


def _spread_block(traces: list[NamedTrace], frames: Frames) -> Block:
    from moe_lab.analysis import ffn_spread

    spreads = []
    for named in traces:
        aim = named.run.result.get("target_ffn_count") if named.run else None
        target = pl.lit(number(aim), dtype=pl.Float64)
        spread = frames(ffn_spread, named.trace, resamples=RESAMPLES)
        spreads.append(spread.with_columns(target=target))
    data = pl.concat(
        [
            frame.select(pl.lit(named.label).alias("run"), pl.all())
            for named, frame in zip(traces, spreads, strict=True)
        ]
    )
    first = spreads[0]
    summary = (
        f"Standard deviation of ffn_count over tokens, per layer. In {traces[0].label} it is "
        f"{_range(first['sd'])}. Drawing the same number of slots evenly without a look at the "
        f"token gives {_range(first['hypergeometric_sd'])}, drawing each expert by its load "
        f"{_range(first['independent_sd'])}. Mean ffn_count is {_range(first['mean'])}."
    )
    sizes = [
        f"{whole(frame['n_tokens'].max())} validation tokens in {named.label}"
        for named, frame in zip(traces, spreads, strict=True)
    ]
    caption = (
        f"n = {listing(sizes)}. Above: standard deviation of ffn_count over tokens, with 95 % "
        f"intervals from resampling whole documents {RESAMPLES:,} times, beside two routers that "
        "never look at the token: slots drawn evenly among real and zero-compute experts "
        "(hypergeometric), and every expert drawn by its measured load. Variation alone proves "
        "nothing: a router that ignores the token varies as much. Only a spread beyond it, and a "
        "difference between kinds of tokens (next figure), speak for a choice. Below: mean and "
        "target K_e; every token counted, so without interval."
    )
    variants = tuple(
        Variant(named.label, figures.ffn_spread.canvas(frame))
        for named, frame in zip(traces, spreads, strict=True)
    )
    return Block("ffn_spread", caption, (Plot(summary, variants),), data, table_of(data))


def _profile_block(traces: list[NamedTrace], frames: Frames) -> Block | None:
    profiles = [
        (named, column, "ffn_count") for named in traces for column in _class_columns(named)
    ]
    return _profiles(profiles, {"ffn_count": "ffn_count"}, frames)


def _certainty_block(traces: list[NamedTrace], frames: Frames) -> Block | None:
    """Entropy by every class column, margin and gate mass by the first."""
    profiles = [
        (named, column, value)
        for named in traces
        for value in _certainties(named, frames)
        for column in _class_columns(named)[: None if value == "entropy" else 1]
    ]
    return _profiles(profiles, CERTAINTIES, frames)


def _profiles(
    wanted: list[tuple[NamedTrace, str, str]], values: dict[str, str], frames: Frames
) -> Block | None:
    from moe_lab.analysis import class_profile

    variants, profiles, finding = [], [], ""
    several = len({named.label for named, _, _ in wanted}) > 1
    for named, column, value in wanted:
        profile = frames(class_profile, named.trace, column, value, resamples=RESAMPLES)
        frame = profile.cast({"class": pl.String})
        if frame["class"].n_unique() < 2:  # nothing to compare
            continue
        words = CLASS_COLUMNS[column]
        finding = finding or _extremes(frame, words, named.label, values[value])
        name = words if len(values) == 1 else f"{values[value]}, by {words}"
        canvas = figures.class_profile.canvas(frame, value=f"{values[value]} per token")
        variants.append(Variant(name, canvas, group=named.label if several else ""))
        names = {"run": named.label, "column": column, "value": value}
        profiles.append(
            frame.select(*(pl.lit(text).alias(key) for key, text in names.items()), pl.all())
        )
    if not profiles:
        return None
    data = pl.concat(profiles, how="diagonal_relaxed")
    documents = data.filter(pl.col("layer").is_null())["n_docs"].max()
    what = "ffn_count" if len(values) == 1 else "the chosen measure"
    caption = (
        f"Mean {what} of the tokens of each class (number of tokens in brackets); n = {documents} "
        "documents at most. Bars are 95 % intervals from resampling whole documents "
        f"{RESAMPLES:,} times; the dotted line is the mean over all, small dots are layers. "
        "Adjusted means ask what a class would get if its tokens were as frequent, and stood as "
        "late in their document, as all tokens; the first token of a document is left out. A "
        "class can still differ in the very tokens it holds."
    )
    if len(values) > 1:
        caption += f" {CERTAINTY_NOTE}"
    table = table_of(data.filter(pl.col("layer").is_null()).drop("layer"))
    plots = (Plot(finding, tuple(variants)),)
    return Block("class_profile", caption, plots, data, table, finding=finding)


def _certainty_curves(traces: list[NamedTrace], frames: Frames) -> Block | None:
    """Up to ``CURVE_LAYERS`` layers, against the token that goes in and the one to be predicted."""
    variants, parts = [], []
    for named in traces:
        frame, values = frames(trace_difficulty, named), _certainties(named, frames)
        if frame is None or not values:
            continue
        curves = frames(_curves_of_measures, frame, named.even_layers(CURVE_LAYERS), values)
        by_plot = curves.group_by("value", "layer", "align", maintain_order=True)
        for (value, layer, align), part in by_plot:
            words = CERTAINTIES[str(value)]
            canvas = difficulty_figure.canvas(part.drop("value"), value=f"{words} per token")
            name = f"{words}, layer {layer}, {ALIGN_LABELS[str(align)]}"
            variants.append(Variant(name, canvas, group=named.label if traces[1:] else ""))
        parts.append(named.labelled(curves))
    if not variants:
        return None
    data = pl.concat(parts)
    most = whole(float(data["n_tokens"].to_numpy().max()))
    caption = (
        "Mean of the chosen measure by tenth of difficulty, and by tenth of how hard the token is "
        f"for its own id. n = {most} tokens a tenth at most; bars are 95 % intervals from "
        f"resampling documents {CURVE_RESAMPLES} times. Difficulty is the surprisal of each token "
        f"under trigrams counted in the other half of the documents. {CERTAINTY_NOTE}"
    )
    summary = "The router's certainty by tenth of difficulty, raw and within token ids."
    return Block(
        "difficulty_curves", caption, (Plot(summary, tuple(variants)),), data, table_of(data)
    )


def _curves_of_measures(frame: pl.DataFrame, layers: list[int], values: list[str]) -> pl.DataFrame:
    """``difficulty_curves`` of each of ``values``, with column value in front.

    To the analysis the measures are layers that differ in compute alone, so that the order of
    difficulty is made once for all of them.
    """
    from moe_lab.analysis.difficulty import difficulty_curves
    from moe_lab.analysis.difficulty.study import NGRAM

    rows = frame.lazy().filter(pl.col("layer").is_in(layers))
    layer, step = pl.col("layer").cast(pl.Int64), max(layers) + 1
    stacked = pl.concat(
        rows.with_columns(layer=layer + place * step, certainty=pl.col(value).cast(pl.Float64))
        for place, value in enumerate(values)
    )
    curves = difficulty_curves(stacked, NGRAM, compute="certainty", resamples=CURVE_RESAMPLES)
    names = (layer // step).replace_strict(dict(enumerate(values)), return_dtype=pl.String)
    return curves.select(names.alias("value"), layer % step, pl.exclude("layer"))


def _class_columns(named: NamedTrace) -> list[str]:
    present = named.trace.tokens.collect_schema().names()
    return [column for column in CLASS_COLUMNS if column in present]


def _certainties(named: NamedTrace, frames: Frames) -> list[str]:
    """The measures of certainty that the trace recorded in all its layers and that vary."""
    return frames(_varying_measures, named)


def _varying_measures(named: NamedTrace) -> list[str]:
    ends = [
        expression
        for name in CERTAINTIES
        for expression in (
            pl.col(name).null_count().alias(f"{name}_missing"),
            (pl.col(name).max() - pl.col(name).min()).alias(f"{name}_range"),
        )
    ]
    row = named.trace.routing.select(ends).collect().row(0, named=True)
    return [
        name
        for name in CERTAINTIES
        if not row[f"{name}_missing"] and (row[f"{name}_range"] or 0) > SMALLEST_RANGE
    ]


def _extremes(frame: pl.DataFrame, words: str, label: str, value: str) -> str:
    total = frame.filter(pl.col("layer").is_null()).sort("mean")
    low, high = (
        f"{row['class']} ({decimal(row['mean'])}"
        + (")" if row["lo"] is None else f", {decimal(row['lo'])} to {decimal(row['hi'])})")
        for row in (total.row(0, named=True), total.row(-1, named=True))
    )
    return (
        f"In {label} the mean {value} is lowest for {low} and highest for {high}, of "
        f"{total.height} classes by {words}; in brackets with 95 % intervals."
    )


def _range(values: pl.Series) -> str:
    low, high = values.min(), values.max()
    if low is None:
        return "not defined"
    return decimal(low, 2) if low == high else f"{decimal(low, 2)} to {decimal(high, 2)}"  # type: ignore[arg-type]
