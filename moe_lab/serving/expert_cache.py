"""``expert_cache``: hit rate and bytes read per token of a cache of experts, over its budget and
policy, beside the clairvoyant bound.

The cache holds experts of all layers within a budget in bytes, is empty at the start, and goes on
from one document to the next. What a step uses is read into memory beside the budget where it does
not fit. ``moe_lab.serving.replay`` has the rule that all policies share.

- ``lru``: the least recently used expert goes first. All budgets come from one pass.
- ``lru_per_layer``: the same with a part of the budget for each layer, in proportion to its bytes.
- ``lfu``: the expert used least often so far goes first.
- ``static``: the experts used least often *in other documents* go first (five folds of documents),
  so what stays is the list of the hottest that fits; an expert is read when it is first used.
- ``clairvoyant``: the expert whose next use is farthest goes first (Belady 1966), the step's own
  last. Where all experts have one size no policy that keeps what the step used finds more.
- ``bound``: the same without that rule, and with every expert as small as the smallest: no policy
  of any kind finds more.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS, RESAMPLES, Resampling
from moe_lab.analysis.document_sums import Documents, documents, nulls
from moe_lab.analysis.map_reduce import cells, counted
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.serving.expert_bytes import Bytes, bytes_by_layer
from moe_lab.serving.expert_sets import ExpertSets, SetBlock, expert_sets
from moe_lab.serving.policies import POLICIES
from moe_lab.serving.replay import KeyedCache, LruStack, Order, next_uses, tally
from moe_lab.trace import Trace

PHASES = ("all", "decode")
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Of the bytes of all experts: the budgets where none are given."""
ORDERS = {
    "lfu": Order.LFU,
    "static": Order.RANKED,
    "clairvoyant": Order.CLAIRVOYANT,
    "bound": Order.BOUND,
}
FOLDS = 5
T = TypeVar("T")
WORKERS = 2
MAX_HELD = 2**26

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Requests:
    """A block of sets as requests of numbered items.

    Attributes:
        starts: [S + 1]; items: [R] int32.
        place, unit, decode: [S] layer's place, unit that is drawn in the bootstrap, decoded or not.
        fold, tokens: [S] fold of the document, tokens of the step.
    """

    starts: Ints
    items: NDArray[np.int32]
    place: NDArray[np.int32]
    unit: NDArray[np.int32]
    decode: NDArray[np.bool_]
    fold: NDArray[np.int32]
    tokens: NDArray[np.int32]


def expert_cache(
    trace: Trace,
    budgets: Sequence[float] | None = None,
    policies: Sequence[str] = POLICIES,
    *,
    config: Any = None,
    bytes_per_parameter: float = 2.0,
    expert_bytes: Bytes | None = None,
    bandwidth: float | None = None,
    compute: float | None = None,
    per_document: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """Replay a trace through caches of experts.

    Up to ``MAX_HELD`` requests are kept in memory, 9 bytes each; the sets of a longer trace are
    read again for each replay, in the memory of ``expert_sets``, but for ``clairvoyant`` and
    ``bound``, which must know the future and hold all requests.

    Args:
        trace: of tokens in their order.
        budgets: bytes; by default ``SHARES`` of the bytes of all experts.
        policies: of ``POLICIES``.
        config, bytes_per_parameter, expert_bytes: how large an expert is, as ``bytes_by_layer``.
        bandwidth: bytes a second at which missing experts are read.
        compute: seconds that a decoded token takes when nothing is read.
        per_document: the cache is empty at the start of each document: what a request finds that
            comes alone. Documents then add up, and are read in parts, one document in memory.
        resamples, seed, level: of the intervals over documents.

    Returns:
        [budget, policy, phase, hit_rate, hit_rate_lo, hit_rate_hi, bytes_per_token, ..._lo, ..._hi,
        tokens_per_second, ..._lo, ..._hi, tokens_per_second_overlapped, requests, tokens, n_docs,
        cycle_bytes, note]. ``hit_rate`` is hits / requests; a request is one expert of one step.
        ``tokens_per_second`` (phase "decode", with ``bandwidth`` and ``compute``) lets a token wait
        for all of its reads; overlapped: reading and computing at once, the slower one counts.
        ``cycle_bytes``: bytes of all experts that a decoded token uses, mean over tokens; below it
        LRU finds nothing that the step before did not use. Intervals are null with fewer than five
        documents, and ``static`` with fewer than two; ``note`` says so.

    Raises:
        AnalysisError: a trace without order of tokens or with aliased experts; unknown policies; no
            size of an expert; no requests.

    Example:
        >>> expert_cache(open_trace("traces/x"), [2**31, 2**32], ["lru", "clairvoyant"])
    """
    sets = expert_sets(trace)
    if unknown := [policy for policy in policies if policy not in POLICIES]:
        raise AnalysisError(
            expected(f"policies among {', '.join(POLICIES)}", unknown), field="policies"
        )
    require(
        (bandwidth is None) == (compute is None),
        "bandwidth and compute together",
        "one",
        field="bandwidth",
    )
    if bandwidth is not None and compute is not None:
        finite = np.isfinite(bandwidth) and bandwidth > 0
        require(finite, "a bandwidth above 0 bytes a second", bandwidth, field="bandwidth")
        finite = np.isfinite(compute) and compute >= 0
        require(finite, "at least 0 seconds of compute a token", compute, field="compute")
    layer_bytes = bytes_by_layer(sets.layers, config, bytes_per_parameter, expert_bytes)
    replay = _Replay(sets, layer_bytes, documents(trace), seed)
    sizes = _budgets(budgets, replay.total_bytes)
    if per_document:
        hits = _by_document(replay, list(dict.fromkeys(policies)), sizes)
    else:
        replay.count()
        hits: dict[tuple[str, int], tuple[Ints, Ints]] = {}
        for policy in dict.fromkeys(policies):
            hits |= replay.run(policy, sizes)
    resampling = Resampling(resamples, seed, level)
    rows = [
        _row(replay, policy, budget, phase, hits.get((policy, budget)), resampling, speed)
        for speed in [None if bandwidth is None or compute is None else (bandwidth, compute)]
        for policy in dict.fromkeys(policies)
        for budget in sizes
        for phase in PHASES
    ]
    return nulls(pl.DataFrame(rows, schema=SCHEMA, orient="row"))


def _three(name: str) -> tuple[str, str, str]:
    return name, f"{name}_lo", f"{name}_hi"


MEASURES = (*_three("hit_rate"), *_three("bytes_per_token"), *_three("tokens_per_second"))
SCHEMA: dict[str, Any] = {
    "budget": pl.Int64,
    "policy": pl.String,
    "phase": pl.String,
    **dict.fromkeys((*MEASURES, "tokens_per_second_overlapped"), pl.Float64),
    **dict.fromkeys(("requests", "tokens", "n_docs"), pl.Int64),
    "cycle_bytes": pl.Float64,
    "note": pl.String,
}


def _budgets(budgets: Sequence[float] | None, total: int) -> list[int]:
    shares = [share * total for share in SHARES if share * total >= 1]  # few experts of one byte
    chosen = shares if budgets is None else list(budgets)
    require(
        bool(chosen) and all(1 <= size < 2**62 for size in chosen),  # not where one is NaN
        "budgets from 1 byte to 2^62 bytes",
        chosen,
        field="budgets",
    )
    return sorted({int(size) for size in chosen})


def _ahead(blocks: Iterator[T]) -> Iterator[T]:
    """``blocks``, each made in a second thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


class _Replay:
    """The sets of a trace as requests, and the sums of what happened to them, by unit and phase."""

    def __init__(self, sets: ExpertSets, layer_bytes: Ints, docs: Documents, seed: int) -> None:
        self.sets, self.layer_bytes, self.docs, self.seed = sets, layer_bytes, docs, seed
        self.first = sets.first_item.astype(np.int32)
        experts = np.diff(self.first)
        self.item_place = np.repeat(np.arange(len(experts)), experts)
        self.item_bytes = layer_bytes[self.item_place]
        self.total_bytes = int(self.item_bytes.sum())
        order = np.random.default_rng(seed).permutation(len(docs.docs))
        self.folds = order % FOLDS if len(order) >= FOLDS else order
        self.requests = np.zeros((docs.units, 2), np.int64)
        self.request_bytes = np.zeros((docs.units, 2), np.int64)
        self.tokens = np.zeros((docs.units, 2), np.int64)
        self._held: list[Requests] | None = None
        self._uses = np.zeros((0, 0), np.int64)

    def blocks(self) -> Iterator[Requests]:
        return self._read() if self._held is None else iter(self._held)

    def _read(self, blocks: Iterable[SetBlock] | None = None) -> Iterator[Requests]:
        for block in self.sets.blocks() if blocks is None else blocks:
            size_S = np.diff(block.starts)
            shift_R = np.repeat(self.first[block.place], size_S)
            at = np.searchsorted(self.docs.docs, block.doc)
            small = (block.place, self.docs.unit(block.doc), self.folds[at], block.tokens)
            place, unit, fold, tokens = (values.astype(np.int32) for values in small)
            items = np.add(block.experts, shift_R, dtype=np.int32)
            yield Requests(block.starts, items, place, unit, block.decode, fold, tokens)

    def count(self) -> None:
        """What is asked for, by unit and phase."""
        held: list[Requests] = []
        requests = 0
        for block in _ahead(self._read()):
            requests += len(block.items)
            if requests <= MAX_HELD:
                held.append(block)
            else:
                held.clear()
            self._count(block)
        self._held = held if requests <= MAX_HELD else None
        self.require_requests()

    def require_requests(self) -> None:
        require(
            self.requests.sum(), "a trace in which a real expert ran", "none", error=AnalysisError
        )

    def _count(self, block: Requests) -> None:
        size_S = np.diff(block.starts)
        self._add(self.requests, block, size_S)
        self._add(self.request_bytes, block, size_S * self.layer_bytes[block.place])
        self._add(self.tokens, block, np.where(block.place == 0, block.tokens, 0))

    def run_by_document(
        self, policies: list[str], budgets: list[int], uses: Ints
    ) -> NDArray[np.int64]:
        """[3 + 2 P B, U, 2]: requests, their bytes and tokens, then hits and bytes of hits of each
        policy and budget, of caches that are empty at the start of each document.
        """
        self._uses = uses
        sums = np.zeros((2 * len(policies) * len(budgets), *self.requests.shape), np.int64)
        for blocks in _documents(self.sets.blocks()):
            self._held = list(self._read(blocks))
            for block in self._held:
                self._count(block)
            found = [self.run(policy, budgets, counted=True) for policy in policies]
            for at, (hits, hit_bytes) in enumerate(pair for one in found for pair in one.values()):
                sums[2 * at] += hits
                sums[2 * at + 1] += hit_bytes
        return np.concatenate([[self.requests, self.request_bytes, self.tokens], sums])

    def count_uses(self) -> Ints:
        """[folds, items]: how often each fold asks for each item."""
        self._uses = np.zeros((int(self.folds.max()) + 1, self.first[-1]), np.int64)
        for block in self.blocks():
            fold_R = np.repeat(block.fold.astype(np.int64), np.diff(block.starts))
            flat = np.bincount(
                fold_R * self._uses.shape[1] + block.items, minlength=self._uses.size
            )
            self._uses += flat.reshape(self._uses.shape)
        return self._uses

    def _add(self, table: Ints, block: Requests, values_S: Ints) -> None:
        cell = block.unit * 2 + block.decode
        table += (
            np.bincount(cell, weights=values_S, minlength=table.size)
            .astype(np.int64)
            .reshape(table.shape)
        )

    def run(
        self, policy: str, budgets: list[int], counted: bool = False
    ) -> dict[tuple[str, int], tuple[Ints, Ints]]:
        """(policy, budget) -> hits and bytes of hits, [units, 2] each.

        ``counted``: uses of items by fold are known, and one thread does all.
        """
        if policy in ("lru", "lru_per_layer"):
            return self._lru(policy, budgets)
        if policy == "static":
            if len(self.docs.docs) < 2:
                return {}
            if not counted:
                self.count_uses()
        future = policy in ("clairvoyant", "bound")
        held = list(self.blocks()) if future else None
        following = None if held is None else self._future(held)
        replay = partial(self._keyed, policy, held, following)
        if counted:  # by one of several workers
            return {(policy, budget): replay(budget) for budget in budgets}
        with ThreadPoolExecutor(WORKERS) as pool:
            replayed = pool.map(replay, budgets)
            return {(policy, budget): sums for budget, sums in zip(budgets, replayed, strict=True)}

    def _lru(self, policy: str, budgets: list[int]) -> dict[tuple[str, int], tuple[Ints, Ints]]:
        alone = policy == "lru_per_layer"
        group = self.item_place if alone else np.zeros_like(self.item_place)
        stack = LruStack(self.item_bytes, group.astype(np.int32))
        share_L = np.diff(self.first) * self.layer_bytes / self.total_bytes
        limits = np.outer(share_L if alone else np.ones_like(share_L), budgets).astype(np.int64)
        hits = np.zeros((2 * self.docs.units, len(budgets)), np.int64)
        found = np.zeros_like(hits)
        met = ((block, stack.feed(block.starts, block.items)) for block in self.blocks())
        for block, distance in _ahead(met):
            cell = (block.unit * 2 + block.decode).astype(np.int32)
            tally(block.starts, distance, cell, block.place, limits, self.layer_bytes, hits, found)
        sums = [np.cumsum(table, axis=1).reshape(-1, 2, len(budgets)) for table in (hits, found)]
        return {
            (policy, budget): (sums[0][:, :, at], sums[1][:, :, at])
            for at, budget in enumerate(budgets)
        }

    def _keyed(
        self, policy: str, held: list[Requests] | None, following: Any, budget: int
    ) -> tuple[Ints, Ints]:
        order = ORDERS[policy]
        smallest = np.full_like(self.item_bytes, self.layer_bytes.min())
        sizes = smallest if policy == "bound" else self.item_bytes
        cache, sums = KeyedCache(order, sizes, budget), self._nothing()
        first = 0
        for block in self.blocks() if held is None else held:
            if policy == "static":
                hit = self._ranked(cache, block)
            else:
                part = slice(first, first + len(block.items))
                hit = cache.feed(
                    block.starts, block.items, None if following is None else following[part]
                )
                first += len(block.items)
            self._collect(sums, block, hit)
        return sums

    def _ranked(self, cache: KeyedCache, block: Requests) -> NDArray[np.uint8]:
        """Hits with the list of each document's fold, chosen on the other folds."""
        parts = []
        cuts = np.flatnonzero(np.append(True, block.fold[1:] != block.fold[:-1]))
        for start, end in zip(cuts, np.append(cuts[1:], len(block.fold)), strict=True):
            others = self._uses.sum(axis=0) - self._uses[block.fold[start]]
            worth = others / self.item_bytes
            cache.rank(np.argsort(np.argsort(worth, kind="stable"), kind="stable"))
            starts = block.starts[start : end + 1]
            items = block.items[starts[0] : starts[-1]]
            parts.append(cache.feed(starts - starts[0], items))
        return np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def _future(self, held: list[Requests]) -> NDArray[np.int32]:
        ends = np.cumsum([0, *(len(block.items) for block in held)])
        starts = np.concatenate(
            [
                np.zeros(1, np.int64),
                *(b.starts[1:] + end for b, end in zip(held, ends, strict=False)),
            ]
        )
        items = np.concatenate([block.items for block in held])
        return next_uses(starts, items, len(self.item_bytes))

    def _nothing(self) -> tuple[Ints, Ints]:
        return np.zeros((self.docs.units, 2), np.int64), np.zeros((self.docs.units, 2), np.int64)

    def _collect(self, sums: tuple[Ints, Ints], block: Requests, hit: NDArray[Any]) -> None:
        running = np.append(0, np.cumsum(hit, dtype=np.int64))
        hits_S = running[block.starts[1:]] - running[block.starts[:-1]]
        self._add(sums[0], block, hits_S)
        self._add(sums[1], block, hits_S * self.layer_bytes[block.place])


def _documents(blocks: Iterable[SetBlock]) -> Iterator[list[SetBlock]]:
    """The sets of each document; a document's sets stand together."""
    held: list[SetBlock] = []
    for block in blocks:
        cuts = np.flatnonzero(block.doc[1:] != block.doc[:-1]) + 1
        for start, end in pairwise([0, *cuts.tolist(), len(block.doc)]):
            if held and held[-1].doc[0] != block.doc[start]:
                yield held
                held = []
            held.append(block.part(start, end))
    if held:
        yield held


def _by_document(
    replay: _Replay, policies: list[str], budgets: list[int]
) -> dict[tuple[str, int], tuple[Ints, Ints]]:
    """As ``_Replay.run``, of all policies, with caches that are empty at the start of each
    document.
    """
    single = len(replay.docs.docs) < 2
    chosen = [policy for policy in policies if policy != "static" or not single]
    arguments = replay.layer_bytes, replay.docs, replay.seed
    uses = np.zeros((0, 0), np.int64)
    if "static" in chosen:
        fold = counted((int(replay.folds.max()) + 1, len(replay.item_bytes)))
        uses = replay.sets.summed(_uses, fold, arguments)
    shape = 3 + 2 * len(chosen) * len(budgets), *replay.requests.shape
    sums = replay.sets.summed(_hits, counted(shape), (*arguments, chosen, budgets, uses))
    replay.requests, replay.request_bytes, replay.tokens = sums[:3]
    replay.require_requests()
    keys = [(policy, budget) for policy in chosen for budget in budgets]
    return {key: (sums[3 + 2 * at], sums[4 + 2 * at]) for at, key in enumerate(keys)}


def _uses(trace: Trace, layer_bytes: Ints, docs: Documents, seed: int) -> pl.DataFrame:
    return cells(_Replay(expert_sets(trace), layer_bytes, docs, seed).count_uses())


def _hits(
    trace: Trace,
    layer_bytes: Ints,
    docs: Documents,
    seed: int,
    policies: list[str],
    budgets: list[int],
    uses: Ints,
) -> pl.DataFrame:
    replay = _Replay(expert_sets(trace), layer_bytes, docs, seed)
    return cells(replay.run_by_document(policies, budgets, uses))


def _row(
    replay: _Replay,
    policy: str,
    budget: int,
    phase: str,
    sums: tuple[Ints, Ints] | None,
    resampling: Resampling,
    speed: tuple[float, float] | None,
) -> list[Any]:
    """One row of the frame; null measures where the policy could not be judged."""
    columns = slice(1, 2) if phase == "decode" else slice(0, 2)
    requests, asked, tokens = (
        table[:, columns].sum(axis=1).astype(np.float64)
        for table in (replay.requests, replay.request_bytes, replay.tokens)
    )
    number, units = len(replay.docs.docs), replay.docs.units
    decoded = max(replay.tokens[:, 1].sum(), 1)
    cycle = float(replay.request_bytes[:, 1].sum() / decoded)
    counts = [int(requests.sum()), int(tokens.sum()), number, cycle]
    if sums is None:
        note = "A list chosen on other documents needs at least 2 documents."
        return [budget, policy, phase, *[np.nan] * (len(MEASURES) + 1), *counts, note]
    hits, found = (table[:, columns].sum(axis=1).astype(np.float64) for table in sums)
    read = asked - found
    values: list[float] = []

    def measured(above: Any, below: Any) -> None:
        low, high = resampling.interval(lambda w: _ratio(w @ above, w @ below), units)
        values.extend([float(_ratio(above.sum(), below.sum())), float(low), float(high)])

    measured(hits, requests)
    measured(read, tokens)
    overlapped = np.nan
    if speed is not None and phase == "decode":
        bandwidth, compute = speed
        measured(tokens, tokens * compute + read / bandwidth)
        per_token = _ratio(read.sum(), tokens.sum()) / bandwidth
        overlapped = float(1 / max(compute, float(per_token), 1e-300))
    else:
        values += [np.nan] * 3
    note = "" if number >= MIN_DOCUMENTS else f"No interval: fewer than {MIN_DOCUMENTS} documents."
    return [budget, policy, phase, *values, overlapped, *counts, note]


def _ratio(above: Any, below: Any) -> Any:
    return np.divide(
        above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0
    )
