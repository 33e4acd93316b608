"""The section on ffn_count: where routers choose how many real experts a token gets, and a sentence
where they cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from moe_lab.number_format import decimal, listing, whole
from moe_lab.report import figures
from moe_lab.report.figure_blocks import Block, Plot, Variant, representatives, table_of
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
MAX_TRACES = 4
RESAMPLES = 1000


@dataclass(frozen=True)
class ComputeSection:
    """``fixed`` names the traces whose ffn_count is one number, in words; the blocks cover the
    others, of which ``first`` is one.
    """

    fixed: str
    blocks: tuple[Block, ...]
    first: NamedTrace | None


def compute_section(traces: tuple[NamedTrace, ...], frames: Frames) -> ComputeSection:
    """Spread and class profile of ffn_count for up to ``MAX_TRACES`` traces in which it varies."""
    counts = [(named, frames(_distinct_counts, named)) for named in representatives(traces)]
    varying = [named for named, values in counts if len(values) > 1]
    constant = [(named, values[0]) for named, values in counts if len(values) == 1]
    blocks = (
        (
            _spread_block(varying[:MAX_TRACES], frames),
            _profile_block(varying[:MAX_TRACES], frames),
        )
        if varying
        else ()
    )
    shown = tuple(block for block in blocks if block is not None)
    return ComputeSection(
        _fixed_sentence(constant, bool(varying)), shown, varying[0] if varying else None
    )


def _distinct_counts(named: NamedTrace) -> list[int]:
    frame = (
        named.trace.routing.group_by("layer")
        .agg(low=pl.col("ffn_count").min(), high=pl.col("ffn_count").max())
        .collect()
    )
    if (frame["low"] < frame["high"]).any():
        return [int(frame["low"].min()), int(frame["high"].max())]  # type: ignore[arg-type]
    return sorted(frame["low"].unique().to_list())[:1]


def _fixed_sentence(constant: list[tuple[NamedTrace, int]], others: bool) -> str:
    if not constant:
        return ""
    values = sorted({value for _, value in constant})
    parts = [
        f"{value} in {listing([named.group for named, own in constant if own == value])}"
        for value in values
    ]
    ending = "they have no spread to draw" if others else "so there is nothing to draw here"
    return (
        "With a fixed k every token runs the same number of real experts: ffn_count is "
        f"{'; '.join(parts)}; {ending}."
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
    from moe_lab.analysis import class_profile

    variants, profiles, summary = [], [], ""
    for named in traces:
        present = named.trace.tokens.collect_schema().names()
        for column, words in CLASS_COLUMNS.items():
            if column not in present:
                continue
            frame = frames(class_profile, named.trace, column, resamples=RESAMPLES).cast(
                {"class": pl.String}
            )
            if frame["class"].n_unique() < 2:  # nothing to compare
                continue
            summary = summary or _extremes(frame, words, named.label)
            variants.append(Variant(f"{words}, {named.label}", figures.class_profile.canvas(frame)))
            profiles.append(
                frame.select(
                    pl.lit(named.label).alias("run"), pl.lit(column).alias("column"), pl.all()
                )
            )
    if not profiles:
        return None
    data = pl.concat(profiles, how="diagonal_relaxed")
    documents = data.filter(pl.col("layer").is_null())["n_docs"].max()
    caption = (
        "Mean ffn_count of the tokens of each class (number of tokens in brackets); n = "
        f"{documents} documents at most. Bars are 95 % intervals from resampling whole documents "
        f"{RESAMPLES:,} times; the dotted line is the mean over all, small dots are layers. "
        "Adjusted means ask what a class would get if its tokens were as frequent, and stood as "
        "late in their document, as all tokens; the first token of a document is left out. A "
        "class can still differ in the very tokens it holds."
    )
    table = table_of(data.filter(pl.col("layer").is_null()).drop("layer"))
    return Block("class_profile", caption, (Plot(summary, tuple(variants)),), data, table)


def _extremes(frame: pl.DataFrame, words: str, label: str) -> str:
    total = frame.filter(pl.col("layer").is_null()).sort("mean")
    low, high = total.row(0, named=True), total.row(-1, named=True)
    return (
        f"Mean ffn_count by {words} in {label}, {total.height} classes: lowest {low['class']} "
        f"with {decimal(low['mean'])} ({decimal(low['lo'])} to {decimal(low['hi'])}), highest "
        f"{high['class']} with {decimal(high['mean'])} ({decimal(high['lo'])} to "
        f"{decimal(high['hi'])})."
    )


def _range(values: pl.Series) -> str:
    low, high = values.min(), values.max()
    if low is None:
        return "not defined"
    return decimal(low, 2) if low == high else f"{decimal(low, 2)} to {decimal(high, 2)}"  # type: ignore[arg-type]
