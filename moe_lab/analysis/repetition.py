"""Whether neighbouring tokens run the same experts: the repetition rates of Mixtral (arXiv
2401.04088, section 5, table 5).

``first`` is the share of tokens whose first choice is that of the token before it in the document;
``either`` the share whose chosen set has an expert in common with it (for top-2: first or second
choice). At random the sets of k of E meet with 1 - C(E-k, k) / C(E, k): 0.125 and 0.464 for top-2
of 8. Because of this, the tokens of a document are no independent sample.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import (
    Ids,
    Slots,
    by_layer,
    first_choices,
    in_document_order,
)
from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import (
    Documents,
    documents,
    nulls,
    over,
    ratio_interval,
    unit_sums,
    unit_table,
)
from moe_lab.analysis.map_reduce import Sum, reduced
from moe_lab.analysis.requirements import of_tokens
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots


@of_tokens
def repetition(
    trace: Trace, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """How often a token repeats the experts of the token before it, per layer.

    Returns:
        [layer, choice, n_pairs, n_docs, rate, lo, hi, chance, chance_by_load]: ``choice`` "first"
        or "either"; ``n_pairs`` tokens whose predecessor (same document, position one lower) is in
        the trace; ``chance`` is that of choosing evenly at random, null for "either" where tokens
        use different numbers of slots; ``chance_by_load`` is the rate among the same tokens paired
        at random (within a batch of rows), which loads alone would give. Null without pairs.
    """
    docs, resampling = documents(trace, 3), Resampling(resamples, seed, level)
    layers = by_layer(trace)
    tables = reduced(
        Sum(_sums, (trace,), (layer.layer,), unit_table(docs, 6), (layer, docs, seed), whole=True)
        for layer in layers
    )
    rows = [
        row
        for layer, sums_U6 in zip(layers, tables, strict=True)
        for row in _layer_rows(layer, sums_U6, docs, resampling)
    ]
    return nulls(pl.DataFrame(rows, schema=_SCHEMA))


def chance_of_meeting(experts: int, slots: int) -> float:
    """Probability that two sets of ``slots`` distinct experts out of ``experts``, drawn evenly,
    have one in common.
    """
    return 1 - math.comb(experts - slots, slots) / math.comb(experts, slots)


def _sums(trace: Trace, layer: LayerMeta, docs: Documents, seed: int) -> pl.DataFrame:
    """Pairs, those that repeat, those that would at random, and those with an unused slot."""
    generator = np.random.default_rng([seed, layer.layer])

    def batches() -> Iterator[tuple[NDArray, NDArray]]:
        for doc_P, before, after in _neighbours(trace, layer):
            order = generator.permutation(len(doc_P))
            shuffled = _same(before.rows(order), after)
            columns = [np.ones(len(doc_P)), *_same(before, after), *shuffled, before.unused]
            yield doc_P, np.stack(columns).T

    return unit_sums(docs, batches(), 6)


def _layer_rows(
    layer: LayerMeta, sums_U6: Floats, docs: Documents, resampling: Resampling
) -> list[dict[str, object]]:
    pairs, *_, unused = sums_U6.sum(axis=0)
    chance = {
        "first": 1 / layer.num_choices,
        "either": chance_of_meeting(layer.num_choices, layer.top_k) if not unused else None,
    }
    found = zip(
        *ratio_interval(sums_U6[:, :3], resampling),
        chance.items(),
        over(sums_U6[:, 3:5].sum(axis=0), pairs),
        strict=True,
    )
    return [
        {"layer": layer.layer, "choice": choice, "n_pairs": int(pairs), "n_docs": len(docs.docs)}
        | {"rate": value, "lo": low, "hi": high, "chance": even, "chance_by_load": by_load}
        for value, low, high, (choice, even), by_load in found
    ]


@dataclass(frozen=True)
class Choices:
    """First choices [P] (``EMPTY_SLOT``: none), whether a slot was not used [P], and the chosen
    sets as bits of words [P, W] of some tokens.
    """

    first: Ids
    unused: NDArray[np.bool_]
    sets: NDArray[np.uint64]

    def rows(self, places: NDArray[np.int64]) -> "Choices":
        return Choices(self.first[places], self.unused[places], self.sets[places])


def _sets(ids_TK: Ids, experts: int) -> NDArray[np.uint64]:
    """[T, W] the experts of each token: bit e % 64 of word e // 64 stands for expert e."""
    sets_TW = np.zeros((len(ids_TK), -(-experts // 64)), dtype=np.uint64)
    for ids_T in ids_TK.T:
        bit_T = (ids_T != EMPTY_SLOT).astype(np.uint64) << (ids_T % 64).astype(np.uint64)
        for word in range(sets_TW.shape[1]):
            sets_TW[:, word] |= np.where(ids_T // 64 == word, bit_T, np.uint64(0))
    return sets_TW


def _same(before: Choices, after: Choices) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    first = (before.first == after.first) & (after.first != EMPTY_SLOT)
    return first, ((before.sets & after.sets) != 0).any(axis=1)


def _neighbours(
    trace: Trace, layer: LayerMeta
) -> Iterator[tuple[NDArray[np.uint32], Choices, Choices]]:
    """Batches of pairs: the document, the token before, the token after."""
    last: pl.DataFrame | None = None
    for frame in in_document_order(trace, layer.layer, ["experts", "weights"]):
        frame = frame if last is None else pl.concat([last, frame])
        if not frame.height:
            continue
        last = frame[-1:]
        doc, pos = (frame[name].to_numpy().astype(np.int64) for name in ("doc", "pos"))
        ids = expert_slots(layer, frame["experts"])
        first = first_choices(layer, Slots(frame, ids))
        chosen = Choices(first, (ids == EMPTY_SLOT).any(axis=1), _sets(ids, layer.num_choices))
        pair = np.flatnonzero((doc[1:] == doc[:-1]) & (pos[1:] == pos[:-1] + 1))
        yield frame["doc"].to_numpy()[pair], chosen.rows(pair), chosen.rows(pair + 1)


_SCHEMA = {"layer": pl.UInt32, "choice": pl.String, "n_pairs": pl.Int64, "n_docs": pl.Int64}
_SCHEMA |= dict.fromkeys(("rate", "lo", "hi", "chance", "chance_by_load"), pl.Float64)
