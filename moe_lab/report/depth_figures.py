"""Measures over depth: one point a layer with its interval, one series a thing compared, and chance
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from moe_lab.report.canvas import Canvas, drawn, need, plain
from moe_lab.report.theme import DASHES, SERIES, SYMBOLS

MAX_SERIES = 8
"""More series than colours cannot be told apart; the first ones are drawn."""


@drawn
def saturation(frame: pl.DataFrame, *, choice: str = "top-k") -> Canvas:
    """Overlap with the last checkpoint, a series per checkpoint; the dotted lines are chance and
    chance by load.

    Args:
        frame: as ``analysis.saturation``.
        choice: "top-k" or "top-1".
    """
    need(
        frame,
        "layer",
        "checkpoint",
        "place",
        "choice",
        "saturation",
        "lo",
        "hi",
        "chance",
        "chance_by_load",
    )
    rows = frame.filter(pl.col("choice") == choice).sort("place", "layer")
    need(rows, "layer")
    made = _lines(rows, "saturation", ("lo", "hi"), "checkpoint", f"{choice} saturation")
    last = rows.filter(pl.col("place") == rows["place"].max())
    return _chance(made, last, {"chance": "chance, even", "chance_by_load": "chance, by load"})


@drawn
def repetition(frame: pl.DataFrame, *, choice: str = "first") -> Canvas:
    """How often a token repeats its predecessor's experts, with chance.

    Args:
        frame: as ``analysis.repetition``.
        choice: "first" or "either".
    """
    need(frame, "layer", "choice", "rate", "lo", "hi", "chance", "chance_by_load")
    rows = frame.filter(pl.col("choice") == choice)
    need(rows, "layer")
    words = "first choice repeated" if choice == "first" else "an expert repeated"
    made = _lines(rows, "rate", ("lo", "hi"), None, f"share of tokens, {words}")
    return _chance(made, rows, {"chance": "chance, even", "chance_by_load": "chance, by load"})


@drawn
def router_entropy(frame: pl.DataFrame) -> Canvas:
    """Mean router entropy per layer; the dotted line is that of even scores.

    Args:
        frame: as ``analysis.router_entropy``.
    """
    need(frame, "layer", "entropy", "entropy_lo", "entropy_hi", "entropy_max")
    made = _lines(frame, "entropy", ("entropy_lo", "entropy_hi"), None, "router entropy, nats")
    return _chance(made, frame, {"entropy_max": "even scores"})


@drawn
def zero_compute(frame: pl.DataFrame) -> Canvas:
    """Share of slots of zero-compute experts, and polarisation beside what independent slots would
    give.

    Args:
        frame: as ``analysis.zero_compute``.
    """
    need(
        frame,
        "layer",
        "zero_ratio",
        "lo",
        "hi",
        "polarisation",
        "polarisation_lo",
        "polarisation_hi",
        "binomial",
    )
    names = {"zero_ratio": ("lo", "hi"), "polarisation": ("polarisation_lo", "polarisation_hi")}
    parts = [
        frame.select(
            "layer", value=name, lo=ends[0], hi=ends[1], what=pl.lit(name.replace("_", " "))
        )
        for name, ends in names.items()
    ]
    made = _lines(pl.concat(parts), "value", ("lo", "hi"), "what", "share")
    return _chance(made, frame, {"binomial": "polarisation of independent slots"})


@drawn
def vocabulary_specialisation(frame: pl.DataFrame) -> Canvas:
    """How far each layer is a lookup of the token id; the dotted line is what a layer blind to it
    would show.

    Args:
        frame: as ``analysis.vocabulary_specialisation``; with a column ``ids_of`` naming the kind
            of id, a series for each.
    """
    need(frame, "layer", "token_weighted", "load_bound")
    group = "ids_of" if "ids_of" in frame.columns else None
    made = _lines(frame, "token_weighted", None, group, "share run by the id's top expert")
    first = frame if group is None else frame.filter(pl.col("ids_of") == frame["ids_of"][0])
    return _chance(made, first, {"load_bound": "blind to the id"})


@drawn
def domain_divergence(frame: pl.DataFrame) -> Canvas:
    """Jensen-Shannon divergence of every two domains over depth (the widest pairs, where there are
    many).

    Args:
        frame: as ``analysis.domain_divergence``.
    """
    need(frame, "layer", "domain_a", "domain_b", "bits", "lo", "hi", "shuffled")
    pair = pl.concat_str(
        pl.col("domain_a").cast(pl.String), pl.lit(" | "), pl.col("domain_b").cast(pl.String)
    )
    named = frame.with_columns(pair=pair)
    widest = (
        named.group_by("pair")
        .agg(pl.col("bits").mean())
        .sort("bits", descending=True)["pair"]
        .to_list()
    )
    rows = named.filter(pl.col("pair").is_in(widest[:MAX_SERIES]))
    made = _lines(
        rows.sort(pl.col("pair").replace_strict(widest, range(len(widest))), "layer"),
        "bits",
        ("lo", "hi"),
        "pair",
        "JSD, bits",
    )
    shuffled = named.group_by("layer", maintain_order=True).agg(pl.col("shuffled").mean())
    return _chance(made, shuffled, {"shuffled": "documents shuffled, mean of pairs"})


@drawn
def compare(frame: pl.DataFrame) -> Canvas:
    """Change between two traces over depth: divergence of the loads and, on shared tokens, overlap
    of the choices.

    Args:
        frame: as ``analysis.compare``.
    """
    need(
        frame,
        "layer",
        "bits",
        "bits_lo",
        "bits_hi",
        "overlap",
        "overlap_lo",
        "overlap_hi",
        "overlap_chance",
    )
    names = {"bits": "JSD of the loads, bits", "overlap": "overlap of the choices"}
    parts = [
        frame.select("layer", value=name, lo=f"{name}_lo", hi=f"{name}_hi", what=pl.lit(words))
        for name, words in names.items()
    ]
    made = _lines(
        pl.concat(parts).drop_nulls("value"),
        "value",
        ("lo", "hi"),
        "what",
        "bits, or share of slots",
    )
    return _chance(made, frame, {"overlap_chance": "overlap by load alone"})


@drawn
def load_over_windows(frame: pl.DataFrame) -> Canvas:
    """Balancedness (mean / max load) of consecutive windows, a series per layer (evenly spaced
    layers where there are many).

    Args:
        frame: as ``analysis.load_over_windows``.
    """
    need(frame, "layer", "window", "balancedness")
    layers = frame["layer"].unique().sort()
    shown = np.unique(
        np.linspace(0, layers.len() - 1, min(MAX_SERIES, layers.len())).round().astype(int)
    )
    rows = frame.filter(pl.col("layer").is_in(layers.gather(shown).implode())).with_columns(
        what=pl.format("layer {}", "layer")
    )
    made = _lines(rows, "balancedness", None, "what", "balancedness, mean ÷ max load", x="window")
    return made.update_xaxes(title_text="window")


def _lines(
    frame: pl.DataFrame,
    value: str,
    ends: tuple[str, str] | None,
    group: str | None,
    title: str,
    *,
    x: str = "layer",
) -> Canvas:
    made = Canvas()
    parts: Sequence[tuple[Any, pl.DataFrame]] = (
        [("measured", frame)]
        if group is None
        else [(key[0], part) for key, part in frame.group_by(group, maintain_order=True)]
    )
    for index, (name, part) in enumerate(parts[:MAX_SERIES]):
        colour = SERIES[index % len(SERIES)]
        made.add_scatter(
            x=part[x].to_list(),
            y=part[value].to_list(),
            error_y=_bars(part, value, ends, colour),
            mode="lines+markers",
            line={"color": colour, "width": 1.5, "dash": DASHES[index % len(DASHES)]},
            marker={"color": colour, "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7},
            name=plain(name),
            hovertemplate=f"{x} %{{x}}: %{{y:.4f}}",
        )
    span = [value for value in frame[x].to_list() if value is not None]
    made.update_xaxes(title_text=x, dtick=1 if max(span) - min(span) <= 16 else None)
    made.update_yaxes(title_text=title, rangemode="tozero")
    return made.update_layout(height=360, hovermode="closest", showlegend=True)


def _bars(
    part: pl.DataFrame, value: str, ends: tuple[str, str] | None, colour: str
) -> dict[str, Any] | None:
    if ends is None or part[ends[0]].null_count() == part.height:
        return None
    up, down = part[ends[1]] - part[value], part[value] - part[ends[0]]
    return {
        "type": "data",
        "symmetric": False,
        "array": up.to_list(),
        "arrayminus": down.to_list(),
        "thickness": 1.5,
        "color": colour,
    }


def _chance(made: Canvas, frame: pl.DataFrame, columns: dict[str, str]) -> Canvas:
    for index, (column, name) in enumerate(columns.items()):
        if frame[column].null_count() == frame.height:
            continue
        made.add_scatter(
            x=frame["layer"].to_list(),
            y=frame[column].to_list(),
            mode="lines",
            line={"color": SERIES[-1], "dash": ("dot", "dashdot")[index % 2], "width": 1.5},
            name=name,
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.4f}}<extra></extra>",
        )
    return made
