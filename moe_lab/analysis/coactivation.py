"""Experts that run together on a token: all pairs of a layer, beside the counts that their loads
alone would give.

(OLMoE's published script counts only pairs that are neighbours in rank order; here all k (k - 1) /
2 pairs of a token count once.)
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import chosen_layers, chunks, slots
from moe_lab.analysis.document_sums import nulls, over
from moe_lab.analysis.map_reduce import Sum, cells, counted, reduced
from moe_lab.analysis.requirements import of_tokens
from moe_lab.trace import LayerMeta, Trace

OPTIMAL_ORDER = 256
"""Up to this many experts the leaves of the clustering are put in their best order, which takes
cubic time.
"""


@of_tokens
def coactivation(trace: Trace, layers: Sequence[int] | None = None) -> pl.DataFrame:
    """Co-activation of every pair of experts, zero-compute ones included.

    Args:
        trace: an opened trace.
        layers: layers to count; all by default. The result has E (E - 1) / 2 rows a layer.

    Returns:
        [layer, expert_a, expert_b, count, given_a, given_b, expected, lift] for expert_a <
        expert_b, pairs that never met included: ``count`` tokens that ran both; ``given_a`` is the
        share of expert_a's tokens that also ran expert_b (OLMoE, arXiv 2409.02060 section 5.2),
        ``given_b`` the other way; ``expected`` is proportional to the product of the two loads and
        sums to the number of pairs, and ``lift = count / expected`` is 1 where the two keep to
        their loads. Null where an expert never ran.
    """
    chosen = chosen_layers(trace, layers)
    tables = reduced(
        Sum(_pair_cells, (trace,), (layer.layer,), counted((layer.num_choices,) * 2), (layer,))
        for layer in chosen
    )
    return pl.concat(map(_pairs, chosen, tables))


def coactivation_order(pairs: pl.DataFrame) -> pl.DataFrame:
    """An order of each layer's experts in which those that run together stand together: leaves of
    an average-linkage clustering.

    Args:
        pairs: as ``coactivation`` returns.

    Returns:
        [layer, place, expert]: ``place`` 0.. of each expert. The distance of two experts is ``1 /
            (1 + lift)``, 1 where that is not
        defined, so dead experts come last or alone.
    """
    frames = []
    for layer in pairs.partition_by("layer", maintain_order=True):
        order = _leaves(layer)
        frames.append(
            pl.DataFrame(
                {"place": np.arange(len(order), dtype=np.uint16), "expert": order.astype(np.uint16)}
            ).select(pl.lit(layer["layer"][0], pl.UInt32).alias("layer"), pl.all())
        )
    schema = {"layer": pl.UInt32, "place": pl.UInt16, "expert": pl.UInt16}
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)


def _pair_cells(trace: Trace, layer: LayerMeta) -> pl.DataFrame:
    """Cells of [E, E], symmetric: tokens that ran both experts; the diagonal holds the tokens of
    each expert, whose slot is in one pair with each other slot of its token, used or not.
    """
    unused, slots_K = layer.num_choices, max(layer.top_k, 2)  # a bin, and at least one pair
    total = np.zeros((unused + 1) ** 2, dtype=np.int64)
    for batch in slots(trace, layer):
        for part in chunks(len(batch.ids)):
            ids_TK = batch.ids[part]
            ids_KT = np.full((slots_K, len(ids_TK)), unused, dtype=np.int64)
            np.minimum(ids_TK.T, unused, out=ids_KT[: layer.top_k])  # EMPTY_SLOT is above
            _add_pairs(total, ids_KT, unused + 1)
    ordered = total.reshape(unused + 1, unused + 1)
    pairs = (ordered + ordered.T)[:-1]
    load = pairs.sum(axis=1) // (slots_K - 1)
    np.fill_diagonal(pairs, load)
    return cells(pairs[:, :-1])


def _add_pairs(total: NDArray[np.int64], ids_KT: NDArray[np.int64], bins: int) -> None:
    """Count each unordered pair of different slots once."""
    small = total.size <= 4 * ids_KT.shape[1]
    for a, ids_T in enumerate(ids_KT):
        row = ids_T * bins
        for other_T in ids_KT[a + 1 :]:
            if small:
                total += np.bincount(row + other_T, minlength=total.size)
            else:
                np.add.at(total, row + other_T, 1)


def _pairs(layer: LayerMeta, counts_EE: NDArray[np.int64]) -> pl.DataFrame:
    a, b = np.triu_indices(layer.num_choices, k=1)
    load = np.diag(counts_EE).astype(np.float64)
    count, product = counts_EE[a, b], load[a] * load[b]
    expected_count = product * (count.sum() / product.sum()) if product.sum() else product
    frame = pl.DataFrame(
        {"expert_a": a.astype(np.uint16), "expert_b": b.astype(np.uint16), "count": count}
        | {"given_a": over(count, load[a]), "given_b": over(count, load[b])}
        | {"expected": expected_count, "lift": over(count, expected_count)}
    )
    return nulls(frame.select(pl.lit(layer.layer, pl.UInt32).alias("layer"), pl.all()))


def _leaves(pairs: pl.DataFrame) -> NDArray[np.int64]:
    from scipy.cluster.hierarchy import leaves_list, linkage

    experts = int(pairs["expert_b"].max()) + 1  # type: ignore[arg-type]
    if experts < 3:
        return np.arange(experts)
    ordered = pairs.sort("expert_a", "expert_b")
    distance = 1 / (1 + ordered["lift"].fill_null(0).to_numpy())
    return leaves_list(
        linkage(distance, "average", optimal_ordering=experts <= OPTIMAL_ORDER)
    ).astype(np.int64)
