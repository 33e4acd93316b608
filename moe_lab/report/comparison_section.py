"""Two traces beside each other: what changed from the first to each of the others, over depth and
by expert.
"""

from collections.abc import Sequence

import polars as pl

from moe_lab.errors import AnalysisError
from moe_lab.number_format import decimal, listing, whole
from moe_lab.report import figures
from moe_lab.report.figure_blocks import Block, Variant, one_plot, scrolling_width, table_of
from moe_lab.report.frames import Frames
from moe_lab.report.sections import Section
from moe_lab.report.sources import NamedTrace

MOST_OTHERS = 3
RESAMPLES = 200
TABLE_ROWS = 60


def comparison_section(traces: Sequence[NamedTrace], frames: Frames) -> Section | None:
    """The first of several bare traces against up to ``MOST_OTHERS`` others; None for fewer than
    two.
    """
    bare = [named for named in traces if named.run is None and named.trace.num_tokens]
    if len(bare) < 2:
        return None
    first, *others = bare[: MOST_OTHERS + 1]
    changes, shifts, refused = [], [], []
    for other in others:
        try:
            shift = frames(_load_shift, first, other)
            change = frames(_compare, first, other) if _by_token(first, other) else None
        except AnalysisError:
            refused.append(other.label)
            continue
        shifts.append((other, shift))
        if change is not None:
            changes.append((other, change))
    before = (
        (
            f"{listing(refused)} has other layers or numbers of experts than {first.label}: no "
            "expert of one is an expert of the other. The sections below show each.",
        )
        if refused
        else ()
    )
    blocks = []
    if changes:
        blocks.append(("Change over depth", _change_block(first, changes)))
    if shifts:
        blocks.append(("Change of each expert's share", _shift_block(first, shifts)))
    return Section("compare", "Comparison", "What changed", tuple(blocks), before=before)


def _by_token(first: NamedTrace, other: NamedTrace) -> bool:
    return first.trace.meta.per_token and other.trace.meta.per_token


def _compare(first: NamedTrace, other: NamedTrace) -> pl.DataFrame:
    from moe_lab.analysis import compare

    return compare(first.trace, other.trace, resamples=RESAMPLES)


def _load_shift(first: NamedTrace, other: NamedTrace) -> pl.DataFrame:
    from moe_lab.analysis import load_shift

    return load_shift(first.trace, other.trace, resamples=RESAMPLES)


def _change_block(first: NamedTrace, changes: list[tuple[NamedTrace, pl.DataFrame]]) -> Block:
    variants = [
        Variant(f"{first.label} to {other.label}", figures.compare.canvas(frame))
        for other, frame in changes
    ]
    data = pl.concat(other.labelled(frame) for other, frame in changes)
    other, frame = changes[0]
    most = frame.sort("bits", descending=True).row(0, named=True)
    ends = decimal(most["bits"])
    if most["bits_lo"] is not None:
        ends += f" (95 % interval {decimal(most['bits_lo'])} to {decimal(most['bits_hi'])})"
    finding = (
        f"From {first.label} to {other.label}, layer {most['layer']} changed most: the JSD of its "
        f"loads is {ends} bits, and {decimal(100 * most['moved'], 1)} % of its slots went to other "
        "experts."
    )
    shared = most["shared"]
    texts = (
        f"The texts are the same: over {whole(shared)} shared tokens the choices are compared too; "
        "dotted is the overlap that the two loads alone would give."
        if shared
        else "The texts differ, so a change may come from the text as well as from the model."
    )
    caption = (
        f"n = {whole(most['tokens_a'])} tokens of {first.label}, {whole(most['tokens_b'])} of "
        f"{other.label}. Bars are 95 % intervals from resampling documents {RESAMPLES} times. "
        f"{texts}"
    )
    return one_plot("compare", caption, finding, variants, data, finding=finding)


def _shift_block(first: NamedTrace, shifts: list[tuple[NamedTrace, pl.DataFrame]]) -> Block:
    variants = [
        Variant(
            f"{first.label} to {other.label}",
            figures.load_shift.canvas(frame),
            scrolling_width(other.width),
        )
        for other, frame in shifts
    ]
    data = pl.concat(other.labelled(frame) for other, frame in shifts)
    by_size = data.sort(pl.col("shift").abs(), descending=True, nulls_last=True)
    most = by_size.row(0, named=True)
    finding = (
        f"Expert {most['expert']} of layer {most['layer']} changed most: from "
        f"{decimal(100 * (most['share_a'] or 0), 1)} to {decimal(100 * (most['share_b'] or 0), 1)} "
        f"% of the slots of its layer in {most['run']}."
    )
    caption = (
        f"n = {whole(first.trace.num_tokens)} tokens of {first.label} and "
        f"{listing([whole(other.trace.num_tokens) for other, _ in shifts])} after. The table has "
        f"the {TABLE_ROWS} largest changes of a share, with 95 % intervals from resampling "
        f"documents {RESAMPLES} times; the data have all."
    )
    table = table_of(by_size.head(TABLE_ROWS), 4)
    return one_plot("load_shift", caption, finding, variants, data, table, finding)
