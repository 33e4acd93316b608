"""The section on whose experts they are: specialisation, co-activation, transitions and repetition
of one trace, saturation of several.

Everything keeps to a budget of cells, so that a model of 94 layers and 512 experts still makes a
page that opens: layers are picked evenly, pairs of experts are binned, and the reader chooses the
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl

from moe_lab.analysis.registry import ANALYSES, Analysis
from moe_lab.number_format import count_of, decimal, listing, whole
from moe_lab.report import figures
from moe_lab.report.blocks import Block, Plot, Variant, representatives, table_of
from moe_lab.report.depth_figures import MAX_SERIES
from moe_lab.report.frames import Frames
from moe_lab.report.map_figures import BINS
from moe_lab.report.sources import Material, NamedTrace
from moe_lab.trace import LayerMeta

DOMAINS = ("domain", "source", "language", "lexer", "subword", "freq_band", "position_band")
"""Columns that tell kinds of text apart, the first that a trace has with at least two values; the
last one can always be derived.
"""
MOST_DOMAINS = 6
MAP_CELLS = 200_000
"""Cells of the specialisation maps, about 11 bytes each."""
PICKED_LAYERS = 6
RESAMPLES = 200
TABLE_ROWS = 60


@dataclass(frozen=True)
class ExpertsSection:
    """The blocks of the section, each with its heading."""

    blocks: tuple[tuple[str, Block], ...]


def experts_section(material: Material, frames: Frames) -> ExpertsSection:
    """Of the first representative trace; saturation where several bare traces hold the same text."""
    shown = representatives(material.traces)
    blocks: list[tuple[str, Block]] = []
    if shown and shown[0].trace.num_tokens:
        makers: Sequence[tuple[str, Callable[[NamedTrace, Frames], Block | None]]] = (
            ("Specialisation by kind of text", _specialisation_block),
            ("Divergence of kinds of text", _divergence_block),
            ("Experts that run together", _coactivation_block),
            ("From layer to layer", _transitions_block),
            ("Repetition along the text", _repetition_block),
        )
        blocks += [
            (heading, block)
            for heading, maker in makers
            if (block := maker(shown[0], frames)) is not None
        ]
        blocks += [
            (analysis.heading, _plugin_block(analysis, shown[0], frames))
            for analysis in ANALYSES.values()
        ]
    if (
        block := _saturation_block(
            [named for named in material.traces if named.run is None], frames
        )
    ) is not None:
        blocks.append(("Saturation over checkpoints", block))
    return ExpertsSection(tuple(blocks))


def _domain_column(named: NamedTrace) -> tuple[str, list[object]] | None:
    """The column, and its most frequent values in order of their tokens."""
    from moe_lab.analysis.token_groups import grouping, token_columns

    if not any(name.startswith("tokens/") for name in named.trace.parts):
        return None
    known = token_columns(named.trace)
    for column in DOMAINS:
        if column not in known:
            continue
        groups = grouping(named.trace, column)
        if 2 <= len(groups) <= 64:
            order = np.argsort(-groups.sizes, kind="stable")[:MOST_DOMAINS]
            return column, groups.values.gather(order).to_list()
    return None


def _plugin_block(analysis: Analysis, named: NamedTrace, frames: Frames) -> Block:
    """The figure and table of an analysis that a plugin registered."""
    frame = frames(analysis.compute, named.trace)
    plot = Plot(analysis.summary, (Variant(analysis.heading, analysis.draw(frame)),))
    return Block(
        analysis.name, f"{analysis.caption} ({named.label})", (plot,), frame, table_of(frame)
    )


def _specialisation_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis import domain_specialisation

    found = frames(_domain_column, named)
    if found is None:
        return None
    column, domains = found
    data = frames(
        domain_specialisation, named.trace, column, resamples=0 if _large(named) else RESAMPLES
    )
    layers = _even_layers(named, max(1, MAP_CELLS // (len(domains) * _width(named))))
    drawn = data.filter(pl.col("layer").is_in(layers))
    wide = 2 * _width(named) + 80 if _width(named) > 128 else 0
    variants = tuple(
        Variant(
            f"{column} = {figures.plain(domain)}",
            figures.domain_specialisation.canvas(drawn, domain=domain),
            wide,
        )
        for domain in domains
    )
    ratio = data.filter(pl.col("at_random") > 0, pl.col("domain").is_in(domains)).with_columns(
        ratio=pl.col("specialisation") / pl.col("at_random")
    )
    top = ratio.sort("ratio", "tokens", descending=True, nulls_last=True).head(TABLE_ROWS)
    first = top.row(0, named=True) if top.height else None
    summary = (
        "Share of each kind's tokens that each expert runs, over its share of all tokens. "
        + (
            f"The largest is {decimal(first['ratio'], 2)} times, expert {first['expert']} of "
            f"layer {first['layer']} for {first['domain']}."
            if first
            else ""
        )
    )
    caption = (
        f"n = {whole(named.trace.num_tokens)} tokens of {named.label}, by {column}. Colour: share "
        "of the kind's tokens that the expert runs ÷ its share of all tokens (1 where the kind "
        "plays no part), zero-compute experts last. A share is a count of these tokens; "
        "intervals from resampling documents are in the "
        f"data{' of smaller models' if _large(named) else ''}. The table lists the largest "
        "ratios; among many experts some are large by chance."
    )
    if len(layers) < len(named.trace.meta.layers):
        caption += (
            f" Drawn are {len(layers)} of {len(named.trace.meta.layers)} layers, evenly spaced."
        )
    return Block("domain_specialisation", caption, (Plot(summary, variants),), data, table_of(top))


def _divergence_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis import domain_divergence

    found = frames(_domain_column, named)
    if found is None:
        return None
    data = frames(
        domain_divergence, named.trace, found[0], resamples=0 if _large(named) else RESAMPLES
    )
    if not data.height or data["bits"].null_count() == data.height:
        return None
    last = data.drop_nulls("bits").sort("bits", descending=True).row(0, named=True)
    summary = (
        "Jensen-Shannon divergence of the expert loads of every two kinds of text, over depth. "
        f"The widest is {last['domain_a']} and {last['domain_b']} in layer {last['layer']} with "
        f"{decimal(last['bits'])} bits."
    )
    caption = (
        f"n = {whole(named.trace.num_tokens)} tokens, by {found[0]}: 0 bits where two kinds load "
        f"the experts alike, 1 where they share none; at most {MAX_SERIES} pairs are drawn. Bars, "
        f"where drawn, are 95 % intervals from resampling documents {RESAMPLES} times; finite "
        "samples diverge a little even where kinds do not: the dotted line is what documents "
        "dealt anew to the names give."
    )
    return Block(
        "domain_divergence",
        caption,
        (Plot(summary, (Variant("", figures.domain_divergence.canvas(data)),)),),
        data,
        table_of(data),
    )


def _coactivation_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis import coactivation, coactivation_order

    meta = {layer.layer: layer for layer in named.trace.meta.layers}
    layers = [
        layer
        for layer in _even_layers(named, PICKED_LAYERS)
        if meta[layer].top_k > 1 and meta[layer].num_choices > 2
    ]
    if not layers:
        return None
    data = frames(coactivation, named.trace, layers)
    order = frames(coactivation_order, data)
    variants = tuple(
        Variant(f"layer {layer}", figures.coactivation.canvas(data, layer=layer, order=order))
        for layer in layers
    )
    met = data.filter(pl.col("expected") >= 5).sort("lift", descending=True, nulls_last=True)
    first = met.row(0, named=True) if met.height else None
    summary = (
        "Pairs of experts that run together on a token, over what their loads alone would give. "
        + (
            f"The largest is {decimal(first['lift'], 2)} times, experts {first['expert_a']} and "
            f"{first['expert_b']} of layer {first['layer']}."
            if first
            else ""
        )
    )
    caption = (
        f"n = {whole(named.trace.num_tokens)} tokens of {named.label}: all pairs of experts of a "
        "token, counted once, ÷ the count in proportion to the product of the two loads (1 where "
        f"experts keep to their loads). Experts are in the order of a clustering{_binned(named)}. "
        f"Layers shown: {listing([str(layer) for layer in layers])}. Every token counted, so "
        "without interval; the table lists the largest lifts among pairs of which at least 5 "
        "were expected."
    )
    return Block(
        "coactivation", caption, (Plot(summary, variants),), data, table_of(met.head(TABLE_ROWS))
    )


def _transitions_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis import transitions

    layers = sorted(layer.layer for layer in named.trace.meta.layers)
    pairs = list(pairwise(layers))
    if not pairs:
        return None
    chosen = [pairs[place] for place in _even(len(pairs), PICKED_LAYERS)]
    data = frames(transitions, named.trace, chosen)
    variants = tuple(
        Variant(f"layer {pair[0]} to {pair[1]}", figures.transitions.canvas(data, layers=pair))
        for pair in chosen
    )
    met = data.filter(pl.col("expected") >= 5).sort("lift", descending=True, nulls_last=True)
    summary = "Pairs of an expert in one layer and one in the next that run on the same token, over what independent layers would give."
    if met.height:
        first = met.row(0, named=True)
        summary += (
            f" The largest is {decimal(first['lift'], 2)} times, expert {first['expert_from']} of "
            f"layer {first['from_layer']} and {first['expert_to']} of layer {first['to_layer']}."
        )
    caption = (
        f"n = {whole(named.trace.num_tokens)} tokens of {named.label}: every expert of one traced "
        "layer with every expert of the next (k x k pairs a token) ÷ the product of their "
        f"shares. Columns stand beside the rows that lead to them most{_binned(named)}. Every "
        "token counted, so without interval."
    )
    return Block(
        "transitions", caption, (Plot(summary, variants),), data, table_of(met.head(TABLE_ROWS))
    )


def _repetition_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis import repetition

    data = frames(repetition, named.trace, resamples=RESAMPLES)
    if not data["n_pairs"].max():
        return None
    variants = tuple(
        Variant(words, figures.repetition.canvas(data, choice=choice))
        for choice, words in (("first", "first choice"), ("either", "any of the chosen"))
    )
    rates = data.filter(pl.col("choice") == "first")["rate"].drop_nulls().to_list()
    pairs, docs = max(data["n_pairs"].to_list()), count_of(data["n_docs"].to_list()[0], "document")
    summary = f"Share of tokens whose first choice is that of the one before, over depth: {decimal(min(rates), 2)} to {decimal(max(rates), 2)}."
    caption = (
        f"n = {whole(pairs)} pairs of neighbouring tokens in {docs}. Bars are 95 % intervals from "
        f"resampling documents {RESAMPLES} times. Dotted: experts drawn evenly; dash-dotted: the "
        "same tokens paired at random, which uneven loads alone give."
    )
    return Block("repetition", caption, (Plot(summary, variants),), data, table_of(data))


def _saturation_block(traces: Sequence[NamedTrace], frames: Frames) -> Block | None:
    from moe_lab.analysis import saturation
    from moe_lab.analysis.saturation import difference

    if len(traces) < 2:
        return None
    last = traces[-1]
    same = [named for named in traces[:-1] if not frames(difference, named.trace, last.trace)]
    if not same:
        return None
    names = [f"{place}: {named.label}" for place, named in enumerate(same, start=1)]
    data = frames(
        saturation,
        {name: named.trace for name, named in zip(names, same, strict=True)},
        last.trace,
        resamples=RESAMPLES,
    )
    variants = tuple(
        Variant(choice, figures.saturation.canvas(data, choice=choice))
        for choice in ("top-k", "top-1")
    )
    mean = float(
        np.nanmean(
            data.filter(pl.col("choice") == "top-k", pl.col("place") == 0)["saturation"]
            .cast(pl.Float64)
            .to_numpy()
        )
    )
    tokens = whole(max(data["n_tokens"].to_list()))
    summary = f"Overlap of each checkpoint's routing with that of {last.label}: {decimal(mean, 2)} on average over layers in the first."
    caption = (
        f"n = {tokens} tokens; checkpoints in the order given, each against the last, "
        f"{last.label}. Saturation is the mean share of the chosen experts that the last "
        f"checkpoint chooses too. Bars are 95 % intervals from resampling documents {RESAMPLES} "
        "times; dotted is chance for even choices, dash-dotted for two routers that keep the "
        "measured loads and ignore the token."
    )
    return Block("saturation", caption, (Plot(summary, variants),), data, table_of(data))


def _even(size: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, size - 1, min(most, size)).round().astype(int)).tolist()


def _even_layers(named: NamedTrace, most: int) -> list[int]:
    layers = sorted(layer.layer for layer in named.trace.meta.layers)
    return [layers[place] for place in _even(len(layers), most)]


def _width(named: NamedTrace) -> int:
    return max(layer.num_choices for layer in named.trace.meta.layers)


def _large(named: NamedTrace) -> bool:
    """Whether resampling every expert of every layer would take minutes."""
    return _cells(named.trace.meta.layers) > 20_000


def _cells(layers: Sequence[LayerMeta]) -> int:
    return sum(layer.num_choices for layer in layers)


def _binned(named: NamedTrace) -> str:
    return (
        f"; more than {BINS} are binned, neighbours sharing a cell" if _width(named) > BINS else ""
    )
