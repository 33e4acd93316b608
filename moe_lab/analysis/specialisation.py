"""Specialisation of experts: how far routing differs between domains of text, and how far it
follows from the token id alone.

Definitions of OLMoE (arXiv 2409.02060, section 5): with N_D tokens of domain D of which N_{i,D} ran
expert i, the domain specialisation of i is N_{i,D} / N_D (at random K / E); with N_x tokens of id x
of which N_{i,x} ran expert i, its vocabulary specialisation is N_{i,x} / N_x.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, groupby
from operator import itemgetter
from typing import Protocol

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from moe_lab.analysis.aligned_rows import MAX_CELLS, by_layer, chosen_layers
from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import (
    Documents,
    documents,
    nulls,
    over,
    unit_sizes,
)
from moe_lab.analysis.requirements import of_tokens
from moe_lab.analysis.slot_counts import group_counts, unit_counts
from moe_lab.analysis.token_groups import Grouping, grouping
from moe_lab.config import require
from moe_lab.errors import AnalysisError
from moe_lab.measures import jensen_shannon_bits
from moe_lab.trace import LayerMeta, Trace

MAX_DOMAINS = 256
"""A column with more values than this is no domain."""
MAX_PERMUTATIONS = 200


def domain_specialisation(
    trace: Trace,
    column: str = "domain",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """Share of each domain's tokens that ran each expert.

    Args:
        trace: a trace with a token table.
        column: the token column that names the domain (or any class); tokens where it is null are
            left out.
        resamples, seed, level: of the percentile interval from resampling documents; 0 resamples
            leave it out.

    Returns:
        [layer, domain, expert, is_zero, count, tokens, specialisation, lo, hi, at_random]:
        ``specialisation = count / tokens`` of the domain; ``at_random`` is the expert's share of
        all counted tokens, which every domain would show if it played no part. Ends of intervals
        are null for a domain of fewer than 5 documents.
    """
    counted = domain_counts(trace, column)
    measure = Specialisation(counted, resamples, seed, level)
    counted.read_into(measure)
    return measure.frame


def domain_divergence(
    trace: Trace,
    column: str = "domain",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """Jensen-Shannon divergence in bits between the expert loads (all slots) of every two domains.

    Returns:
        [layer, domain_a, domain_b, bits, lo, hi, shuffled, shuffled_95]: ``bits`` is 0 where the
        two domains load the experts alike, 1 where they share none, null where a domain used no
        slot. Samples differ even where domains do not: ``shuffled`` is the mean over up to
        ``MAX_PERMUTATIONS``
        permutations of the two names over the documents of both, ``shuffled_95`` their 95 % point,
        which ``bits`` must exceed to say that domains differ. Finite samples push the
        resampled values up as they push ``bits``, so the interval is the reflected one, ``2 bits -
        q``, cut at 0 and 1. ``lo`` and ``hi`` are null with fewer than 5 documents in a domain,
        ``shuffled`` with fewer than 2, and where a document (or a drawn bundle of them, see
        ``analysis.document_sums``) mixes domains.
    """
    counted = domain_counts(trace, column)
    measure = Divergence(counted, resamples, seed, level)
    counted.read_into(measure)
    return measure.frame


Deals = Callable[[], Iterable[NDArray[np.bool_]]]


class Measure(Protocol):
    """What is made of the counts of each layer, one layer after another."""

    def add(self, layer: LayerMeta, counts_UGE: NDArray) -> None: ...


@dataclass(frozen=True)
class DomainCounts:
    """The domains of a trace; ``read_into`` reads its slots once for several measures.

    Attributes:
        groups: the domains.
        docs: the documents, in the units that are drawn.
        sizes: [U, G] tokens of each unit in each domain.
    """

    trace: Trace
    groups: Grouping
    docs: Documents
    sizes: NDArray[np.int64]

    def read_into(self, *measures: Measure) -> None:
        """Add the counts [U, G, E] of every layer to each of ``measures``."""
        layers = by_layer(self.trace)
        tables = unit_counts(self.trace, layers, self.docs, self.groups)
        for layer, counts_UGE in zip(layers, tables, strict=True):
            for measure in measures:
                measure.add(layer, counts_UGE)


def domain_counts(trace: Trace, column: str) -> DomainCounts:
    """The domains that a token column names. Raises ``AnalysisError`` for a column of more than
    ``MAX_DOMAINS`` values.
    """
    groups = _domains(trace, column)
    docs = documents(trace, len(groups) * max(layer.num_choices for layer in trace.meta.layers))
    return DomainCounts(trace, groups, docs, unit_sizes(trace, docs, groups))


class Specialisation:
    """The measure of ``domain_specialisation``."""

    def __init__(self, counted: DomainCounts, resamples: int, seed: int, level: float) -> None:
        self._groups, self._sizes_UG = counted.groups, counted.sizes
        self._resampling = Resampling(resamples, seed, level) if resamples else None
        self._frames: list[pl.DataFrame] = []

    @property
    def frame(self) -> pl.DataFrame:
        return nulls(pl.concat(self._frames))

    def add(self, layer: LayerMeta, counts_UGE: NDArray) -> None:
        sizes_UG = self._sizes_UG
        sizes_G = sizes_UG.sum(axis=0)
        counts_GE = counts_UGE.sum(axis=0, dtype=np.int64)
        shares = over(counts_GE, sizes_G[:, None])
        low, high = np.full_like(shares, np.nan), np.full_like(shares, np.nan)
        if self._resampling is not None:
            low, high = self._resampling.interval(
                lambda weights: _shares(weights, counts_UGE, sizes_UG),
                len(sizes_UG),
                (sizes_UG > 0).sum(axis=0)[:, None],
            )
        at_random = over(counts_GE.sum(axis=0), sizes_G.sum())
        self._frames.append(
            _per_expert(layer, self._groups.values, counts_GE).with_columns(
                tokens=np.repeat(sizes_G, layer.num_choices),
                specialisation=shares.ravel(),
                lo=low.ravel(),
                hi=high.ravel(),
                at_random=np.tile(at_random, len(sizes_G)),
            )
        )


class Divergence:
    """The measure of ``domain_divergence``."""

    def __init__(self, counted: DomainCounts, resamples: int, seed: int, level: float) -> None:
        groups, self._here_UG = counted.groups, counted.sizes > 0
        pairs = list(combinations(range(len(groups)), 2))
        self._pairs_P2 = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self._names = {
            "domain_a": groups.values.gather(self._pairs_P2[:, 0]),
            "domain_b": groups.values.gather(self._pairs_P2[:, 1]),
        }
        self._resampling = Resampling(resamples, seed, level) if resamples else None
        self._deals = None if self._resampling is None else self._dealt(self._resampling)
        self._frames: list[pl.DataFrame] = []

    def _dealt(self, resampling: Resampling) -> Deals:
        """The same permutations for all layers; too many to hold are drawn again for each."""
        draw = partial(_deals, self._here_UG, self._pairs_P2, resampling)
        if self._here_UG.size * MAX_PERMUTATIONS > MAX_CELLS:
            return draw
        return cache(lambda: list(draw()))

    @property
    def frame(self) -> pl.DataFrame:
        return nulls(pl.concat(self._frames))

    def add(self, layer: LayerMeta, counts_UGE: NDArray) -> None:
        found_5P = _divergences(
            counts_UGE, self._here_UG, self._pairs_P2, self._resampling, self._deals
        )
        single_P = (self._here_UG.sum(axis=0) < 2)[self._pairs_P2].any(axis=1)
        found_5P[3:, single_P] = np.nan
        values = dict(zip(("bits", "lo", "hi", "shuffled", "shuffled_95"), found_5P, strict=True))
        self._frames.append(
            pl.DataFrame({**self._names, **values}).select(
                pl.lit(layer.layer, pl.UInt32).alias("layer"), pl.all()
            )
        )


@of_tokens
def vocabulary_specialisation(
    trace: Trace, column: str = "token_id", min_count: int = 1
) -> pl.DataFrame:
    """The degree to which each layer routes by token id alone: for each id, the largest share of
    its tokens that one expert runs.

    Args:
        trace: a trace with a token table.
        column: the token column that holds the id: ``token_id`` (input), ``true_id`` (the id that
            follows, derived where the trace has no such column), or a recorded column such as the
            id that the model predicted.
        min_count: leave out ids with fewer tokens. An id seen once always has a share of 1, so rare
            ids inflate ``mean``.

    Returns:
        [layer, ids, tokens, mean, token_weighted, load_bound]: over the ids, plain ``mean`` and
            mean weighted by their tokens;
        ``load_bound`` is the share of all these tokens that the busiest expert runs, which a layer
        blind to the id would show for every frequent id. Zero-compute experts count as experts.
    """
    require(min_count >= 1, "a min_count of at least 1", min_count)
    groups = grouping(trace, column, "id", min_count)
    tokens = int(groups.sizes.sum())
    rows = []
    for layer, blocks in _layer_blocks(trace, by_layer(trace), groups):
        highest, load_E = [], np.zeros(layer.num_choices, dtype=np.int64)
        for _, _, table_GE in blocks:
            highest.append(table_GE.max(axis=1))
            load_E += table_GE.sum(axis=0, dtype=np.int64)
        mean, weighted = vocabulary_shares(np.concatenate(highest), groups.sizes)
        bound = int(load_E.max()) / tokens if load_E.any() else None
        rows.append((layer.layer, len(groups), tokens, mean, weighted, bound))
    schema = {"layer": pl.UInt32, "ids": pl.Int64, "tokens": pl.Int64}
    schema |= dict.fromkeys(("mean", "token_weighted", "load_bound"), pl.Float64)
    return nulls(pl.DataFrame(rows, schema=schema, orient="row"))


@of_tokens
def expert_vocabulary(
    trace: Trace,
    column: str = "token_id",
    *,
    layers: list[int] | None = None,
    top: int = 10,
    min_count: int = 10,
) -> pl.DataFrame:
    """The ids that each expert runs most exclusively.

    Args:
        trace: a trace with a token table.
        column: as in ``vocabulary_specialisation``.
        layers: layers to look at; all by default.
        top: ids per expert.
        min_count: leave out ids with fewer tokens.

    Returns:
        [layer, expert, is_zero, id, count, tokens, share] sorted by layer, expert and falling
        ``share = count / tokens`` (then tokens); fewer than ``top`` rows for an expert that ran
        fewer ids.
    """
    require(min_count >= 1 and top >= 1, "a min_count and a top of at least 1", (min_count, top))
    groups = grouping(trace, column, "id", min_count)
    frames = []
    for layer, blocks in _layer_blocks(trace, chosen_layers(trace, layers), groups):
        best: list[pl.DataFrame] = []
        for _, first, table_GE in blocks:
            places = slice(first, first + len(table_GE))
            found = _best_ids(layer, table_GE, groups.values[places], groups.sizes[places], top)
            found = pl.concat([*best, found]).sort(
                "expert", "share", "tokens", "id", descending=[False, True, True, False]
            )
            best = [found.group_by("expert", maintain_order=True).head(top)]
        frames.append(
            best[0].select(
                pl.lit(layer.layer, pl.UInt32).alias("layer"),
                "expert",
                "is_zero",
                "id",
                "count",
                "tokens",
                "share",
            )
        )
    return pl.concat(frames)


def vocabulary_shares(highest: ArrayLike, tokens: ArrayLike) -> tuple[float, float]:
    """Mean over ids, and over tokens, of ``highest / tokens``.

    Args:
        highest: [V] the most tokens of each id that one expert ran.
        tokens: [V] tokens of each id, above 0.
    """
    top: NDArray[np.float64] = np.asarray(highest, dtype=np.float64)
    size: NDArray[np.float64] = np.asarray(tokens, dtype=np.float64)
    return (
        (float((top / size).mean()), float(top.sum() / size.sum()))
        if len(size)
        else (np.nan, np.nan)
    )


def _layer_blocks(
    trace: Trace, layers: Sequence[LayerMeta], groups: Grouping
) -> Iterator[tuple[LayerMeta, Iterator[tuple[LayerMeta, int, NDArray]]]]:
    return groupby(group_counts(trace, layers, groups), key=itemgetter(0))


def _domains(trace: Trace, column: str) -> Grouping:
    groups = grouping(trace, column, "domain")
    require(
        len(groups) <= MAX_DOMAINS,
        f"a column of at most {MAX_DOMAINS} domains",
        f"{len(groups)} values of {column!r}",
        "another column",
        error=AnalysisError,
        field="column",
    )
    return groups


def _per_expert(layer: LayerMeta, values: pl.Series, counts_GE: NDArray[np.int64]) -> pl.DataFrame:
    experts, groups = np.arange(layer.num_choices), len(values)
    return pl.DataFrame(
        {
            "layer": pl.repeat(layer.layer, counts_GE.size, dtype=pl.UInt32, eager=True),
            "domain": values.gather(np.repeat(np.arange(groups), layer.num_choices)),
            "expert": np.tile(experts.astype(np.uint16), groups),
            "is_zero": np.tile(experts >= layer.num_experts, groups),
            "count": counts_GE.ravel(),
        }
    )


def _shares(weights_BU: Floats, counts_UGE: NDArray, sizes_UG: NDArray) -> Floats:
    units, groups, experts = counts_UGE.shape
    counts_BGE = (weights_BU @ counts_UGE.reshape(units, groups * experts)).reshape(
        len(weights_BU), groups, experts
    )
    return over(counts_BGE, (weights_BU @ sizes_UG)[:, :, None])


def _divergences(
    counts_UGE: NDArray[np.uint32],
    here_UG: NDArray[np.bool_],
    pairs_P2: NDArray[np.int64],
    resampling: Resampling | None,
    deals: Deals | None = None,
) -> Floats:
    """[5, P]: bits, lo, hi, shuffled and its 95 % point, of each pair of domains.

    ``deals`` returns what ``_deals`` does.
    """
    units, groups, experts = counts_UGE.shape
    flat = counts_UGE.reshape(units, groups * experts).astype(np.float64)

    def bits(weights_BU: Floats) -> Floats:
        loads_BGE = (weights_BU @ flat).reshape(len(weights_BU), groups, experts)
        return np.stack(
            [jensen_shannon_bits(loads_BGE[:, a], loads_BGE[:, b]) for a, b in pairs_P2], axis=1
        )

    found = np.full((5, len(pairs_P2)), np.nan)
    if not len(pairs_P2):
        return found
    found[0] = bits(np.ones((1, units)))[0]
    if resampling is not None:
        fewest_P = here_UG.sum(axis=0)[pairs_P2].min(axis=1)
        low, high = resampling.interval(bits, units, fewest_P)
        found[1], found[2] = np.maximum(2 * found[0] - high, 0), np.minimum(2 * found[0] - low, 1)
        if (here_UG.sum(axis=1) <= 1).all():
            dealt = deals() if deals else _deals(here_UG, pairs_P2, resampling)
            found[3:] = _shuffled(counts_UGE.sum(axis=1), here_UG, pairs_P2, dealt)
    return found


def _shuffled(
    load_UE: NDArray,
    here_UG: NDArray[np.bool_],
    pairs_P2: NDArray[np.int64],
    deals: Iterable[NDArray[np.bool_]],
) -> Floats:
    """[2, P] mean and 95 % point of the divergence of each pair when names are permuted over the
    documents of both.
    """
    means = []
    for (a, b), names_BU in zip(pairs_P2, deals, strict=True):
        if not names_BU.size:
            means.append((np.nan, np.nan))
            continue
        dealt = names_BU.astype(np.float64)
        load = load_UE[here_UG[:, a] | here_UG[:, b]].astype(np.float64)
        drawn = jensen_shannon_bits(dealt @ load, (1 - dealt) @ load)
        means.append((float(np.mean(drawn)), float(np.quantile(drawn, 0.95))))
    return np.array(means).T


def _deals(
    here_UG: NDArray[np.bool_], pairs_P2: NDArray[np.int64], resampling: Resampling
) -> Iterator[NDArray[np.bool_]]:
    """For each pair of domains, [B, U'] permutations of the two names over the units of both."""
    generator = np.random.default_rng(resampling.seed)
    number = min(resampling.resamples, MAX_PERMUTATIONS)
    for a, b in pairs_P2:
        names_U = here_UG[here_UG[:, a] | here_UG[:, b], a]
        yield np.stack([generator.permutation(names_U) for _ in range(number)])


def _best_ids(
    layer: LayerMeta, table_GE: NDArray, ids: pl.Series, sizes: NDArray, top: int
) -> pl.DataFrame:
    share_GE = table_GE / np.maximum(sizes, 1)[:, None]
    order_GE = np.lexsort((np.broadcast_to(-sizes[:, None], share_GE.shape), -share_GE), axis=0)[
        :top
    ]
    expert = np.tile(np.arange(layer.num_choices), len(order_GE))
    place = order_GE.ravel()
    frame = pl.DataFrame(
        {
            "expert": expert.astype(np.uint16),
            "is_zero": expert >= layer.num_experts,
            "id": ids.gather(place),
        }
        | {
            "count": table_GE[place, expert].astype(np.int64),
            "tokens": sizes[place],
            "share": share_GE[place, expert],
        }
    )
    return frame.filter(pl.col("count") > 0)
