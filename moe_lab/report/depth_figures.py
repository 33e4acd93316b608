"""Measures over depth: one point a layer with its interval, one series a thing compared, and chance
beside it.
"""

from collections import Counter

import polars as pl

from moe_lab.report.canvas import Canvas, drawn, error_bars, evenly, need, plain
from moe_lab.report.theme import DASHES, SERIES, SYMBOLS

MAX_SERIES = 8
"""More series than colours cannot be distinguished; the first ones are drawn."""
ASIDE = 0.06
"""Shift in layers between two series, so that their intervals do not overlap."""
MAX_PAIRS = 2
"""Pairs with one domain: eight pairs of one rare domain and another say one thing eight times."""
CHANCE = {"chance": "chance, even", "chance_by_load": "chance, by load"}


@drawn
def saturation(frame: pl.DataFrame, *, choice: str = "top-k") -> Canvas:
    """Overlap with the last checkpoint, a series per checkpoint; the dotted lines are chance and
    chance by load.

    Args:
        frame: as ``analysis.saturation``.
        choice: "top-k" or "top-1".
    """
    need(frame, "checkpoint", "place", "choice", *CHANCE)
    rows = frame.filter(pl.col("choice") == choice).sort("place", "layer")
    last = rows.filter(pl.col("place") == rows["place"].max())
    title = f"{choice} saturation"
    return _depth(rows, title, "saturation", "lo", "hi", group="checkpoint", lines=(last, CHANCE))


@drawn
def repetition(frame: pl.DataFrame, *, choice: str = "first") -> Canvas:
    """The rate at which a token repeats its predecessor's experts, with chance.

    Args:
        frame: as ``analysis.repetition``.
        choice: "first" or "either".
    """
    need(frame, "choice", *CHANCE)
    rows = frame.filter(pl.col("choice") == choice)
    words = "first choice repeated" if choice == "first" else "an expert repeated"
    return _depth(rows, f"share of tokens, {words}", "rate", "lo", "hi", lines=(rows, CHANCE))


@drawn
def router_entropy(frame: pl.DataFrame) -> Canvas:
    """Mean router entropy per layer; the dotted line is that of even scores.

    Args:
        frame: as ``analysis.router_entropy``.
    """
    need(frame, "entropy_max")
    even = frame, {"entropy_max": "even scores"}
    title = "router entropy, nats"
    return _depth(frame, title, "entropy", "entropy_lo", "entropy_hi", lines=even)


@drawn
def zero_compute(frame: pl.DataFrame) -> Canvas:
    """Share of slots of zero-compute experts, and polarisation beside what independent slots would
    give.

    Args:
        frame: as ``analysis.zero_compute``.
    """
    columns = {
        "zero ratio": ("zero_ratio", "lo", "hi"),
        "polarisation": ("polarisation", "polarisation_lo", "polarisation_hi"),
    }
    rows = _stacked(frame, columns, "binomial")
    independent = frame, {"binomial": "polarisation of independent slots"}
    return _depth(rows, "share", "value", "lo", "hi", group="series", lines=independent)


@drawn
def vocabulary_specialisation(frame: pl.DataFrame) -> Canvas:
    """The degree to which each layer follows the token id; the dotted line is that of a layer that
    ignores it.

    Args:
        frame: as ``analysis.vocabulary_specialisation``; with a column ``ids_of`` naming the kind
            of id, a series for each.
    """
    need(frame, "load_bound")
    group = "ids_of" if "ids_of" in frame.columns else None
    first = frame if group is None else frame.filter(pl.col("ids_of") == frame["ids_of"][0])
    title = "share run by the id's top expert"
    blind = first, {"load_bound": "blind to the id"}
    return _depth(frame, title, "token_weighted", group=group, lines=blind)


@drawn
def domain_divergence(frame: pl.DataFrame) -> Canvas:
    """Jensen-Shannon divergence of two domains over depth: the widest pairs, where there are many,
    and of these at most ``MAX_PAIRS`` with the same domain.

    Args:
        frame: as ``analysis.domain_divergence``.
    """
    need(frame, "domain_a", "domain_b", "bits", "shuffled_95")
    named = frame.with_columns(pair=pair_names())
    widest = widest_pairs(frame)
    rows = named.filter(pl.col("pair").is_in(widest)).sort(
        pl.col("pair").replace_strict(widest, range(len(widest)), default=None), "layer"
    )
    shuffled = named.group_by("layer", maintain_order=True).agg(pl.col("shuffled_95").mean())
    mean = shuffled, {"shuffled_95": "95 % point of shuffled documents, mean of pairs"}
    return _depth(rows, "JSD, bits", "bits", "lo", "hi", group="pair", lines=mean)


def pair_names() -> pl.Expr:
    """The name of each pair of domains."""
    return pl.concat_str(pl.col("domain_a", "domain_b").cast(pl.String), separator=" | ")


def widest_pairs(frame: pl.DataFrame) -> list[str]:
    """The pairs that are drawn, the widest mean over layers first: all where there are few."""
    means = frame.group_by("domain_a", "domain_b").agg(pl.col("bits").mean())
    means = means.with_columns(pair=pair_names()).sort("bits", "pair", descending=[True, False])
    if means.height <= MAX_SERIES:
        return means["pair"].to_list()
    drawn_of: Counter[object] = Counter()
    pairs = []
    for *domains, pair in means.select("domain_a", "domain_b", "pair").rows():
        if max(drawn_of[domain] for domain in domains) < MAX_PAIRS:
            drawn_of.update(domains)
            pairs.append(pair)
    return pairs[:MAX_SERIES]


@drawn
def compare(frame: pl.DataFrame) -> Canvas:
    """Change between two traces over depth: divergence of the loads and, on shared tokens, overlap
    of the choices.

    Args:
        frame: as ``analysis.compare``.
    """
    columns = {
        "JSD of the loads, bits": ("bits", "bits_lo", "bits_hi"),
        "overlap of the choices": ("overlap", "overlap_lo", "overlap_hi"),
    }
    rows = _stacked(frame, columns, "overlap_chance").drop_nulls("value")
    loads = frame, {"overlap_chance": "overlap by load alone"}
    title = "bits, or share of slots"
    return _depth(rows, title, "value", "lo", "hi", group="series", lines=loads)


@drawn
def load_interval(frame: pl.DataFrame) -> Canvas:
    """Load CV per layer with its interval over documents, a series per run; the dotted line is what
    a router without any preference shows in as many tokens (of the first run).

    Args:
        frame: as ``analysis.load_interval``; with a column ``run``, a series for each.
    """
    need(frame, "layer", "load_cv", "lo", "hi", "even")
    group = "run" if "run" in frame.columns else None
    first = frame if group is None else frame.filter(pl.col("run") == frame["run"][0])
    even = first, {"even": "a router without preference"}
    return _depth(frame, "load CV", "load_cv", "lo", "hi", group=group, lines=even)


@drawn
def load_over_windows(frame: pl.DataFrame) -> Canvas:
    """Balancedness (mean / max load) of consecutive windows, a series per layer (evenly spaced
    layers where there are many).

    Args:
        frame: as ``analysis.load_over_windows``.
    """
    need(frame, "layer", "window")
    layers = frame["layer"].unique().sort()
    drawn_layers = layers.gather(evenly(layers.len(), MAX_SERIES))
    rows = frame.filter(pl.col("layer").is_in(drawn_layers.implode())).with_columns(
        series=pl.format("layer {}", "layer")
    )
    title = "balancedness, mean ÷ max load"
    return _depth(rows, title, "balancedness", group="series", x="window")


def _stacked(
    frame: pl.DataFrame, columns: dict[str, tuple[str, str, str]], *others: str
) -> pl.DataFrame:
    """Several measures below each other: columns layer, value, lo, hi, and series (their name)."""
    need(frame, "layer", *others, *(name for names in columns.values() for name in names))
    return pl.concat(
        frame.select("layer", value=value, lo=lo, hi=hi, series=pl.lit(series))
        for series, (value, lo, hi) in columns.items()
    )


def _depth(
    frame: pl.DataFrame,
    title: str,
    value: str,
    lo: str = "",
    hi: str = "",
    *,
    group: str | None = None,
    x: str = "layer",
    lines: tuple[pl.DataFrame, dict[str, str]] | None = None,
) -> Canvas:
    """Column ``value`` over ``x`` with its interval, a series for each value of ``group``.

    ``lines`` are drawn without marks: a frame with a column layer, and the name of each of its
    columns to draw. A column of nulls is left out.
    """
    need(frame, x, value, *filter(None, (lo, hi)))
    figure = Canvas()
    parts = list(frame.group_by(group or pl.lit("measured"), maintain_order=True))[:MAX_SERIES]
    apart = float(frame[x].unique().sort().diff().min() or 1)  # type: ignore[arg-type]
    step = ASIDE * apart if lo and len(parts) > 1 else 0
    for index, ((name,), part) in enumerate(parts):
        colour = SERIES[index % len(SERIES)]
        figure.add_scatter(
            x=(part[x] + step * (index - (len(parts) - 1) / 2)).to_list(),
            y=part[value].to_list(),
            error_y=error_bars(part, value, lo, hi, thickness=1.5, color=colour)
            if lo and part[lo].null_count() < part.height
            else None,
            mode="lines+markers",
            line={"color": colour, "width": 1.5, "dash": DASHES[index % len(DASHES)]},
            marker={"color": colour, "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7},
            name=plain(name),
            customdata=part[x].to_list(),
            hovertemplate=f"{x} %{{customdata}}: %{{y:.4f}}",
        )
    places = frame[x].drop_nulls().to_list()
    figure.update_xaxes(title_text=x, dtick=1 if max(places) - min(places) <= 16 else None)
    figure.update_yaxes(title_text=title, rangemode="tozero")
    references, names = lines or (frame, {})
    for index, (column, name) in enumerate(names.items()):
        if references[column].null_count() < references.height:
            figure.add_scatter(
                x=references["layer"].to_list(),
                y=references[column].to_list(),
                mode="lines",
                line={"color": SERIES[-1], "dash": ("dot", "dashdot")[index % 2], "width": 1.5},
                name=name,
                hovertemplate=f"layer %{{x}}, {name}: %{{y:.4f}}<extra></extra>",
            )
    return figure.update_layout(height=360, hovermode="closest", showlegend=True)
