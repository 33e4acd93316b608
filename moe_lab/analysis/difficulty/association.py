"""``difficulty_association``: does compute follow difficulty, once the identity of the token is
held fixed? Per layer and alignment.

Compute and difficulty are replaced by mid-ranks and correlated three times: as they are (Spearman's
rho), within strata of classes, and, the headline, within token ids: both rank rows less what the id
explains. For ``align="target"`` both the id that went in and the id that was to come out are taken
out, since a router may look up either. Intervals come from resampling documents. Specification of
the statistics: docs/difficulty.md.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.difficulty.alignment import (
    MIN_DOCUMENT_TOKENS,
    Align,
    Aligned,
    LayerTokens,
    align,
    layers_of,
)
from moe_lab.analysis.difficulty.context import Cues, Gates
from moe_lab.analysis.difficulty.difficulty_verdict import (
    GATES,
    MARGIN,
    MIN_DOCUMENTS,
    Evidence,
    attenuation,
    judge,
)
from moe_lab.analysis.difficulty.intervals import (
    MISSING,
    Bootstrap,
    Interval,
    false_discovery,
    moments,
    naive_interval,
)
from moe_lab.analysis.difficulty.rank_statistics import (
    LevelShift,
    Order,
    RankShift,
    somers_d,
    standard_ranks,
    xi,
)
from moe_lab.analysis.difficulty.within_groups import Ints, Within, joint_code
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.config import require

S = TypeVar("S")
T = TypeVar("T")
SHOWN = (
    *("layer", "align", "rho_raw", "rho_strata", "rho_token", "rho_token_lo", "rho_token_hi"),
    *("q", "verdict", "n_tokens", "n_docs"),
)
"""Columns of the association that the command line and the page show."""
TOGETHER = 32
"""Layers whose compute is held at once."""
MOST_THREADS = 2
"""That measure layers; more wait for the interpreter's lock."""
NEGLIGIBLE = 1e-9
"""Share of a row's variance below which its residual is rounding error."""
ZERO = Interval.missing(0.0, 1.0)
"""The correlation within token ids where one of the two is a function of the id."""


def difficulty_association(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    seed: int = 0,
    *,
    compute: str = "ffn_count",
    resamples: int = 2000,
    level: float = 0.95,
    margin: float = MARGIN,
    strata: Sequence[str] | None = None,
    pool_below: int = 0,
    min_documents: int = MIN_DOCUMENTS,
    min_document_tokens: int = MIN_DOCUMENT_TOKENS,
    include_first: bool = False,
    details: bool = False,
) -> pl.DataFrame:
    """Rank correlation of compute with difficulty for each layer under both alignments, and a
    verdict in words.

    Args:
        frame: [layer, doc, pos, token_id, <compute>, <difficulty>], one row per layer and token;
            class columns ``lexer``, ``freq_band``, ``subword``, ``copy`` and ``boundary`` (of
            ``text.token_classes``) are used where they are there. Rows may come in any order. A
            difficulty that is null or NaN leaves the token out.
        difficulty: the column of the token's difficulty, in any unit (only its ranks count),
            measured without the studied model.
        seed: of the resampling.
        compute: the column of compute: ``ffn_count``, or any other notion of it.
        resamples, level: of the document bootstrap.
        margin: correlations within plus or minus this are no material association.
        strata: class columns of ``rho_strata``; without any, frequency band x position.
        pool_below: compare ids seen less often than this within their stratum, not with themselves.
            By default every id is compared with itself alone, and an id seen once says nothing.
        min_documents: with fewer effective documents than this, wider intervals decide (95 %
            instead of 90 %), and fewer than 30 of them (or than this) are not judged.
        min_document_tokens: shorter documents are left out (unless they hold more than half of all
            tokens).
        include_first: also use position 0 of each document, which often is an attention sink.
        details: also return the columns after ``note``.

    Returns:
        [layer, align, rho_raw, rho_strata, rho_token, rho_token_lo, rho_token_hi, p, q, verdict,
        n_tokens, n_docs, note]: ``p`` is of no association within token ids, ``q`` its false
        discovery rate over all rows, ``n_tokens`` the tokens that ``rho_token`` rests on and
        ``note`` the reason of the verdict. In a static layer the correlations are null and the
        verdict says so; where compute is a function of the token id, ``rho_token`` is 0. With
        ``details`` also ends of the intervals of ``rho_raw`` and ``rho_strata``, ``rho_document``
        (within token id and document) and ``rho_lexer`` (within token id and lexer class) with
        theirs, the naive interval of ``rho_token`` that takes tokens for independent, ``somers_d``
        and ``xi`` of compute on difficulty, ``identity_share`` and ``frequency_share`` (variance of
        compute explained by token ids, and the part of that which their frequency explains),
        ``rho_previous_token``, ``rho_position``, ``rho_copied_suffix``, ``rho_place_in_the_line``,
        ``rho_place_in_the_word``, ``rho_other_token`` (what is left where each of these is held
        fixed beside the id; null where ``rho_token`` is not beyond the margin or the frame does not
        have it), ``rho_bend`` (of compute with the squared rank of difficulty within
        ids), ``compute_percent`` (compute of the hardest tenth within ids over the easiest),
        ``reliability`` (of the difficulty within ids, where the frame has the columns
        ``<difficulty>_half_a`` and ``_half_b``: two measurements with independent errors, each
        from half of what the difficulty is measured by),
        ``n_effective`` (documents of equal length that would weigh as much, repeated ones counted
        once), ``n_alone`` (tokens whose id occurs once) and ``n_missing`` (without a difficulty).

    Raises:
        AnalysisError: columns are missing or a (doc, pos) comes twice in a layer.
    """
    rows = association_rows(seed, resamples, level, margin, min_documents, details)
    paired = pairings(
        frame, difficulty, compute, strata, pool_below, min_document_tokens, include_first
    )
    return tables(paired, rows)[0]


def association_rows(
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    margin: float = MARGIN,
    min_documents: int = MIN_DOCUMENTS,
    details: bool = False,
) -> "Rows":
    """What ``difficulty_association`` measures."""
    require(0 < level < 1, "a level between 0 and 1", level)
    require(resamples >= 100, "at least 100 resamples", resamples, field="resamples")
    require(0 < margin < 1, "a margin between 0 and 1", margin)
    drawn: dict[int, Bootstrap] = {}

    def bootstrap(pairing: Pairing) -> Bootstrap:
        nonlocal drawn
        clusters = pairing.gates.clusters
        documents = pairing.aligned.num_documents if clusters is None else int(clusters.max()) + 1
        if documents not in drawn:
            drawn = {documents: Bootstrap(documents, resamples, seed, level)}
        return drawn[documents]

    def table(measured: list[Measured]) -> pl.DataFrame:
        measured = sorted(measured, key=lambda one: one.layer)
        qs = false_discovery(np.array([one.evidence.token.p for one in measured]))
        rows = [
            one.row(float(q), margin, min_documents) for one, q in zip(measured, qs, strict=True)
        ]
        result = pl.DataFrame(rows, schema=_SCHEMA | _DETAILS).with_columns(
            pl.col(pl.Float64).fill_nan(None)
        )
        return result if details else result.select(*_SCHEMA)

    return Rows(
        bootstrap,
        lambda tokens, pairing, bootstrap: measure(tokens, pairing, bootstrap, margin),
        table,
    )


@dataclass(frozen=True)
class Measured:
    """The statistics of one layer and alignment, before they are judged beside the others."""

    layer: int
    align: Align
    documents: int
    missing: int
    evidence: Evidence
    strata: Interval = MISSING
    compute_percent: float = float("nan")
    identity_share: float = float("nan")
    somers_d: float = float("nan")
    xi: float = float("nan")
    reliability: float = float("nan")

    def row(self, q: float, margin: float, min_documents: int) -> dict[str, object]:
        """The row of ``difficulty_association``, details included."""
        evidence, token = self.evidence, self.evidence.token
        verdict, note = judge(evidence, q, margin, min_documents)
        note += attenuation(token.value, self.reliability)
        naive = naive_interval(token.value, evidence.tokens)
        intervals = {
            "raw": evidence.raw,
            "strata": self.strata,
            "token": token,
            "document": evidence.document,
            "lexer": evidence.lexer or MISSING,
        }
        values: dict[str, object] = {
            f"rho_{name}{end}": number
            for name, one in intervals.items()
            for end, number in (("", one.value), ("_lo", one.lo), ("_hi", one.hi))
        }
        return values | {
            "layer": self.layer,
            "align": self.align.value,
            "p": token.p,
            "q": q,
            "verdict": verdict.value,
            "n_tokens": evidence.tokens,
            "n_docs": self.documents,
            "note": note,
            "rho_token_naive_lo": naive[0],
            "rho_token_naive_hi": naive[1],
            "somers_d": self.somers_d,
            "xi": self.xi,
            "identity_share": self.identity_share,
            "frequency_share": evidence.frequency_share,
            **{
                f"rho_{name.replace(' ', '_')}": evidence.gates.get(name, MISSING).value
                for name in GATES
            },
            "rho_bend": evidence.bend.value,
            "compute_percent": self.compute_percent,
            "reliability": self.reliability,
            "n_effective": evidence.effective,
            "n_alone": evidence.pairs - evidence.tokens,
            "n_missing": self.missing,
        }


@dataclass(frozen=True, eq=False)
class Pairing:
    """The difficulty of a pairing, which all layers with the same tokens share."""

    cues: Cues
    aligned: Aligned
    pool_below: int

    @property
    def tokens(self) -> LayerTokens:
        return self.cues.tokens

    @cached_property
    def gates(self) -> Gates:
        return Gates(self.cues, self.aligned, self.by_token, self.ranks, self.left_of_token)

    @cached_property
    def order(self) -> Order:
        return Order.of(self.aligned.difficulty)

    @cached_property
    def ranks(self) -> Floats:
        return standard_ranks(self.order)

    @cached_property
    def by_token(self) -> Within:
        return Within(tuple(self._pooled(code) for code in self.aligned.token_ids))

    @cached_property
    def by_strata(self) -> Within:
        return Within((joint_code([self.aligned.strata]),))

    @cached_property
    def cells(self) -> Ints:
        """[n] one code for each document and stratum."""
        return joint_code([self.aligned.doc, self.by_strata.codes[0]])

    @cached_property
    def by_lexer(self) -> Within | None:
        lexer = self.aligned.lexer
        return (
            None
            if lexer is None
            else Within((*self.by_token.codes[:-1], joint_code([self.by_token.codes[-1], lexer])))
        )

    @cached_property
    def left_of_token(self) -> Floats:
        """Ranks of difficulty within token ids."""
        return self.by_token.residual(self.ranks)

    @cached_property
    def left(self) -> dict[str, Floats]:
        """Ranks of difficulty within each grouping."""
        groups = {"strata": self.by_strata, "lexer": self.by_lexer}
        left = {
            name: group.residual(self.ranks) for name, group in groups.items() if group is not None
        }
        token = self.left_of_token
        return left | {"raw": self.ranks, "token": token, "document": self.within_documents(token)}

    @cached_property
    def reliability(self) -> float:
        """Reliability of the difficulty within token ids: the correlation r of two measurements of
        half its length, stepped up to its own by 2 r / (1 + r) (Spearman 1910, Brown 1910). NaN
        without them; 0 where they do not agree at all.
        """
        if self.tokens.halves is None:
            return float("nan")
        halves = [half[self.aligned.judged] for half in self.tokens.halves]
        known = np.isfinite(halves[0]) & np.isfinite(halves[1])
        left = []
        for half in halves:
            ranks = np.zeros(len(half))
            ranks[known] = standard_ranks(Order.of(half[known]))
            left.append(self.by_token.residual(ranks))
        scale = float(np.sqrt((left[0] @ left[0]) * (left[1] @ left[1])))
        agreed = max(float(left[0] @ left[1]) / scale, 0.0) if scale else 0.0
        return 2 * agreed / (1 + agreed)

    @cached_property
    def order_left(self) -> Order:
        """The order of the ranks of difficulty within token ids."""
        return Order.of(self.left_of_token)

    @cached_property
    def square(self) -> Floats:
        """[n] squared ranks of what is left of difficulty within ids, less what ids explain."""
        return self.by_token.residual(standard_ranks(self.order_left) ** 2)

    @cached_property
    def shift(self) -> RankShift:
        return RankShift.of(self.order, self.aligned.doc, self.aligned.num_documents)

    @cached_property
    def shifted_squares(self) -> dict[str, Floats]:
        """[D] twice the effect of each document, through the ranks, on the sum of squares of a row
        of ``left``.
        """
        return {
            name: 2 * self.shift.per_document(row)
            for name, row in self.left.items()
            if name in ("raw", "strata", "token")
        }

    def within_documents(self, values: Floats) -> Floats:
        lengths = np.diff(np.append(self.aligned.starts, len(values)))
        return values - np.repeat(np.add.reduceat(values, self.aligned.starts) / lengths, lengths)

    def _pooled(self, code: Ints) -> Ints:
        if self.pool_below <= 1:
            return code
        rare = np.bincount(code)[code] < self.pool_below
        strata = joint_code([self.aligned.strata])
        return np.where(rare, int(code.max()) + 1 + strata, code)


def pairings(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    compute: str,
    strata: Sequence[str] | None = None,
    pool_below: int = 0,
    min_document_tokens: int = MIN_DOCUMENT_TOKENS,
    include_first: bool = False,
) -> Iterator[tuple[Pairing, list[LayerTokens]]]:
    """Each alignment of layers that differ in compute alone, with up to ``TOGETHER`` of them, whose
    compute is in the smallest type that holds it.
    """
    layers = layers_of(frame, difficulty, compute, strata, min_document_tokens)
    for alike in _alike(layers):
        cues, pairing = Cues(alike[0]), None
        for how in Align:
            del pairing  # so that the ranks and groups of only one alignment are held
            pairing = Pairing(cues, align(alike[0], how, include_first), pool_below)
            yield pairing, alike


@dataclass(frozen=True)
class Rows(Generic[S, T]):
    """A table whose rows are measured layer by layer under each alignment.

    Attributes:
        shared: of a pairing: what its layers share.
        of_layer: (a layer, its pairing, ``shared``) -> its part of the table.
        table: of all parts: alignment by alignment of up to ``TOGETHER`` layers.
    """

    shared: Callable[[Pairing], S]
    of_layer: Callable[[LayerTokens, Pairing, S], T]
    table: Callable[[list[T]], pl.DataFrame]

    def measured(self, pairing: Pairing, alike: list[LayerTokens]) -> list[T]:
        """The parts of layers of one pairing, by up to ``MOST_THREADS`` threads."""
        shared = self.shared(pairing)

        def one(tokens: LayerTokens) -> T:
            compute = tokens.compute.astype(np.float64)
            return self.of_layer(replace(tokens, compute=compute), pairing, shared)

        first = one(alike[0])  # alone, for it makes what all of them share
        with ThreadPoolExecutor(min(pl.thread_pool_size(), MOST_THREADS)) as pool:
            return [first, *pool.map(one, alike[1:])]


def tables(
    paired: Iterable[tuple[Pairing, list[LayerTokens]]], *asked: Rows[Any, Any]
) -> list[pl.DataFrame]:
    """Tables that are measured in one pass over the layers."""
    parts: list[list[Any]] = [[] for _ in asked]
    for pairing, alike in paired:
        for rows, found in zip(asked, parts, strict=True):
            found += rows.measured(pairing, alike)
        del pairing
    return [rows.table(found) for rows, found in zip(asked, parts, strict=True)]


def _alike(layers: Iterable[LayerTokens]) -> Iterator[list[LayerTokens]]:
    """Runs of layers that share their arrays of tokens, compute in the smallest type that holds
    it.
    """
    alike: list[LayerTokens] = []
    for tokens in layers:
        if alike and (alike[0].difficulty is not tokens.difficulty or len(alike) == TOGETHER):
            yield alike
            alike = []
        alike.append(replace(tokens, compute=_narrowed(tokens.compute)))
    if alike:
        yield alike


def _narrowed(values: Floats) -> NDArray:
    for kind in (np.uint8, np.float32):
        with np.errstate(invalid="ignore", over="ignore"):
            narrow = values.astype(kind)
        if np.array_equal(narrow, values):
            return narrow
    return values


def measure(
    tokens: LayerTokens, pairing: Pairing, bootstrap: Bootstrap, margin: float = MARGIN
) -> Measured:
    """All statistics of one layer under one alignment."""
    aligned = pairing.aligned
    compute = tokens.compute[aligned.rows]
    pairs = len(compute)
    named = tokens.layer, aligned.align, aligned.num_documents, aligned.num_missing
    if not pairs or compute.min() == compute.max():
        static = float(compute[0]) if pairs else None
        evidence = Evidence(tokens.all_documents, pairs, tokens=pairs, static=static)
        return Measured(*named, evidence)
    levels = compute_levels(compute)
    y = standard_level_ranks(levels)
    starts, left = aligned.starts, pairing.left

    level_shift: LevelShift | RankShift = (
        LevelShift.of(levels, aligned.doc, aligned.num_documents)
        if levels.max() < MAX_LEVELS
        else RankShift.of(Order.of(levels), aligned.doc, aligned.num_documents)
    )

    def interval(name: str, own: Floats, inflation: Floats | None = None) -> Interval:
        squares = pairing.shifted_squares.get(name)
        moved = None
        if squares is not None:
            through_ranks = pairing.shift.per_document(own) + level_shift.per_document(left[name])
            moved = through_ranks, squares, 2 * level_shift.per_document(own)
        return bootstrap.interval(
            moments(left[name], own, starts, inflation, moved).merged(pairing.gates.clusters)
        )

    y_token = pairing.by_token.residual(y)
    compute_by_id = float(y_token @ y_token) < NEGLIGIBLE * len(y)
    difficulty_by_id = float(left["token"] @ left["token"]) < NEGLIGIBLE * len(y)
    inflation = pairing.by_token.inflation
    fixed = compute_by_id or difficulty_by_id
    by_lexer = None if fixed else pairing.by_lexer
    token = ZERO if fixed else interval("token", y_token, inflation)
    gates: dict[str, Interval] = {}
    if token.beyond(margin):  # what lies within the band has nothing to explain
        for name, gate in pairing.gates.behind.items():
            row = moments(pairing.gates.left[name], gate(y, y_token), starts, inflation)
            gates[name] = bootstrap.interval(row.merged(pairing.gates.clusters))
    lengths = moments(y, y, starts).merged(pairing.gates.clusters)
    bend = bootstrap.interval(
        moments(pairing.square, y_token, starts, inflation).merged(pairing.gates.clusters)
    )
    identity_share, frequency_share = _shares(y, pairing)
    evidence = Evidence(
        documents=tokens.all_documents,
        effective=lengths.effective_documents,
        pairs=pairs,
        tokens=pairs - int(pairing.by_token.alone.sum()),
        raw=interval("raw", y),
        token=token,
        bend=ZERO if fixed else bend,
        gates=gates,
        document=ZERO
        if fixed
        else interval("document", pairing.within_documents(y_token), inflation),
        lexer=by_lexer and interval("lexer", by_lexer.residual(y), by_lexer.inflation),
        frequency_share=frequency_share,
        compute_by_id=compute_by_id,
        difficulty_by_id=difficulty_by_id,
    )
    return Measured(
        *named,
        evidence,
        compute_percent=_percent(compute, pairing),
        reliability=pairing.reliability,
        strata=interval("strata", pairing.by_strata.residual(y)),
        identity_share=identity_share,
        somers_d=somers_d(pairing.order, levels) if levels.max() < MAX_LEVELS else float("nan"),
        xi=xi(pairing.order, levels),
    )


MAX_LEVELS = 256


def compute_levels(compute: Floats) -> Ints:
    """[n] compute as codes from 0 in rising order; equal values share one."""
    low, high = compute.min(), compute.max()
    if high - low < MAX_LEVELS and np.array_equal(compute, np.round(compute)):
        shifted = (compute - low).astype(np.int64)
        return (np.cumsum(np.bincount(shifted) > 0) - 1)[shifted]
    return Order.of(compute).group


def standard_level_ranks(levels: Ints) -> Floats:
    """Mid-ranks of few levels with mean 0 and standard deviation 1."""
    counts = np.bincount(levels)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    midranks = midranks - (counts @ midranks) / len(levels)
    return (midranks / np.sqrt((counts @ midranks**2) / len(levels)))[levels]


def _percent(compute: Floats, pairing: Pairing) -> float:
    """Compute of the hardest tenth within ids over that of the easiest, less 1, in per cent."""
    tenth = pairing.order_left.quantile_bins(10)
    left = pairing.by_token.residual(compute) + compute.mean()
    easiest, hardest = left[tenth == 0], left[tenth == 9]
    if not len(easiest) or not len(hardest) or easiest.mean() <= 0:
        return float("nan")
    return 100 * float(hardest.mean() / easiest.mean() - 1)


def _shares(y: Floats, pairing: Pairing) -> tuple[float, float]:
    """Share of the variance of compute that token ids explain (omega squared), and of that the
    share of a smooth function of frequency.

    Of the ids that went in and the ids that were to come out, those that explain more.
    """
    found = [_share(y, code) for code in pairing.aligned.token_ids]
    return max(found)


def _share(y: Floats, code: Ints) -> tuple[float, float]:
    counts = np.bincount(code).astype(np.float64)
    seen = np.flatnonzero(counts)
    counts, sums = counts[seen], np.bincount(code, weights=y)[seen]
    between = float((sums**2 / counts).sum())
    within = len(y) - between
    noise = within / max(len(y) - len(seen), 1)
    identity = (between - (len(seen) - 1) * noise) / (len(y) + noise)
    degree = min(3, len(np.unique(counts)) - 1)
    design = np.vander(np.log(counts) - np.log(counts).mean(), degree + 1)
    root = np.sqrt(counts)
    effects = np.linalg.lstsq(design * root[:, None], sums / root, rcond=None)[0]
    explained = float((counts * (design @ effects) ** 2).sum()) - degree * noise
    # Of a purely random table of V ids a cubic explains about 3 of V - 1 parts.
    return identity, explained / len(y) / identity if identity > NEGLIGIBLE else 0.0


_FLOATS = ("rho_raw", "rho_strata", "rho_token", "rho_token_lo", "rho_token_hi", "p", "q")
_SCHEMA: dict[str, Any] = (
    {"layer": pl.Int64(), "align": pl.String()}
    | dict.fromkeys(_FLOATS, pl.Float64())
    | {"verdict": pl.String(), "n_tokens": pl.Int64(), "n_docs": pl.Int64(), "note": pl.String()}
)
_DETAILS: dict[str, Any] = (
    dict.fromkeys(("rho_raw_lo", "rho_raw_hi", "rho_strata_lo", "rho_strata_hi"), pl.Float64())
    | {
        f"rho_{name}{end}": pl.Float64()
        for name in ("document", "lexer")
        for end in ("", "_lo", "_hi")
    }
    | dict.fromkeys(
        (
            "rho_token_naive_lo",
            "rho_token_naive_hi",
            "somers_d",
            "xi",
            "identity_share",
            "frequency_share",
        ),
        pl.Float64(),
    )
    | {f"rho_{name.replace(' ', '_')}": pl.Float64() for name in GATES}
    | dict.fromkeys(("rho_bend", "compute_percent", "reliability", "n_effective"), pl.Float64())
    | {"n_alone": pl.Int64(), "n_missing": pl.Int64()}
)
