"""The section on specialisation: of experts of one trace, with co-activation, transitions and
repetition; saturation of several traces.

Everything keeps to a budget of cells, so that a model of 94 layers and 512 experts still makes a
page that opens: layers are picked evenly, pairs of experts are binned, and the reader chooses the
layer.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import polars as pl

from moe_lab.analysis.registry import ANALYSES, Analysis
from moe_lab.number_format import count_of, decimal, listing, whole
from moe_lab.report import figures
from moe_lab.report.canvas import evenly
from moe_lab.report.depth_figures import MAX_PAIRS, MAX_SERIES
from moe_lab.report.figure_blocks import (
    Block,
    Variant,
    by_heading,
    looked_into,
    one_plot,
    scrolling_width,
    table_of,
)
from moe_lab.report.frames import Frames
from moe_lab.report.heatmap_figures import BINS
from moe_lab.report.second_process import SecondProcess
from moe_lab.report.sources import NamedTrace

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


Blocks = Callable[[], dict[str, Block | None]]
"""Heading -> block of one trace, when they are asked for."""


def begin_experts(
    traces: Sequence[NamedTrace], beside: SecondProcess, frames: Frames
) -> list[tuple[NamedTrace, list[Blocks]]]:
    """Begin the blocks of the traces that are looked into."""
    return [
        (
            named,
            [beside.begin(_blocks, headings, named, frames=frames) for headings in _TOGETHER],
        )
        for named in looked_into(traces)
        if named.trace.num_tokens
    ]


def experts_section(
    traces: Sequence[NamedTrace],
    begun: list[tuple[NamedTrace, list[Blocks]]],
    frames: Frames,
) -> list[tuple[str, Block]]:
    """Headings and blocks: those that ``begin_experts`` began, the analyses of plugins, and the
    saturation where several bare traces hold the same text.
    """
    made: list[tuple[str, str, Block | None]] = []
    for named, parts in begun:
        blocks: dict[str, Block | None] = {}
        for part in reversed(parts):  # the last ones are begun last
            blocks |= part()
        made += [(heading, named.label, blocks[heading]) for heading in _MAKERS]
        made += [
            (analysis.heading, named.label, _plugin_block(analysis, named, frames))
            for analysis in ANALYSES.values()
        ]
    checkpoints = [named for named in traces if named.run is None]
    made.append(("Saturation over checkpoints", "", _saturation_block(checkpoints, frames)))
    return by_heading(made)


def _blocks(
    headings: Sequence[str], named: NamedTrace, frames: Frames | None = None
) -> dict[str, Block | None]:
    frames = frames or Frames()
    return {heading: _MAKERS[heading](named, frames) for heading in headings}


def _domain_column(named: NamedTrace) -> tuple[str, list[object]] | None:
    """The column, and its most frequent values in order of their tokens."""
    from moe_lab.analysis.token_groups import grouping, token_columns

    if not named.trace.has_tokens:
        return None
    known = token_columns(named.trace)
    for column in filter(known.__contains__, DOMAINS):
        groups = grouping(named.trace, column)
        if 2 <= len(groups) <= 64:
            order = np.argsort(-groups.sizes, kind="stable")[:MOST_DOMAINS]
            return column, groups.values.gather(order).to_list()
    return None


def _plugin_block(analysis: Analysis, named: NamedTrace, frames: Frames) -> Block:
    """The figure and table of an analysis that a plugin registered."""
    frame = frames(analysis.compute, named.trace)
    caption = f"{analysis.caption} ({named.label})"
    variant = Variant(analysis.heading, analysis.draw(frame))
    return one_plot(analysis.name, caption, analysis.summary, [variant], frame)


def _specialisation_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis.largest_by_chance import LEAST_EXPECTED, domain_tables, largest_ratio

    if (kinds := frames(_domain_column, named)) is None:
        return None
    column, domains = kinds
    resamples = _resamples(named)
    tables = frames(domain_tables, named.trace, column, domains, resamples=resamples)
    data, shuffled = tables.specialisation, tables.largest
    layers = named.even_layers(max(1, MAP_CELLS // (len(domains) * named.width)))
    rows = data.filter(pl.col("layer").is_in(layers))
    variants = [
        Variant(
            f"{column} = {figures.plain(domain)}",
            figures.domain_specialisation.canvas(rows, domain=domain),
            scrolling_width(named.width),
        )
        for domain in domains
    ]
    often = pl.col("at_random") * pl.col("tokens") >= LEAST_EXPECTED
    ratio = data.filter(often, pl.col("domain").is_in(domains)).with_columns(
        ratio=pl.col("specialisation") / pl.col("at_random")
    )
    top = ratio.sort("ratio", "tokens", descending=True, nulls_last=True).head(TABLE_ROWS)
    cells = ratio["at_random"] * ratio["tokens"]
    chance, how = (
        (largest_ratio(cells.to_numpy()), "tokens drawn blindly")
        if shuffled is None
        else (shuffled.ratio, "documents assigned to the kinds at random")
    )
    summary = "Share of each kind's tokens that each expert runs, over its share of all tokens."
    summary += _largest(top, "ratio", "expert {expert} of layer {layer} for {domain}", chance, how)
    caption = (
        f"{_tokens(named)}, by {column}. Colour: share "
        "of the kind's tokens that the expert runs ÷ its share of all tokens (1 where the kind "
        "plays no part), zero-compute experts last. A share is a count of these tokens; "
        "intervals from resampling documents are in the "
        f"data{'' if resamples else ' of smaller models'}. The table lists the largest "
        "ratios, where at least 5 tokens were expected; among many experts some are large by "
        "chance."
    )
    if len(layers) < len(named.layers):
        caption += f" Drawn are {len(layers)} of {len(named.layers)} layers, evenly spaced."
    return one_plot("domain_specialisation", caption, summary, variants, data, table_of(top))


def _divergence_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis.largest_by_chance import domain_tables

    if (kinds := frames(_domain_column, named)) is None:
        return None
    resamples = _resamples(named)
    tables = frames(domain_tables, named.trace, *kinds, resamples=resamples)
    data, shuffled = tables.divergence, tables.largest
    widest = data.drop_nulls("bits").sort("bits", descending=True).head(1).to_dicts()
    if not widest:
        return None
    summary = (
        "Jensen-Shannon divergence of the expert loads of every two kinds of text, over depth. "
        "The widest is {domain_a} and {domain_b} in layer {layer} with "
        f"{decimal(widest[0]['bits'])} bits"
    ).format(**widest[0])
    point = widest[0]["shuffled_95"]
    told = [] if point is None else [f"95 % point of shuffled documents: {decimal(point)}"]
    told += (
        []
        if shuffled is None
        else [f"of the widest of all pairs and layers: {decimal(shuffled.bits)}"]
    )
    summary += f" ({'; '.join(told)})." if told else "."
    caption = (
        f"n = {whole(named.trace.num_tokens)} tokens, by {kinds[0]}: 0 bits where two kinds load "
        f"the experts alike, 1 where they share none; at most {MAX_SERIES} pairs are drawn, the "
        f"widest of which at most {MAX_PAIRS} share a kind. Bars are 95 % intervals "
        f"from resampling documents {RESAMPLES} times; finite samples diverge a little even where "
        "kinds do not: the dotted line is the 95 % point "
        "of documents shuffled between the kinds."
    )
    canvas = figures.domain_divergence.canvas(data)
    return one_plot("domain_divergence", caption, summary, canvas, data)


def _coactivation_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis import coactivation, coactivation_order

    paired = {
        layer.layer
        for layer in named.trace.meta.layers
        if layer.top_k > 1 and layer.num_choices > 2
    }
    layers = [layer for layer in named.even_layers(PICKED_LAYERS) if layer in paired]
    if not layers:
        return None
    data = frames(coactivation, named.trace, layers)
    order = frames(coactivation_order, data)
    variants = [
        Variant(f"layer {layer}", figures.coactivation.canvas(data, layer=layer, order=order))
        for layer in layers
    ]
    top = _lifts(data)
    which = "experts {expert_a} and {expert_b} of layer {layer}"
    summary = (
        "Pairs of experts that run together on a token, over what their loads alone would give."
        + _largest(top, "lift", which, _by_chance(data))
    )
    caption = (
        f"{_tokens(named)}: all pairs of experts of a "
        "token, counted once, ÷ the count in proportion to the product of the two loads (1 where "
        "experts keep to their loads). Experts are in the order of a clustering"
        f"{_cells(named, data)}. "
        f"Layers shown: {listing([str(layer) for layer in layers])}. Every token counted, so "
        "without interval; the table lists the largest lifts among pairs of which at least 5 "
        "were expected."
    )
    return one_plot("coactivation", caption, summary, variants, data, table_of(top))


def _transitions_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis import transitions

    pairs = list(pairwise(named.layers))
    if not pairs:
        return None
    chosen = [pairs[index] for index in evenly(len(pairs), PICKED_LAYERS)]
    data = frames(transitions, named.trace, chosen)
    variants = [
        Variant(f"layer {pair[0]} to {pair[1]}", figures.transitions.canvas(data, layers=pair))
        for pair in chosen
    ]
    top = _lifts(data)
    which = "expert {expert_from} of layer {from_layer} and {expert_to} of layer {to_layer}"
    summary = (
        "Pairs of an expert in one layer and one in the next that run on the same token, over what "
        f"independent layers would give.{_largest(top, 'lift', which, _by_chance(data))}"
    )
    caption = (
        f"{_tokens(named)}: every expert of one traced "
        "layer with every expert of the next (k x k pairs a token) ÷ the product of their "
        f"shares. Columns are ordered by the row that leads to them most{_cells(named, data)}. All "
        "tokens are counted, so without interval."
    )
    return one_plot("transitions", caption, summary, variants, data, table_of(top))


def _repetition_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.analysis import repetition

    data = frames(repetition, named.trace, resamples=RESAMPLES)
    if not data["n_pairs"].max():
        return None
    variants = [
        Variant(words, figures.repetition.canvas(data, choice=choice))
        for choice, words in (("first", "first choice"), ("either", "any of the chosen"))
    ]
    rates = data.filter(pl.col("choice") == "first")["rate"].drop_nulls().to_list()
    summary = (
        "Share of tokens whose first choice is that of the one before, over depth: "
        f"{decimal(min(rates), 2)} to {decimal(max(rates), 2)}."
    )
    caption = (
        f"n = {whole(max(data['n_pairs'].to_list()))} pairs of neighbouring tokens in "
        f"{count_of(data['n_docs'][0], 'document')}. Bars are 95 % intervals from "
        f"resampling documents {RESAMPLES} times. Dotted: experts drawn evenly; dash-dotted: the "
        "same tokens paired at random, which uneven loads alone give."
    )
    return one_plot("repetition", caption, summary, variants, data)


def _saturation_block(traces: Sequence[NamedTrace], frames: Frames) -> Block | None:
    """None unless two traces hold the same text."""
    from moe_lab.analysis import saturation
    from moe_lab.analysis.saturation import difference

    if not traces:
        return None
    *others, last = traces
    same = [named for named in others if not frames(difference, named.trace, last.trace)]
    if not same:
        return None
    checkpoints = {f"{place}: {named.label}": named.trace for place, named in enumerate(same, 1)}
    data = frames(saturation, checkpoints, last.trace, resamples=RESAMPLES)
    variants = [
        Variant(choice, figures.saturation.canvas(data, choice=choice))
        for choice in ("top-k", "top-1")
    ]
    first = data.filter(pl.col("choice") == "top-k", pl.col("place") == 0)
    mean = first.select(pl.col("saturation").fill_nan(None).mean()).item()
    summary = (
        f"Overlap of each checkpoint's routing with that of {last.label}: "
        f"{decimal(mean, 2)} on average over layers in the first."
    )
    caption = (
        f"n = {whole(max(data['n_tokens'].to_list()))} tokens; checkpoints in the order given, "
        f"each against the last, "
        f"{last.label}. Saturation is the mean share of the chosen experts that the last "
        f"checkpoint chooses too. Bars are 95 % intervals from resampling documents {RESAMPLES} "
        "times; dotted is chance for even choices, dash-dotted for two routers that keep the "
        "measured loads and ignore the token."
    )
    return one_plot("saturation", caption, summary, variants, data)


_MAKERS = {
    "Specialisation by kind of text": _specialisation_block,
    "Divergence of kinds of text": _divergence_block,
    "Experts that run together": _coactivation_block,
    "From layer to layer": _transitions_block,
    "Repetition along the text": _repetition_block,
}
"""Heading -> maker of the block of one trace."""
_TOGETHER = (
    ("Specialisation by kind of text", "Divergence of kinds of text"),  # from one reading
    ("Repetition along the text",),
    ("From layer to layer",),
    ("Experts that run together",),
)
"""The headings whose blocks one process makes, those that take longest first."""


def _resamples(named: NamedTrace) -> int:
    """None where resampling every expert of every layer would take minutes."""
    experts = sum(layer.num_choices for layer in named.trace.meta.layers)
    return RESAMPLES if experts <= 20_000 else 0


def _lifts(data: pl.DataFrame) -> pl.DataFrame:
    """The pairs with the largest lift, of those that are expected often enough to judge."""
    expected = data.filter(pl.col("expected") >= 5)  # LEAST_EXPECTED of the null
    return expected.sort("lift", descending=True, nulls_last=True).head(TABLE_ROWS)


def _by_chance(pairs: pl.DataFrame) -> float | None:
    """The largest lift of independent tokens, 95 %."""
    from moe_lab.analysis.largest_by_chance import largest_ratio

    return largest_ratio(pairs["expected"].drop_nulls().to_numpy())


def _largest(
    rows: pl.DataFrame,
    column: str,
    words: str,
    chance: float | None,
    how: str = "independent tokens",
) -> str:
    """A sentence on the first of ``rows``, whose values fill ``words``, beside the largest by
    chance; "" without rows.
    """
    beside = "" if chance is None else f" ({how}: up to {decimal(chance, 2)} among all cells, 95 %)"
    return "".join(
        f" The largest is {decimal(row[column], 2)} times, {words.format(**row)}{beside}."
        for row in rows.head(1).to_dicts()
    )


def _tokens(named: NamedTrace) -> str:
    return f"n = {whole(named.trace.num_tokens)} tokens of {named.label}"


def _cells(named: NamedTrace, pairs: pl.DataFrame) -> str:
    """What the cells of a map of pairs need told: bins, and experts without a token."""
    binned = f"; more than {BINS} are binned, neighbours sharing a cell"
    blank = ". Blank rows and columns: experts that no token ran"
    idle = (pairs["expected"] == 0).any()
    return (binned if named.width > BINS else "") + (blank if idle else "")
