"""The section on what experts are worth: the tables of ``moe-lab ablate``, drawn.

A folder is given, or lies in a run's folder. Nothing is measured here.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from moe_lab.errors import RunError, require
from moe_lab.number_format import whole
from moe_lab.report import figures
from moe_lab.report.figure_blocks import (
    Block,
    Variant,
    by_heading,
    one_plot,
    scrolling_width,
    table_of,
)
from moe_lab.report.sections import Section
from moe_lab.report.sources import Material
from moe_lab.sandbox import read_parquet
from moe_lab.worth.worth_files import FREE_SHARE, META, WORTH_FOLDER, read_meta

MOST = 2
"""Measurements on a page; of a sweep those of its first runs."""
WORTH = ("layer", "expert", "class", "d_loss", "lo", "hi", "used", "tokens", "docs")
AGREEMENT = ("layer", "score", "rho", "lo", "hi", "top", "top_chance", "experts", "docs")
CURVES = ("order", "share", "removed", "d_loss", "lo", "hi", "docs")
TOP_K = ("k", "by", "class", "d_loss", "lo", "hi", "docs")
PAIR = ("layer", "first", "second")
PAIRS = (*PAIR, "d_first", "d_second", "d_both", "excess", "lo", "hi", "docs")
EXCHANGES = (*PAIR, "d_loss_used", "used_lo", "used_hi", "kl", "used", "tokens", "docs")
TEXTS = ("by", "class", "score", "order")
"""Columns of text; all others hold numbers."""
MOST_PAIRS = 1000
"""Pairs that are drawn."""


def worth_section(material: Material, given: Path | None = None) -> Section | None:
    """The section on the measurement in the folder ``given``, or on those of the runs; None: no
    measurement.

    Raises:
        AnalysisError: no finished measurement in ``given``. RunError: its tables cannot be read.
    """
    folders = {given.name: given} if given else {}
    if given is None:
        found = {run.label: run.folder / WORTH_FOLDER for run in material.finished}
        folders = dict([pair for pair in found.items() if (pair[1] / META).is_file()][:MOST])
    if not folders:
        return None
    metas = {label: read_meta(folder) for label, folder in folders.items()}
    made = [
        (heading, label, block)
        for label, folder in folders.items()
        for heading, block in _blocks(folder, float(metas[label]["loss"]))
    ]
    several = len(folders) > 1
    said = [
        f"{label}: {sentence}" if several else str(sentence)
        for label, meta in metas.items()
        for sentence in (*meta["sentences"], *meta["notes"])
    ]
    return Section(
        "worth",
        "Worth",
        "What an expert is worth",
        tuple(by_heading(made)),
        before=tuple(said),
    )


def _blocks(folder: Path, loss: float) -> list[tuple[str, Block]]:
    worth = _table(folder, "worth", WORTH).filter(pl.col("class").is_null())
    agreement = _table(folder, "agreement", AGREEMENT)
    blocks = [("Loss without each expert", _map_block(worth))]
    if worth["lo"].null_count() < worth.height:
        blocks.append(("From the least needed", _sorted_block(worth, FREE_SHARE * loss)))
    if agreement["rho"].null_count() < agreement.height:
        blocks.append(("Which score says so?", _agreement_block(agreement)))
    if (folder / "curves.parquet").is_file():
        blocks.append(("Many experts removed", _curves_block(_table(folder, "curves", CURVES))))
    for name, heading, who in (
        ("top_k", "More and fewer experts", "every token has k experts"),
        (
            "top_k_alone",
            "More and fewer experts of one class",
            "the tokens of one class alone have k experts",
        ),
    ):
        if (folder / f"{name}.parquet").is_file():
            blocks.append((heading, _top_k_block(_table(folder, name, TOP_K), name, who)))
    for name, columns, block in (
        ("pairs", PAIRS, _pairs_block),
        ("exchanges", EXCHANGES, _exchanges_block),
    ):
        if (folder / f"{name}.parquet").is_file():
            blocks += block(_table(folder, name, columns))
    return blocks


def _table(folder: Path, name: str, columns: tuple[str, ...]) -> pl.DataFrame:
    path = folder / f"{name}.parquet"
    require(
        path.is_file(), f"the tables of moe-lab ablate in {folder}", f"no {path.name}",
        "measuring again in another folder", error=RunError, field="worth",
    )  # fmt: skip
    frame = read_parquet(path, RunError)
    missing = [column for column in columns if not _fits(frame, column)]
    require(
        frame.height and not missing, f"rows with columns {', '.join(columns)} in {path}",
        f"none of {missing[0]}" if missing else "no row", error=RunError, field="worth",
    )  # fmt: skip
    return frame


def _fits(frame: pl.DataFrame, column: str) -> bool:
    """Is the column there, and of its kind?"""
    kind = frame.schema.get(column)
    return kind is not None and (
        kind == pl.Null or (kind == pl.String if column in TEXTS else kind.is_numeric())
    )


def _facts(frame: pl.DataFrame) -> str:
    return f"{whole(frame['docs'].max())} documents"  # type: ignore[arg-type]


def _map_block(worth: pl.DataFrame) -> Block:
    caption = (
        f"n = {whole(worth['tokens'].max())} predicted tokens of {_facts(worth)}. Change of the "  # type: ignore[arg-type]
        "loss in nats per token, over all tokens, without one expert at a time; hover for its 95 % "
        "interval over documents. Cells without colour were not measured. The scale ends at the "
        "98th of 100 values. With many experts some intervals exclude zero by chance."
    )
    summary = "Change of the loss without each expert of each layer."
    width = scrolling_width(int(worth["expert"].max()) + 1)  # type: ignore[arg-type]
    variant = Variant("map", figures.expert_worth.canvas(worth), width)
    shown = worth.sort("d_loss", descending=True).select(
        "layer", "expert", "d_loss", "lo", "hi", "used", "tokens", "docs"
    )
    return one_plot("expert_worth", caption, summary, [variant], worth, table_of(shown, 4))


def _sorted_block(worth: pl.DataFrame, bound: float) -> Block:
    caption = (
        f"{whole(worth.height)} experts in the order of the change of the loss without them; the "
        f"band is the 95 % interval over {_facts(worth)}. Below the dashed line "
        f"({bound:.4f} nats/token, 0.1 % of the loss) an expert costs nothing. Their order is of "
        "the same documents as their values, so that both ends look more extreme than they are."
    )
    ordered = worth.sort("d_loss").select("layer", "expert", "d_loss", "lo", "hi")
    summary = "Change of the loss without each expert, from the least needed."
    canvas = figures.sorted_worth.canvas(worth, bound=bound)
    return one_plot("sorted_worth", caption, summary, canvas, ordered, table_of(ordered, 4))


def _agreement_block(agreement: pl.DataFrame) -> Block:
    known = agreement.drop_nulls("rho")
    by_layer = known.sort("layer", nulls_last=False).group_by("layer", maintain_order=True)
    drawn = {layer: figures.score_agreement.canvas(part) for (layer,), part in by_layer}
    variants = [
        Variant("all experts" if layer is None else f"layer {layer}", canvas)
        for layer, canvas in drawn.items()
    ]
    caption = (
        "Spearman's correlation of each score with the measured loss over the experts; bars are "
        f"95 % intervals over {_facts(agreement)}, which do not cover other experts. 1: the score "
        "orders experts as the loss does."
    )
    shown = agreement.filter(pl.col("layer").is_null()).sort("rho", descending=True)
    table = table_of(shown.select("score", "rho", "lo", "hi", "top", "top_chance", "experts"))
    summary = "Rank correlation of scores with the measured loss."
    return one_plot("score_agreement", caption, summary, variants, agreement, table)


def _curves_block(curves: pl.DataFrame) -> Block:
    caption = (
        "Change of the loss when the same share of the experts of each layer cannot be chosen. "
        "Orders are chosen on the documents at even places and judged on the "
        f"{_facts(curves)} at odd places; bars are 95 % intervals over them."
    )
    summary = "Loss against the share of experts removed, in the order of each score."
    canvas = figures.removal_curves.canvas(curves)
    return one_plot("removal_curves", caption, summary, canvas, curves, table_of(curves, 4))


def _top_k_block(top_k: pl.DataFrame, name: str, who: str) -> Block:
    columns = top_k["by"].drop_nulls().unique(maintain_order=True).to_list()
    variants = [
        Variant(
            "all tokens" if column is None else f"by {column}",
            figures.top_k_losses.canvas(
                top_k.filter(pl.col("by").is_null() | pl.col("by").eq_missing(column))
            ),
        )
        for column in (columns or [None])
    ]
    caption = (
        f"Change of the loss when {who} in all layers; bars are 95 % intervals "
        f"over {_facts(top_k)}. The model was trained with the k at which the change is 0."
    )
    summary = "Loss against the number of experts of every token."
    name = "top_k_losses" if name == "top_k" else name
    return one_plot(name, caption, summary, variants, top_k, table_of(top_k, 4))


def _pairs_block(pairs: pl.DataFrame) -> list[tuple[str, Block]]:
    shown = pairs.sort(pl.col("excess").abs(), descending=True, nulls_last=True)
    caption = (
        "Change of the loss without both experts of a pair, over the sum of the changes without "
        f"one; {_most(shown, 'excess')}. Above the line each of the two stands in for the other, "
        f"and removing many costs more than single losses say. Intervals of the excess over "
        f"{_facts(pairs)} are in the table."
    )
    summary = "Loss without both experts of pairs, over the sum of the losses without one."
    canvas = figures.pair_losses.canvas(shown.head(MOST_PAIRS))
    table = table_of(shown.select(PAIRS), 4)
    block = one_plot("pair_losses", caption, summary, canvas, pairs, table)
    return [("Two experts removed", block)]


def _exchanges_block(exchanges: pl.DataFrame) -> list[tuple[str, Block]]:
    if exchanges["d_loss_used"].null_count() == exchanges.height:  # no token used any of them
        return []
    shown = exchanges.sort("kl", nulls_last=True)
    caption = (
        "What it costs the tokens that used one of two experts to send them to the other, with "
        f"their gate weights; {_most(shown, 'divergence of predictions (kl)', 'smallest')}. Bars "
        f"are 95 % intervals over {_facts(exchanges)}. A pair is redundant where many tokens used "
        "it and both the cost and kl are near 0."
    )
    summary = "Cost of exchanging two experts, over the share of tokens that used one of them."
    canvas = figures.exchange_losses.canvas(shown.head(MOST_PAIRS))
    table = table_of(shown.select(EXCHANGES), 4)
    block = one_plot("exchange_losses", caption, summary, canvas, exchanges, table)
    return [("Two experts exchanged", block)]


def _most(frame: pl.DataFrame, what: str, order: str = "largest") -> str:
    """Which pairs are shown."""
    if frame.height <= MOST_PAIRS:
        return f"{whole(frame.height)} pairs, from the {order} {what}"
    return f"the {whole(MOST_PAIRS)} of {whole(frame.height)} pairs with the {order} {what}"
