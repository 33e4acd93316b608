"""Counts of the slots that each expert of a layer runs: in all, by group of tokens, and by unit of
documents.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import (
    KEY,
    MAX_CELLS,
    Ints,
    add_counts,
    aligned,
    by_layer,
    chunks,
)
from moe_lab.analysis.document_sums import Documents
from moe_lab.analysis.map_reduce import Sum, cells, counted, reduced
from moe_lab.analysis.token_groups import Grouping
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.rows import expert_slots


def layer_counts(trace: Trace, layers: Sequence[LayerMeta]) -> Iterator[NDArray[np.int64]]:
    """[E] slots of each expert, for each layer: from the manifest where it lists them."""
    if trace.manifest.has_counts:
        return map(trace.layer_counts, layers)
    return reduced(
        Sum(_layer_cells, (trace,), (layer.layer,), counted((layer.num_choices,)), (layer,))
        for layer in layers
    )


def counts_of(trace: Trace) -> pl.DataFrame:
    """``trace.counts()``, by the workers of ``mapped``."""
    layers = by_layer(trace)
    return pl.concat(map(_of_experts, layers, layer_counts(trace, layers)))


def counts_by(trace: Trace, groups: Grouping) -> pl.DataFrame:
    """[layer, <name of the groups>, expert, is_zero, count]: slots per expert for each group, every
    expert present in every group.
    """
    return pl.concat(
        _of_experts(layer, table_GE, groups.values[first : first + len(table_GE)])
        for layer, first, table_GE in group_counts(trace, by_layer(trace), groups)
    )


def group_counts(
    trace: Trace, layers: Sequence[LayerMeta], groups: Grouping
) -> Iterator[tuple[LayerMeta, int, NDArray]]:
    """Slots of each expert in each group: (layer, first group, table [G', E]) for successive layers
    and blocks of groups, of bounded size.

    Blocks of a layer are as many as the table needs to stay under ``MAX_CELLS`` cells; each reads
    the layer once.
    """
    blocks = [
        (layer, first, min(MAX_CELLS // layer.num_choices or 1, len(groups) - first))
        for layer in layers
        for first in range(0, max(len(groups), 1), MAX_CELLS // layer.num_choices or 1)
    ]
    groups = groups.held(trace)
    dtype = np.uint32 if trace.num_tokens < 2**32 else np.int64
    tables = reduced(
        Sum(
            _cells,
            (trace,),
            (layer.layer, None),
            counted((size, layer.num_choices), dtype),
            (layer, None, groups, first, size),
            groups.whole,
            size=size * layer.num_choices,
        )
        for layer, first, size in blocks
    )
    return ((layer, first, table) for (layer, first, _), table in zip(blocks, tables, strict=True))


def unit_counts(
    trace: Trace, layers: Sequence[LayerMeta], docs: Documents, groups: Grouping | None = None
) -> Iterator[NDArray[np.uint32]]:
    """[U, G, E] slots of each expert by each unit's tokens of each group (G = 1 without groups),
    for each layer.
    """
    size = 1 if groups is None else len(groups)  # there may be no group
    groups = None if groups is None else groups.held(trace)
    return reduced(
        Sum(
            _cells,
            (trace,),
            (layer.layer,) if groups is None else (layer.layer, None),
            counted((docs.units, size, layer.num_choices), np.uint32),
            (layer, docs, groups, 0, size),
            groups is not None and groups.whole,
            size=docs.units * size * layer.num_choices,
        )
        for layer in layers
    )


def coded_batches(
    trace: Trace, layer: LayerMeta, groups: Grouping | None, *columns: str
) -> Iterator[tuple[pl.DataFrame, Ints]]:
    """Batches of a layer: doc, pos, experts and ``columns``, with the code of each token's group
    [T] (-1 where it is in none; 0 without groups).
    """
    routing = trace.batches(layer.layer, [*KEY, "experts", *columns])
    if groups is None:
        yield from ((frame, np.zeros(frame.height, dtype=np.int64)) for frame in routing)
        return
    for frame, found in aligned(routing, lambda: groups.codes(trace), "the token table"):
        yield frame, found["code"].cast(pl.Int64).fill_null(-1).to_numpy()


def _layer_cells(trace: Trace, layer: LayerMeta) -> pl.DataFrame:
    return cells(trace.layer_counts(layer))


def _cells(
    trace: Trace,
    layer: LayerMeta,
    docs: Documents | None,
    groups: Grouping | None,
    first: int,
    size: int,
) -> pl.DataFrame:
    """Cells of [U, size, E], of groups ``first`` .. ``first + size - 1``."""
    rows, bins = size * (docs.units if docs else 1), layer.num_choices + 1
    table = np.zeros((rows + 1) * bins, dtype=np.uint32)  # the last row and bin are not counted
    for frame, codes_T in coded_batches(trace, layer, groups):
        ids_TK = expert_slots(layer, frame["experts"])
        row_T = codes_T - first
        if docs:
            row_T = row_T + docs.unit(frame["doc"].to_numpy()) * size
        inside = (codes_T >= first) & (codes_T < first + size)
        row_T = np.where(inside, row_T, rows) * bins
        for part in chunks(len(ids_TK)):
            expert = np.minimum(ids_TK[part], layer.num_choices)  # also of EMPTY_SLOT
            add_counts(table, (row_T[part, None] + expert).ravel())
    return cells(table.reshape(-1, bins)[:-1, :-1])


def _of_experts(layer: LayerMeta, counts: NDArray, groups: pl.Series | None = None) -> pl.DataFrame:
    experts = np.arange(layer.num_choices)
    number = 1 if groups is None else len(groups)
    columns = {
        "layer": pl.repeat(layer.layer, counts.size, dtype=pl.UInt32, eager=True),
        "expert": np.tile(experts.astype(np.uint16), number),
        "is_zero": np.tile(experts >= layer.num_experts, number),
        "count": counts.ravel().astype(np.int64),
    }
    frame = pl.DataFrame(columns)
    if groups is not None:
        named = groups.gather(np.repeat(np.arange(number), layer.num_choices))
        frame.insert_column(1, named)
    return frame
