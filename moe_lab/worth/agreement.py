"""Do two traces of the same text hold the same routing, and if not, why.

``find_conventions`` looks for what makes equal routing look different: positions or layers numbered
from another place, expert ids from 1, permuted experts. ``routing_agreement`` compares two traces,
with such conventions undone. Shape letters: T tokens, K slots, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import over
from moe_lab.errors import AnalysisError, require
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.rows import EMPTY_SLOT, rows_of

Ints = NDArray[np.int64]
POSITIONS, LAYERS = range(-2, 3), range(-3, 4)
SAMPLE = 4096
"""Tokens of each layer from which conventions are found."""
GAIN = 0.02
"""A convention is named where it raises the share of equal slots by more than this."""


NEAR_TIES = 0.25
"""Largest ratio of the median margins of tokens that differ and that agree, for near ties."""


@dataclass(frozen=True)
class Conventions:
    """How the second trace numbers what the first one has.

    Attributes:
        positions: position in the second trace less that in the first.
        layers: the same of layers.
        offset: the same of expert ids, or None where experts are permuted.
        experts: layer of the first trace -> [E] id in the second of each expert of the first, -1
            where the sample has none; empty where ``offset`` says all.
        overlap, as_given: share of equal slots in tokens that the conventions were not found on,
            with them and without.
    """

    positions: int = 0
    layers: int = 0
    offset: int | None = 0
    experts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    overlap: float = 0.0
    as_given: float = 0.0

    def __str__(self) -> str:
        named = []
        if self.positions:
            named.append(f"its positions are {self.positions:+d} of the first's")
        if self.layers:
            named.append(f"its layers are {self.layers:+d} of the first's")
        if self.offset:
            named.append(f"its expert ids are {self.offset:+d} of the first's")
        if self.offset is None:
            named.append("its experts are permuted")
        if not named:
            return "The two traces number positions, layers and experts alike."
        shares = f"{self.as_given:.1%} of slots are equal as given, {self.overlap:.1%} so read"
        return f"In the second trace {', and '.join(named)}: {shares}."

    def to_second(self, layer: int, experts: int) -> Ints:
        """[E] ids in the second trace of a layer's experts in the first."""
        if self.offset is None:
            return np.asarray(self.experts[layer])
        return np.arange(experts) + self.offset


@dataclass(frozen=True)
class _Rows:
    """The rows of one layer in order of document and position."""

    trace: Trace
    layer: LayerMeta

    @cached_property
    def rows(self) -> dict[str, Any]:
        columns = list(self.trace.meta.routing_schema())
        frame = pl.concat(self.trace.batches(self.layer.layer, columns))
        return rows_of(self.layer, frame.sort("doc", "pos"))

    @cached_property
    def ids(self) -> Ints:
        """[T, K], -1 in unused slots."""
        ids = self.rows["experts"].astype(np.int64)
        return np.where(ids == EMPTY_SLOT, -1, ids)

    def keys(self, positions: int = 0) -> Ints:
        shifted = self.rows["pos"].astype(np.int64) - positions
        return self.rows["doc"].astype(np.int64) * 2**33 + shifted


def find_conventions(first: Trace, second: Trace) -> Conventions:
    """What the second trace numbers in another way than the first.

    Shifts of positions (up to 2) and layers (up to 3) are tried; for each, experts are matched by
    how often they are chosen for the same token. The matching is found on every other token of a
    sample and judged on the rest, so that noise matches nothing. A convention is kept only where it
    makes more than 2 in 100 slots equal that were not.

    Raises:
        AnalysisError: no token in both.
    """
    ours, theirs = (
        {layer.layer: _Rows(trace, layer) for layer in trace.meta.layers}
        for trace in (first, second)
    )
    tried = [
        (positions, layers, matched)
        for positions in POSITIONS
        for layers in LAYERS
        if (matched := _match(ours, theirs, positions, layers))
    ]
    require(
        tried, "two traces of the same documents", "no token in both", error=AnalysisError,
        field="traces",
    )  # fmt: skip

    def score(item: tuple[int, int, dict[int, _Match]]) -> float:
        positions, layers, matched = item
        gained = max(_mean(matched, "matched") - GAIN, _mean(matched, "alike"))
        return gained - GAIN * (bool(positions) + bool(layers))

    positions, layers, matched = max(tried, key=score)
    as_given = next((_mean(item, "alike") for p, n, item in tried if p == n == 0), 0.0)
    if _mean(matched, "matched") <= _mean(matched, "alike") + GAIN:
        return Conventions(positions, layers, 0, {}, _mean(matched, "alike"), as_given)
    shifts = {
        int(place) - expert
        for match in matched.values()
        for expert, place in enumerate(match.experts)
        if place >= 0
    }
    overlap = _mean(matched, "matched")
    if len(shifts) == 1:
        return Conventions(positions, layers, shifts.pop(), {}, overlap, as_given)
    experts = {layer: tuple(match.experts.tolist()) for layer, match in matched.items()}
    return Conventions(positions, layers, None, experts, overlap, as_given)


@dataclass(frozen=True)
class _Match:
    """Experts of one layer matched: [E] ids in the second trace, and the share of equal slots in
    other tokens with that matching and with the ids as they are.
    """

    experts: Ints
    matched: float
    alike: float


def _match(
    first: dict[int, _Rows], second: dict[int, _Rows], positions: int, layers: int
) -> dict[int, _Match]:
    found = {}
    for number, rows in first.items():
        other = second.get(number + layers)
        if other is None:
            continue
        _, a, b = np.intersect1d(
            rows.keys()[:SAMPLE], other.keys(positions), assume_unique=True, return_indices=True
        )
        if len(a) < 2:
            continue
        sizes = rows.layer.num_choices, other.layer.num_choices
        halves = [(rows.ids[a[half::2]], other.ids[b[half::2]]) for half in (0, 1)]
        counts = _pairs(*halves[0], sizes)
        experts = np.full(sizes[0], -1)
        left, right = linear_sum_assignment(-counts)
        seen = counts[left, right] > 0
        experts[left[seen]] = right[seen]
        shares = [
            _equal(*halves[1], names).sum() / max((halves[1][1] >= 0).sum(), 1)
            for names in (experts, np.arange(sizes[0]))
        ]
        found[number] = _Match(experts, *map(float, shares))
    return found


def _mean(matched: dict[int, _Match], name: str) -> float:
    return float(np.mean([getattr(match, name) for match in matched.values()]))


def _pairs(a_TK: Ints, b_TK: Ints, sizes: tuple[int, int]) -> Ints:
    """[E, E] tokens that chose an expert of the first and one of the second."""
    both = (a_TK[:, :, None] >= 0) & (b_TK[:, None, :] >= 0)
    cells = a_TK[:, :, None] * sizes[1] + b_TK[:, None, :]
    return np.bincount(cells[both], minlength=sizes[0] * sizes[1]).reshape(sizes)


def _equal(a_TK: Ints, b_TK: Ints, to_second_E: Ints) -> NDArray[np.bool_]:
    """[T, K] slots of the first whose expert the second chose too."""
    wanted_TK = np.where(a_TK >= 0, to_second_E[a_TK.clip(0)], -1)
    return ((wanted_TK[:, :, None] == b_TK[:, None, :]) & (wanted_TK >= 0)[:, :, None]).any(axis=2)


def routing_agreement(
    first: Trace,
    second: Trace,
    conventions: Conventions | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """How much of the routing of two traces of one text is equal, by layer.

    Args:
        conventions: of ``find_conventions``; None: compare as given.

    Returns:
        [layer, tokens, slots, lo, hi, chance, same_set, mass, margin_same, margin_differs, docs]:
        ``slots`` the share of the first trace's slots whose expert the second chose for the same
        token, with an interval from resampling documents, and ``chance`` what two independent
        routers of these loads would share; ``same_set`` the share of tokens with equal sets of
        experts; ``mass`` the share of the first trace's gate mass in equal slots; the medians of
        the first trace's margin over tokens with equal sets and with others. A difference at small
        margins is drift of near ties; null where a trace recorded no weights or margins. Shares of
        slots are null where no slot was used.

    Raises:
        AnalysisError: no layer or token in both.

    Example:
        >>> found = find_conventions(a, b)
        >>> print(found)
        >>> routing_agreement(a, b, found)
    """
    conventions = conventions or Conventions()
    resampling = Resampling(resamples, seed, level)
    rows = list(_layers(first, second, conventions, resampling))
    require(
        rows, "two traces of the same layers and documents", "no token in both",
        error=AnalysisError, field="traces",
    )  # fmt: skip
    return pl.DataFrame(rows, schema=_SCHEMA).with_columns(pl.col(pl.Float64).fill_nan(None))


_SCHEMA = {
    "layer": pl.Int64,
    "tokens": pl.Int64,
    **dict.fromkeys(
        ("slots", "lo", "hi", "chance", "same_set", "mass", "margin_same", "margin_differs"),
        pl.Float64,
    ),
    "docs": pl.Int64,
}


def drift_sentence(agreement: pl.DataFrame) -> str:
    """Whether what differs is near ties, as rounding makes it, in one sentence.

    Near ties: in every layer with other sets of experts, the median margin of their tokens is below
    a quarter of that of tokens with equal sets. The quarter is a convention of ours: any small
    change of the logits moves small margins first, so that the sentence tells small changes from
    large ones, not rounding from other small changes.

    Args:
        agreement: of ``routing_agreement``.
    """
    differs = agreement.filter(pl.col("same_set") < 1)
    if not differs.height:
        return "All tokens have equal sets of experts."
    tokens = agreement["tokens"].to_numpy()
    share = 1 - (agreement["same_set"].to_numpy() * tokens).sum() / tokens.sum()
    several = f"{share:.2%} of decisions have another set of experts"
    known = differs.drop_nulls(["margin_same", "margin_differs"])
    if known.height < differs.height:
        return f"{several}; their margins are not recorded, so that near ties are not told apart."
    ratios = known["margin_differs"].to_numpy() / known["margin_same"].to_numpy()
    worst = known["layer"][int(ratios.argmax())]
    if ratios.max() < NEAR_TIES:
        return (
            f"{several}, at near ties in every layer: their median margin is at most "
            f"{ratios.max():.2f} of that of the others (layer {worst}), as after rounding."
        )
    return (
        f"{several}, in layer {worst} at margins of {ratios.max():.2f} of the others' median: more "
        "than rounding differs."
    )


def _layers(
    first: Trace, second: Trace, conventions: Conventions, resampling: Resampling
) -> Iterator[dict[str, Any]]:
    for layer in sorted(first.meta.layers, key=lambda layer: layer.layer):
        other = second.meta.layer(layer.layer + conventions.layers)
        if other is None:
            continue
        rows, others = _Rows(first, layer), _Rows(second, other)
        _, a, b = np.intersect1d(
            rows.keys(), others.keys(conventions.positions), assume_unique=True, return_indices=True
        )
        if not len(a):
            continue
        names = conventions.to_second(layer.layer, layer.num_choices)
        ids_TK, other_TK = rows.ids[a], others.ids[b]
        equal_TK = _equal(ids_TK, other_TK, names)
        used_TK, used_T = ids_TK >= 0, (ids_TK >= 0).sum(axis=1)
        equal_T = equal_TK.sum(axis=1)
        same_T = (equal_T == used_T) & (used_T == (other_TK >= 0).sum(axis=1))
        _, doc = np.unique(rows.rows["doc"][a], return_inverse=True)
        above, below = (np.bincount(doc, values).astype(float) for values in (equal_T, used_T))

        def share(weights: Floats, above: Floats = above, below: Floats = below) -> Floats:
            return over(weights @ above, weights @ below)[:, None]

        low, high = resampling.interval(share, len(above))
        loads = [np.bincount(ids[ids >= 0], minlength=2**16) for ids in (ids_TK, other_TK)]
        met = names >= 0
        chance = (loads[0][: len(names)][met] * loads[1][names[met]]).sum() / len(a)
        weights = rows.rows.get("weights")
        mass_TK = None if weights is None else np.where(used_TK, weights[a].astype(float), 0)
        margin = rows.rows.get("margin", np.full(len(rows.ids), np.nan))[a].astype(float)
        margin = np.where(np.isfinite(margin), margin, np.nan)
        yield {
            "layer": layer.layer,
            "tokens": len(a),
            "slots": float(share(np.ones((1, len(above))))[0, 0]),
            "lo": low[0],
            "hi": high[0],
            "chance": float(over(chance, used_T.sum())),
            "same_set": float(same_T.mean()),
            "mass": None
            if mass_TK is None
            else float(over((mass_TK * equal_TK).sum(), mass_TK.sum())),
            "margin_same": _median(margin[same_T]),
            "margin_differs": _median(margin[~same_T]),
            "docs": len(above),
        }


def _median(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")
