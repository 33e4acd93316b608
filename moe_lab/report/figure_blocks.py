"""The parts of a page that hold a figure: what is drawn, said, listed and written for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import polars as pl

from moe_lab.number_format import NOTHING, decimal, whole
from moe_lab.report.canvas import Canvas
from moe_lab.report.sources import NamedTrace

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_TABLE_ROWS = 240


@dataclass(frozen=True)
class Variant:
    """One figure of a plot. Below ``min_width`` pixels it scrolls sideways instead of shrinking;
    ``group`` is what the choice lists it under.
    """

    name: str
    canvas: Canvas
    min_width: int = 0
    group: str = ""

    @property
    def figure(self) -> go.Figure:
        return self.canvas.figure()


@dataclass(frozen=True)
class Plot:
    """One drawing area.

    ``summary`` says in words what it shows; several ``variants`` become a choice on the page;
    ``title`` stands above it.
    """

    summary: str
    variants: tuple[Variant, ...]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Texts, already formatted; ``numeric`` says which columns are set to the right, ``left_out``
    how many rows are not here. ``anchors`` are the ids of the rows, where they have any.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    left_out: int = 0
    anchors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Legend:
    """One entry of a legend that several plots share."""

    label: str
    colour: str
    dash: str


@dataclass(frozen=True)
class Block:
    """One figure of the page; ``name`` is also that of its function in ``figures`` and of its
    Parquet file. ``finding`` is what it shows in one sentence. Without ``plots`` the page shows the
    caption alone, as a sentence.
    """

    name: str
    caption: str
    plots: tuple[Plot, ...]
    data: pl.DataFrame
    table: Table
    legend: tuple[Legend, ...] = ()
    finding: str = ""

    def choices(self) -> list[tuple[str, list[tuple[int, Variant]]]]:
        """The numbered variants by the group that the choice lists them under."""
        groups: dict[str, list[tuple[int, Variant]]] = {}
        for index, variant in enumerate(self.plots[0].variants):
            groups.setdefault(variant.group, []).append((index, variant))
        return list(groups.items())


def one_plot(
    name: str,
    caption: str,
    summary: str,
    variants: Sequence[Variant] | Canvas,
    data: pl.DataFrame,
    table: Table | None = None,
    finding: str = "",
) -> Block:
    """A block with one plot of several variants or one canvas; its table is ``data`` by default.

    Variants that would show one colour are left out: the caption says what is so in their place.
    """
    if isinstance(variants, Canvas):
        variants = (Variant("", variants),)
    shown = tuple(variant for variant in variants if not variant.canvas.in_words)
    flat = [
        f"{variant.name}: {variant.canvas.in_words}" if variant.name else variant.canvas.in_words
        for variant in variants
        if variant.canvas.in_words
    ]
    if flat:
        caption = f"Not drawn: {'; '.join(flat)}. {caption}"
    plots = (Plot(summary, shown),) if shown else ()
    table = table_of(data) if table is None else table
    return Block(name, caption, plots, data, table, finding=finding)


def in_words(name: str, sentence: str, data: pl.DataFrame) -> Block:
    """A block whose figure would say nothing: ``sentence`` says what is so."""
    return Block(name, sentence, (), data, table_of(data))


def merged(blocks: Sequence[tuple[str, Block]]) -> Block:
    """One figure of several traces from (label, block) of each: the choice groups its variants by
    trace, the caption adds what differs, and table and data say whose a row is.
    """
    (_, first), *others = blocks
    if not others:
        return first
    sentences = [
        sentence for _, block in blocks for sentence in block.caption.rstrip(".").split(". ")
    ]
    variants = tuple(
        replace(variant, group=label)
        for label, block in blocks
        for plot in block.plots
        for variant in plot.variants
    )
    summary = " ".join(
        f"{label}: {plot.summary}" for label, block in blocks for plot in block.plots
    )
    table = replace(
        first.table,
        header=("trace", *first.table.header),
        rows=tuple((label, *row) for label, block in blocks for row in block.table.rows),
        numeric=(False, *first.table.numeric),
        left_out=sum(block.table.left_out for _, block in blocks),
    )
    data = [block.data.with_columns(trace=pl.lit(label)) for label, block in blocks]
    return replace(
        first,
        caption=". ".join(dict.fromkeys(sentences)) + ".",
        plots=(Plot(summary, variants),) if variants else (),
        data=pl.concat(data, how="diagonal_relaxed"),
        table=table,
    )


def by_heading(
    made: Iterable[tuple[str, str, Block | None]],
) -> list[tuple[str, Block]]:
    """Headings and figures of (heading, label of a trace, block), in the order of headings."""
    found: dict[str, list[tuple[str, Block]]] = {}
    for heading, label, block in made:
        if block is not None:
            found.setdefault(heading, []).append((label, block))
    return [(heading, merged(blocks)) for heading, blocks in found.items()]


def scrolling_width(experts: int) -> int:
    """The least width in pixels of a map with a column per expert; 0 where it fits any page."""
    return 2 * experts + 80 if experts > 128 else 0


def table_of(frame: pl.DataFrame, digits: int = 3) -> Table:
    """A frame as texts, cut at ``MAX_TABLE_ROWS``: floats with ``digits`` decimals, integers with
    thousands.
    """
    numeric = tuple(frame[name].dtype.is_numeric() for name in frame.columns)
    shown = frame.head(MAX_TABLE_ROWS)
    rows = tuple(tuple(_cell(value, digits) for value in row) for row in shown.rows())
    return Table(
        tuple(name.replace("_", " ") for name in frame.columns),
        rows,
        numeric,
        frame.height - shown.height,
    )


def representatives(traces: Sequence[NamedTrace]) -> list[NamedTrace]:
    """One trace per arm and ratio (the lowest seed), those with zero-compute experts first, then by
    falling number of experts.
    """
    first: dict[str, NamedTrace] = {}
    for named in traces:
        first.setdefault(named.group, named)
    return sorted(
        first.values(),
        key=lambda named: (
            max(layer.num_zero_experts for layer in named.trace.meta.layers),
            max(layer.num_experts for layer in named.trace.meta.layers),
        ),
        reverse=True,
    )


def looked_into(traces: Sequence[NamedTrace]) -> list[NamedTrace]:
    """The traces that a page looks into one by one: two bare ones, or the first representative."""
    bare = [named for named in traces if named.run is None]
    return bare[:2] if bare else representatives(traces)[:1]


def _cell(value: object, digits: int) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return decimal(value, digits)
    return whole(value) if isinstance(value, int) else str(value)
