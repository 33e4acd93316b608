"""Real validation text with a colour under each token: its ffn_count, or its router entropy where
ffn_count cannot vary.

Everything a reader can point at is prepared here; the page's script only looks it up. Slots travel
as base64 in the order token, layer, slot (experts as little-endian u16, weights as u8), because
lists of 94 layers x 12 slots would fill the page.
"""

from __future__ import annotations

import base64
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup

from moe_lab.errors import TraceError, require
from moe_lab.number_format import decimal, whole
from moe_lab.plain_text import plain
from moe_lab.report.frames import Frames
from moe_lab.report.sources import NamedTrace

MAX_TOKENS = 1500
DOCUMENTS = 3
SLOT_BUDGET = 200_000
"""Slots (token x layer x K) on the page; a model with many layers and slots shows fewer tokens."""
MIN_TOKENS = 120
TINTS = 7
NO_SLOT = 65_535
WEIGHT_STEPS = 255


@dataclass(frozen=True)
class Mode:
    """One way to colour: a tint per token ("0".."6", "-" for no value) and a legend of (tint,
    label).
    """

    name: str
    codes: str
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ShownToken:
    """``text`` as shown, ``label`` for readers who hear it (only where the text is blank), and
    whether it ends a line.
    """

    text: str
    label: str
    breaks: bool


@dataclass(frozen=True)
class ShownDocument:
    """The beginning of one document; ``start`` is the index of its first token on the page."""

    name: str
    start: int
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True)
class ColouredText:
    """Everything of this section: documents of tokens in page order, the modes, the lookup table of
    the script, and the data.
    """

    label: str
    fixed: bool
    documents: tuple[ShownDocument, ...]
    modes: tuple[Mode, ...]
    lookup: dict[str, Any]
    data: pl.DataFrame

    @property
    def introduction(self) -> str:
        """What the colour is."""
        if self.fixed:
            return "ffn_count is constant here, so the colour is the router entropy."
        return "The colour is ffn_count, the number of real experts that ran for the token."

    def for_script(self) -> dict[str, Any]:
        return {"lookup": self.lookup, "modes": [asdict(mode) for mode in self.modes]}


def coloured_text(named: NamedTrace, frames: Frames, *, fixed: bool) -> ColouredText | None:
    """The shown part of a trace, or None where its token table has no text.

    Args:
        named: the trace.
        fixed: whether ffn_count is the same for every token; then entropy gives the colour.
    """
    tokens = frames(_choose, named)
    if tokens is None:
        return None
    routing = frames(_routing_of, named, tokens)
    layers = routing["layer"].unique().sort().to_list()
    require(
        routing.height == tokens.height * len(layers),
        f"every token of {named.label} in every layer",
        f"{routing.height} rows for {tokens.height} tokens in {len(layers)} layers",
        "opening the trace and its check()",
        error=TraceError,
    )
    column, words = ("entropy", "router entropy in nats") if fixed else ("ffn_count", "ffn_count")
    values = routing[column].cast(pl.Float64).to_numpy().reshape(tokens.height, len(layers))
    modes = [
        _mode(
            f"{words}, mean over {len(layers)} layers" if len(layers) > 1 else words,
            values.mean(axis=1),
        )
    ]
    if len(layers) > 1:
        modes += [
            _mode(f"{words}, layer {layer}", values[:, index]) for index, layer in enumerate(layers)
        ]
    modes.append(
        _mode("loss in nats", tokens["loss"].cast(pl.Float64).fill_null(np.nan).to_numpy())
    )
    documents = tuple(map(_document, tokens.partition_by("doc", maintain_order=True)))
    lookup = _lookup(named, tokens, routing, layers)
    keep = ["layer", "doc", "pos", "ffn_count", "zero_count", "entropy", "experts", "weights"]
    data = tokens.drop("index").join(
        routing.select(keep), on=["doc", "pos"], maintain_order="left_right"
    )
    return ColouredText(named.label, fixed, documents, tuple(modes), lookup, data)


def _routing_of(named: NamedTrace, tokens: pl.DataFrame) -> pl.DataFrame:
    """Every layer's routing of ``tokens``, in their order."""
    shown = tokens.lazy().select("doc", "pos", "index")
    return named.trace.routing.join(shown, on=["doc", "pos"]).sort("index", "layer").collect()


def _document(tokens: pl.DataFrame) -> ShownDocument:
    name = f"Document {tokens['doc'][0]}"
    if "document" in tokens.columns and tokens["document"][0]:
        name += f", {plain(tokens['document'][0])}"
    name += f", tokens {tokens['pos'].min()} to {tokens['pos'].max()}"
    return ShownDocument(name, int(tokens["index"][0]), tuple(map(show, tokens["text"].to_list())))


def show(text: str) -> ShownToken:
    """A token's text with control and direction characters replaced by visible signs, so that no
    text can rearrange the page.
    """
    shown = "".join(map(_visible, text))
    return ShownToken(shown, _spoken(text) if not text.strip() else "", "\n" in text)


_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of control, format, surrogate, private and unassigned characters, and of line
and paragraph separators.
"""


def _visible(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _INVISIBLE:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"[U+{code:04X}]"


def _spoken(text: str) -> str:
    names = {" ": "space", "\n": "newline", "\t": "tab"}
    runs: list[tuple[str, int]] = []
    for character in text:
        name = names.get(character, "blank")
        runs = (
            [*runs[:-1], (name, runs[-1][1] + 1)]
            if runs and runs[-1][0] == name
            else [*runs, (name, 1)]
        )
    return " ".join(name if count == 1 else f"{count} {name}s" for name, count in runs)


def _choose(named: NamedTrace) -> pl.DataFrame | None:
    """The leading recorded tokens of documents at evenly spaced places: chosen by position, never
    by what they show.
    """
    names = named.trace.tokens.collect_schema().names()
    if "text" not in names:
        return None
    slots = sum(layer.top_k for layer in named.trace.meta.layers)
    total = max(MIN_TOKENS, min(MAX_TOKENS, SLOT_BUDGET // slots))
    each = total // DOCUMENTS
    sizes = named.trace.tokens.group_by("doc").agg(n=pl.len()).sort("doc").collect()
    enough = sizes.filter(pl.col("n") >= min(each, int(np.median(sizes["n"].to_numpy()))))[
        "doc"
    ].to_list()
    if not enough:
        return None
    chosen = [
        enough[index]
        for index in np.unique(np.linspace(0, len(enough) - 1, DOCUMENTS).round().astype(int))
    ]
    extra = [name for name in ("document", "lexer", "subword", "freq_band") if name in names]
    tokens = (
        named.trace.tokens.filter(pl.col("doc").is_in(chosen))
        .select("doc", "pos", "token_id", "text", "loss", *extra)
        .collect()
    )
    # A sampled trace has gaps; text reads on within one run of positions only.
    gap = pl.col("pos").cast(pl.Int64) - pl.int_range(pl.len())
    tokens = tokens.sort("doc", "pos").filter((gap == gap.first()).over("doc"))
    tokens = (
        tokens.group_by("doc", maintain_order=True)
        .head(each)
        .filter(pl.col("text").str.len_chars() > 0)
    )
    return tokens.with_row_index("index") if tokens.height else None


def _mode(name: str, values: np.ndarray) -> Mode:
    codes, labels = tint(values)
    counts = {code: codes.count(code) for code in labels}
    return Mode(
        name,
        codes,
        tuple((code, f"{label} ({whole(counts[code])})") for code, label in labels.items()),
    )


def tint(values: np.ndarray) -> tuple[str, dict[str, str]]:
    """Bin values into at most ``TINTS`` tints.

    Returns:
        One character per value, and the label of each tint that occurs, from few to many: the least
        and the largest value under it. At most ``TINTS`` consecutive integers get a tint each;
        otherwise the tints divide the range between the 1st and the 99th percentile evenly. NaN is
        "-", "no value".
    """
    known = values[np.isfinite(values)]
    if not known.size:
        return "-" * len(values), {"-": "no value"}
    if np.all(known == known.round()) and np.ptp(known) < TINTS:
        low, high = known.min(), max(known.max(), known.min() + 1)
        places = ((values - low) / (high - low) * (TINTS - 1)).round()
    else:
        low, high = np.percentile(known, [1, 99])
        # Means over layers fall exactly on the edges: the small shift keeps rounding from deciding
        # where they go.
        places = np.floor((values - low) / max(high - low, 1e-9) * TINTS + 1e-6)
    places = np.clip(places, 0, TINTS - 1)
    codes = "".join(str(int(place)) if np.isfinite(place) else "-" for place in places)
    decimals = 0 if np.all(known == known.round()) else 2
    labels = {
        str(place): _extent(values[places == place], decimals)
        for place in range(TINTS)
        if (places == place).any()
    }
    return codes, labels | ({"-": "no value"} if "-" in codes else {})


def _extent(values: np.ndarray, decimals: int) -> str:
    low, high = decimal(values.min(), decimals), decimal(values.max(), decimals)
    return low if low == high else f"{low} to {high}"


def _lookup(
    named: NamedTrace, tokens: pl.DataFrame, routing: pl.DataFrame, layers: list[int]
) -> dict[str, Any]:
    slots = max(layer.top_k for layer in named.trace.meta.layers)
    first_zero = [
        layer.num_experts
        for number in layers
        if (layer := named.trace.meta.layer(number)) is not None
    ]
    weights = _padded(routing["weights"].cast(pl.List(pl.Float32)), slots, 0.0)
    largest = float(weights.max(initial=0.0)) or 1.0
    experts = _padded(routing["experts"].cast(pl.List(pl.Int64)), slots, NO_SLOT)
    return {
        "layers": layers,
        "slots": slots,
        "firstZero": first_zero,
        "token": tokens["token_id"].to_list(),
        "doc": tokens["doc"].to_list(),
        "pos": tokens["pos"].to_list(),
        "loss": [None if loss is None else round(loss, 3) for loss in tokens["loss"].to_list()],
        "kind": [
            " · ".join(str(item) for item in row if item is not None) for row in _classes(tokens)
        ],
        "experts": _base64(experts, "<u2"),
        "weights": _base64(np.clip(weights / largest, 0, 1) * WEIGHT_STEPS, "u1"),
        "largestWeight": largest,
    }


def _classes(tokens: pl.DataFrame) -> list[tuple[Any, ...]]:
    names = [name for name in ("lexer", "subword", "freq_band") if name in tokens.columns]
    return tokens.select(names).rows() if names else [()] * tokens.height


def _padded(lists: pl.Series, width: int, fill: float) -> np.ndarray:
    """[rows, width] from a column of shorter lists."""
    lengths = lists.list.len().to_numpy()
    padded = np.full((len(lists), width), fill)
    padded[np.arange(width)[None, :] < lengths[:, None]] = lists.explode().drop_nulls().to_numpy()
    return padded


def _base64(values: np.ndarray, dtype: str) -> str:
    return Markup(base64.b64encode(values.round().astype(dtype).tobytes()).decode("ascii"))  # kept
