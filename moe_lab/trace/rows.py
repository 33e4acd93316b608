"""From a ``Routing`` to the rows of a trace: torch tensors in, compact arrays, then one polars
frame out; no Python loop over tokens.

Shape letters: T tokens, K slots (``top_k`` of the layer's metadata).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.trace.schema import OUTPUT_RATIO, ROUTING_COLUMNS, LayerMeta

if TYPE_CHECKING:  # readers of traces need no torch, which takes two seconds to import
    from torch import Tensor

    from moe_lab.routing import Routing
    from moe_lab.trace.score_spread import Spread

EMPTY_SLOT = 65_535
"""Stands for an unused slot in buffered id arrays; never an expert id (see ``schema.MAX_CHOICES``),
never on disk.
"""

Rows: TypeAlias = dict[str, np.ndarray]
"""Column name -> array over T; ``experts`` and ``weights`` are [T, K] with the used slots first."""


def routing_rows(
    layer: LayerMeta, doc: np.ndarray | Tensor, pos: np.ndarray | Tensor, routing: Routing
) -> Rows:
    """Compact arrays of the valid tokens of one routing.

    Args:
        layer: what the layer is made of; the routing must agree.
        doc, pos: [T] document number and position in it, also for tokens that are not valid.
        routing: the layer's decisions for those T tokens.

    Raises:
        TraceError: shapes or expert numbers that disagree, ids out of range or repeated in a token,
            weights or scores not finite.
    """
    from moe_lab.trace.score_spread import spread_of_scores

    where = f"layer {layer.layer}"
    if (routing.num_experts, routing.num_zero_experts) != (
        layer.num_experts,
        layer.num_zero_experts,
    ):
        want, got = (
            f"{layer.num_experts} + {layer.num_zero_experts}",
            f"{routing.num_experts} + {routing.num_zero_experts}",
        )
        raise TraceError(
            f"{where}: " + expected(f"{want} real + zero-compute experts", got), field="num_experts"
        )
    valid = slice(None) if routing.valid is None else routing.valid
    keep = slice(None) if routing.valid is None else _numpy(routing.valid)
    indices_TK = routing.indices[valid]
    return slot_rows(
        layer,
        _numbers(where, "doc", doc, routing.num_tokens)[keep],
        _numbers(where, "pos", pos, routing.num_tokens)[keep],
        _numpy(indices_TK),
        _numpy(routing.weights[valid]).astype(np.float32),
        _numpy(routing.dropped()[valid]).sum(axis=1),
        lambda: spread_of_scores(routing.scores.detach()[valid].float(), indices_TK),
    )


def slot_rows(
    layer: LayerMeta,
    doc: np.ndarray,
    pos: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray | None,
    dropped: np.ndarray | None,
    spread: Callable[[], Spread] | None,
) -> Rows:
    """Compact arrays of T tokens from what was recorded of them.

    Args:
        layer: what the layer is made of.
        doc, pos: [T] u32.
        ids: [T, K] expert ids, -1 where a slot was not used.
        weights: [T, K] f32, or None where the source has none.
        dropped: [T] slots lost to capacity, or None where nothing is dropped.
        spread: gives entropy and margin once the ids are known to be right, or None where the
            source has no scores.

    Raises:
        TraceError: ids out of range or repeated in a token, weights or statistics that are not
            finite.
    """
    where = f"layer {layer.layer}"
    used = ids >= 0
    check_slots(layer, ids, weights, used)
    real = used & (ids < layer.num_experts)
    ffn_count = real.sum(axis=1).astype(np.uint8)
    rows = {
        "doc": doc,
        "pos": pos,
        "ffn_count": ffn_count,
        "zero_count": used.sum(axis=1).astype(np.uint8) - ffn_count,
        "dropped": np.zeros(len(doc), np.uint8) if dropped is None else dropped.astype(np.uint8),
    }
    if weights is not None:
        rows["gate_mass_ffn"] = _rounded(
            np.where(real, weights, np.float32(0)).sum(axis=1, dtype=np.float64)
        )
    if spread is not None:
        rows["entropy"], rows["margin"] = (_numpy(column).astype(np.float32) for column in spread())
        require(
            np.isfinite(rows["entropy"]).all() and not np.isnan(rows["margin"]).any(),
            "finite router scores",
            "NaN or infinity",
            "lowering the learning rate",
            error=TraceError,
            where=where,
            field="scores",
        )
    rows["experts"], compact_weights = _compact(layer, ids, weights, used)
    if compact_weights is not None:
        rows["weights"] = compact_weights
    return rows


def routing_frame(rows: Rows) -> pl.DataFrame:
    """The Parquet table of ``routing_rows``: ``ROUTING_COLUMNS`` (null where the rows lack one),
    and ``output_ratio`` if they have it.
    """
    count, slots = rows["experts"].shape
    lengths = rows["ffn_count"].astype(np.uint32) + rows["zero_count"]
    ragged = bool((lengths < slots).any())
    columns = {}
    for name, dtype in (
        *ROUTING_COLUMNS.items(),
        *([(OUTPUT_RATIO, pl.Float32())] if OUTPUT_RATIO in rows else []),
    ):
        column = (
            pl.Series(name, rows[name])
            if name in rows
            else pl.repeat(None, count, dtype=dtype, eager=True)
        )
        if name in rows and rows[name].ndim == 2:
            column = column.arr.to_list()
        columns[name] = column.cast(dtype)
    frame = pl.DataFrame(columns).with_columns(pl.when(pl.col("margin").is_finite()).then("margin"))
    if ragged:
        lists = [name for name in ("experts", "weights") if name in rows]
        frame = frame.with_columns(pl.col(lists).list.head(pl.lit(pl.Series(lengths))))
    return frame


def rows_of(layer: LayerMeta, batch: pl.DataFrame, offset: int = 0) -> Rows:
    """The inverse of ``routing_frame``; documents are shifted by ``offset``."""
    lengths = batch["experts"].list.len().to_numpy()
    rows = {
        name: batch[name].to_numpy()
        for name in batch.columns
        if name not in ("experts", "weights")
        and (batch.is_empty() or not batch[name].is_null().all())
    }
    rows["doc"] = rows["doc"] + np.uint32(offset)
    if "margin" in rows:
        rows["margin"] = batch["margin"].fill_null(float("inf")).to_numpy()
    elif "entropy" in rows:
        rows["margin"] = np.full(len(lengths), np.inf, np.float32)
    rows["experts"] = expert_slots(layer, batch["experts"])
    if not batch["weights"].is_null().all() or batch.is_empty():
        weights = np.zeros((len(lengths), layer.top_k), np.float16)
        weights[np.arange(layer.top_k) < lengths[:, None]] = (
            batch["weights"].explode().drop_nulls().to_numpy()
        )
        rows["weights"] = weights
    return rows


def expert_slots(layer: LayerMeta, experts: pl.Series) -> np.ndarray:
    """[T, top_k] u16 ids from lists of ids, ``EMPTY_SLOT`` where a slot was not used: the inverse
    of what ``routing_frame`` does.

    Raises ``TraceError`` for null ids, ids out of range, or more than ``top_k`` of them for a
    token.
    """
    where = f"layer {layer.layer}"
    lengths = experts.list.len().to_numpy()
    flat = experts.explode().drop_nulls().to_numpy()
    require(
        len(flat) == lengths.sum(),
        "no null expert ids",
        "nulls",
        error=TraceError,
        where=where,
        field="experts",
    )
    if len(flat) and flat.max() >= layer.num_choices:
        raise TraceError(
            f"{where}: "
            + expected(f"expert ids between 0 and {layer.num_choices - 1}", int(flat.max())),
            field="experts",
        )
    if len(lengths) and lengths.max() > layer.top_k:
        raise TraceError(
            f"{where}: "
            + expected(f"at most top_k = {layer.top_k} experts for a token", int(lengths.max())),
            field="experts",
        )
    if len(flat) == len(lengths) * layer.top_k:
        return flat.reshape(-1, layer.top_k)
    ids_TK = np.full((len(lengths), layer.top_k), EMPTY_SLOT, dtype=np.uint16)
    ids_TK[np.arange(layer.top_k) < lengths[:, None]] = flat
    return ids_TK


def key_checksum(doc: np.ndarray, pos: np.ndarray) -> int:
    """Order-independent checksum of (doc, pos) pairs: the sum of their splitmix64 hashes modulo
    2^64.
    """
    key = doc.astype(np.uint64) << np.uint64(32) | pos.astype(np.uint64)
    key += np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((key ^ (key >> np.uint64(31))).sum(dtype=np.uint64))


def check_slots(
    layer: LayerMeta, ids: np.ndarray, weights: np.ndarray | None, used: np.ndarray
) -> None:
    """Raise ``TraceError`` unless ids are in range and not repeated in a token, at most ``top_k``
    are used, and their weights fit f16.
    """
    where = f"layer {layer.layer}"
    if ids.size == 0:
        return
    if ids.min() < -1 or ids.max() >= layer.num_choices:
        raise TraceError(
            f"{where}: "
            + expected(
                f"expert ids between -1 and {layer.num_choices - 1}", f"{ids.min()}..{ids.max()}"
            ),
            field="experts",
        )
    if (most := int(used.sum(axis=1).max())) > layer.top_k:
        raise TraceError(
            f"{where}: " + expected(f"at most top_k = {layer.top_k} experts for a token", most),
            field="experts",
        )
    # Sorting two-byte integers is several times faster; 65,535 is no expert and stands for -1.
    ordered = np.sort(ids.astype(np.uint16), axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY_SLOT)).any():
        raise TraceError(
            f"{where}: " + expected("each token to name an expert at most once", "a repeated id"),
            field="experts",
        )
    limit = float(np.finfo(np.float16).max)
    if weights is not None and not (np.abs(weights) <= limit)[used].all():
        raise TraceError(
            f"{where}: "
            + expected(f"finite gate weights of at most {limit:.0f}", "NaN, infinity or more"),
            field="weights",
        )


def _compact(
    layer: LayerMeta, ids: np.ndarray, weights: np.ndarray | None, used: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """[T, top_k] u16 ids and f16 weights with the used slots first, in slot order."""
    if not used.all():
        order = np.argsort(~used, axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        weights = None if weights is None else np.take_along_axis(weights, order, axis=1)
    width = min(layer.top_k, ids.shape[1])
    ids_TK = _widened(
        np.where(ids[:, :width] < 0, EMPTY_SLOT, ids[:, :width]), layer.top_k, np.uint16, EMPTY_SLOT
    )
    return ids_TK, None if weights is None else _widened(
        weights[:, :width], layer.top_k, np.float16, 0
    )


def _widened(values: np.ndarray, width: int, dtype: type, fill: int) -> np.ndarray:
    if values.shape[1] == width:
        return values.astype(dtype)
    wide = np.full((len(values), width), fill, dtype=dtype)
    wide[:, : values.shape[1]] = values
    return wide


def _rounded(values: np.ndarray) -> np.ndarray:
    """f32 in steps of 2^-21: weights that sum to one do so on disk too, where the noise of the sum
    would not compress.
    """
    return (np.rint(values * 2**21) / 2**21).astype(np.float32)


def _numbers(where: str, name: str, values: np.ndarray | Tensor, count: int) -> np.ndarray:
    """[count] u32, from any integers that fit."""
    array = values if isinstance(values, np.ndarray) else _numpy(values)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise TraceError(
            f"{where}: "
            + expected(
                f"{name} to hold one integer for each of {count} tokens",
                f"{array.dtype} of shape {list(array.shape)}",
            ),
            field=name,
        )
    if array.size and (array.min() < 0 or array.max() >= 2**32):
        raise TraceError(
            f"{where}: "
            + expected(f"{name} between 0 and {2**32 - 1}", f"{array.min()}..{array.max()}"),
            field=name,
        )
    return array.astype(np.uint32)


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()  # bfloat16 has no numpy type
    return tensor.cpu().numpy()
