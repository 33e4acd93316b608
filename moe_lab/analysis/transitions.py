"""From the experts of one layer to those of another: which pairs of experts the same token runs.

``all`` counts every expert of one layer with every expert of the other, k x k pairs a token.
OLMoE's published counter (arXiv 2409.02060, section 5, scripts/run_moe_analysis.py) zips the two
lists, so that the choice of rank r is paired with that of rank r alone and a token adds k pairs:
that is ``rank_aligned`` here, for comparison with the published tables. It is no joint distribution
of the two layers.
"""

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import KEY, aligned, by_layer, chosen_layers, chunks
from moe_lab.analysis.document_sums import nulls, over
from moe_lab.analysis.map_reduce import Sum, cells, counted, reduced
from moe_lab.analysis.requirements import of_tokens
from moe_lab.errors import AnalysisError, require
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots


class Pairing(StrEnum):
    """The slots of two layers that make a pair."""

    ALL = "all"
    RANK_ALIGNED = "rank_aligned"


@of_tokens
def transitions(
    trace: Trace,
    pairs: Sequence[tuple[int, int]] | None = None,
    *,
    pairing: Pairing | str = Pairing.ALL,
) -> pl.DataFrame:
    """Counts of (expert in one layer, expert in another) over the same tokens, zero-compute experts
    included.

    Args:
        trace: an opened trace.
        pairs: (from, to) layers; each traced layer with the next traced one by default. The result
            has E x E rows a pair.
        pairing: "all" slots with all, or OLMoE's "rank_aligned", where slot r of one layer meets
            slot r of the other only (slots in the order in which the trace lists them).

    Returns:
        [from_layer, to_layer, expert_from, expert_to, count, given_from, expected, lift], pairs
        that never met included: ``given_from`` is the share of expert_from's pairs that lead to
        expert_to; ``expected`` is the product of the two marginal counts over the number of pairs,
        which layers that choose independently of each other would show, and ``lift = count /
        expected``. Null where not defined.

    Raises:
        AnalysisError: a layer was not traced, or an unknown pairing.
    """
    require(
        pairing in list(Pairing),
        f"a pairing among {', '.join(Pairing)}",
        repr(pairing),
        error=AnalysisError,
        field="pairing",
    )
    if pairs is None:
        pairs = [(a.layer, b.layer) for a, b in pairwise(by_layer(trace))]
    chosen = [chosen_layers(trace, [layer])[0] for pair in pairs for layer in pair]
    sides = list(zip(chosen[::2], chosen[1::2], strict=True))
    tables = reduced(
        Sum(
            _transition_cells,
            (trace,),
            (source.layer, target.layer),
            counted((source.num_choices, target.num_choices)),
            (source, target, Pairing(pairing)),
        )
        for source, target in sides
    )
    frames = [_transitions(*side, counts) for side, counts in zip(sides, tables, strict=True)]
    return pl.concat(frames) if frames else pl.DataFrame(schema=_SCHEMA)


def _transition_cells(
    trace: Trace, source: LayerMeta, target: LayerMeta, pairing: Pairing
) -> pl.DataFrame:
    """Cells of [E, E']: pairs of slots of the two layers in the same token."""
    bins, width = source.num_choices + 1, target.num_choices + 1
    total = np.zeros(bins * width, dtype=np.int64)
    columns = [*KEY, "experts"]
    right = f"layer {target.layer}"
    for left, other in aligned(
        trace.batches(source.layer, columns), lambda: trace.batches(target.layer, columns), right
    ):
        from_TK, to_TK = (
            expert_slots(source, left["experts"]),
            expert_slots(target, other["experts"]),
        )
        for part in chunks(len(from_TK)):
            _add(
                total,
                _bins(from_TK[part], bins - 1) * width,
                _bins(to_TK[part], width - 1),
                pairing,
            )
    return cells(total.reshape(bins, width)[:-1, :-1])


def _bins(ids_TK: NDArray[np.uint16], empty: int) -> NDArray[np.int64]:
    """[K, T] ids with unused slots in the last bin."""
    ids_KT = np.ascontiguousarray(ids_TK.T).astype(np.int64)
    ids_KT[ids_KT == EMPTY_SLOT] = empty
    return ids_KT


def _add(
    total: NDArray[np.int64],
    rows_KT: NDArray[np.int64],
    columns_KT: NDArray[np.int64],
    pairing: Pairing,
) -> None:
    small = total.size <= 4 * rows_KT.shape[1]
    for a, row in enumerate(rows_KT):
        for b, column in enumerate(columns_KT):
            if pairing is Pairing.RANK_ALIGNED and a != b:
                continue
            if small:
                total += np.bincount(row + column, minlength=total.size)
            else:
                np.add.at(total, row + column, 1)


def _transitions(source: LayerMeta, target: LayerMeta, counts: NDArray[np.int64]) -> pl.DataFrame:
    a, b = (grid.ravel() for grid in np.indices(counts.shape))
    rows, columns, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    product = rows[a] * columns[b].astype(np.float64)
    expected_count = product / total if total else product
    values = {"count": counts.ravel(), "given_from": over(counts.ravel(), rows[a])}
    values |= {"expected": expected_count, "lift": over(counts.ravel(), expected_count)}
    layers = [
        pl.lit(layer.layer, pl.UInt32).alias(name)
        for name, layer in (("from_layer", source), ("to_layer", target))
    ]
    experts = {"expert_from": a.astype(np.uint16), "expert_to": b.astype(np.uint16)}
    return nulls(pl.DataFrame({**experts, **values}).select(*layers, pl.all()))


_SCHEMA = {
    "from_layer": pl.UInt32,
    "to_layer": pl.UInt32,
    "expert_from": pl.UInt16,
    "expert_to": pl.UInt16,
    "count": pl.Int64,
} | (dict.fromkeys(("given_from", "expected", "lift"), pl.Float64))
