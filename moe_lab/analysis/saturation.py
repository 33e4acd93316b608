"""Router saturation: how early in training the routing of a text is what it will be in the end
(OLMoE, arXiv 2409.02060, section 5.1).

For the same text through checkpoints of one model, the saturation of a layer at checkpoint t is the
mean over tokens of ``|E(t) and E(last)| / k``, with E the set of the k chosen experts; at random k
/ E. Top-1 compares the first choice alone; at random 1 / E.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import KEY, Slots, aligned, by_layer, first_choices, shared, used
from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import (
    Documents,
    documents,
    nulls,
    ratio_interval,
    unit_sums,
    unit_table,
)
from moe_lab.analysis.map_reduce import Sum, appended, cells, counted, reduced
from moe_lab.errors import AnalysisError, TraceError, expected, require
from moe_lab.trace import LayerMeta, Trace
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots


def saturation(
    traces: Sequence[Trace] | Mapping[str, Trace],
    last: Trace | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """Overlap of each checkpoint's routing with that of the last one, on the same tokens.

    Args:
        traces: traces of the same text through checkpoints, oldest first, or by name (such as the
            step).
        last: the trace that the others are compared with; by default the last of ``traces``, which
            is then left out of the result.
        resamples, seed, level: of the percentile interval from resampling documents.

    Returns:
        [layer, checkpoint, place, choice, n_tokens, n_docs, saturation, lo, hi, chance,
        chance_by_load]: ``checkpoint`` is the name (or the number in the sequence) and ``place``
        its order; ``choice`` is "top-1" (the slot of the largest weight; the first slot in traces
        without weights) or "top-k"; with a varying number of slots, top-k divides by those that the
        last checkpoint used, and tokens without any are left out. ``chance`` is that of choosing
        evenly, k / E or 1 / E; ``chance_by_load`` that of two routers which keep the measured loads
        of both checkpoints and never look at the token.

    Raises:
        AnalysisError: fewer than two checkpoints, or ones with other layers, experts or tokens.
    """
    named = (
        dict(traces)
        if isinstance(traces, Mapping)
        else {str(number): trace for number, trace in enumerate(traces)}
    )
    if last is None:
        require(
            len(named) >= 2,
            "at least two checkpoints of one model",
            len(named),
            "tracing an earlier checkpoint as well",
            error=AnalysisError,
            field="traces",
        )
        last = named.pop(list(named)[-1])
    resampling, docs, rows = Resampling(resamples, seed, level), documents(last, 3), []
    for place, (name, trace) in enumerate(named.items()):
        require_same_tokens(trace, last)
        overlaps = overlap_rows(trace, last, docs, resampling)
        for layer, found in zip(by_layer(last), overlaps, strict=True):
            rows += [
                {"layer": layer.layer, "checkpoint": name, "place": place, **row} for row in found
            ]
    return nulls(pl.DataFrame(rows, schema=_SCHEMA)).sort("layer", "choice", "place")


def paired_slots(
    first: Trace, second: Trace, layer: LayerMeta, columns: Sequence[str] = ()
) -> Iterator[tuple[Slots, Slots]]:
    """A layer of two traces side by side, rows of the same (doc, pos)."""
    names = list(dict.fromkeys([*KEY, "experts", *columns]))
    right = f"layer {layer.layer} of the other trace"
    for one, other in aligned(
        first.batches(layer.layer, names), lambda: second.batches(layer.layer, names), right
    ):
        yield (
            Slots(one, expert_slots(layer, one["experts"])),
            Slots(other, expert_slots(layer, other["experts"])),
        )


def require_same_tokens(first: Trace, second: Trace) -> None:
    """Raise ``AnalysisError`` unless two traces have the same layers, experts and tokens."""
    if problem := difference(first, second):
        raise AnalysisError(
            expected(
                "traces of the same text through the same layers",
                problem,
                "tracing both checkpoints on one text",
            ),
            field="tokens",
        )


def difference(first: Trace, second: Trace) -> str:
    """Why the tokens of two traces cannot be compared one by one; empty where they can."""
    shapes = [
        [(layer.layer, layer.num_experts, layer.num_zero_experts) for layer in by_layer(trace)]
        for trace in (first, second)
    ]
    if shapes[0] != shapes[1]:
        return "other layers or numbers of experts"
    if first.num_tokens != second.num_tokens:
        return f"{first.num_tokens} and {second.num_tokens} tokens"
    if not all(trace.has_tokens for trace in (first, second)):
        return ""  # no ids to compare; keys are compared as the rows are read
    try:
        (others,) = reduced([Sum(_other_ids, (first, second), (None,), counted((1,)))])
    except TraceError as error:
        return str(error)
    return f"{others[0]} tokens of other ids" if others[0] else ""


def _other_ids(first: Trace, second: Trace) -> pl.DataFrame:
    names = [*KEY, "token_id"]
    pairs = aligned(
        first.batches(None, names), lambda: second.batches(None, names), "the other trace"
    )
    return cells(np.array([sum((one["token_id"] != two["token_id"]).sum() for one, two in pairs)]))


Rows = list[dict[str, str | int | float]]


def overlap_rows(
    trace: Trace, last: Trace, docs: Documents, resampling: Resampling
) -> Iterator[Rows]:
    """Overlap of each layer of two traces: a row for the first choice and one for all slots, as
    ``saturation`` returns them.
    """
    layers = by_layer(last)
    found = reduced(
        Sum(_overlaps, (trace, last), (layer.layer,), appended, (layer, docs)) for layer in layers
    )
    for layer, frames in zip(layers, found, strict=True):
        sums_U3, loads = np.zeros((docs.units, 3)), np.zeros((2, 2, layer.num_choices), np.int64)
        for frame in frames:
            sums_U3 = unit_table(docs, 3)(sums_U3, frame.drop_nulls("unit"))
            loads = counted(loads.shape)(loads, frame.drop_nulls("cell"))
        yield _overlap_rows(layer, sums_U3, loads, docs, resampling)


def _overlaps(trace: Trace, last: Trace, layer: LayerMeta, docs: Documents) -> pl.DataFrame:
    """Sums of units: tokens with a slot, those with the same first choice, shared part; and cells
    of loads [first choices or all slots, this trace or the last, E].
    """
    loads = np.zeros((2, 2, layer.num_choices), dtype=np.int64)

    def batches() -> Iterator[tuple[NDArray, NDArray]]:
        for now, final in paired_slots(trace, last, layer, ["weights"]):
            firsts = first_choices(layer, now), first_choices(layer, final)
            slots_T = used(final.ids)
            has = slots_T > 0
            share_T = np.zeros(len(has))
            np.divide(shared(final.ids, now.ids), slots_T, out=share_T, where=has)
            for side, (batch, first) in enumerate(zip((now, final), firsts, strict=True)):
                loads[0, side] += _load(first, layer)
                loads[1, side] += _load(batch.ids, layer)
            same = (firsts[0] == firsts[1]) & has
            yield now.frame["doc"].to_numpy(), np.stack([has, same, share_T], axis=1)

    return pl.concat([unit_sums(docs, batches(), 3), cells(loads)], how="diagonal")


def _overlap_rows(
    layer: LayerMeta,
    sums_U3: Floats,
    loads: NDArray[np.int64],
    docs: Documents,
    resampling: Resampling,
) -> Rows:
    tokens, slots = int(sums_U3[:, 0].sum()), loads[1, 1].sum()
    rates = loads / max(tokens, 1)
    found = zip(
        *ratio_interval(sums_U3, resampling),
        ("top-1", "top-k"),
        (1.0, slots / max(tokens, 1)),
        rates,
        strict=True,
    )
    return [
        {
            "choice": choice,
            "n_tokens": tokens,
            "n_docs": len(docs.docs),
            "saturation": value,
            "lo": low,
            "hi": high,
        }
        | {
            "chance": width / layer.num_choices,
            "chance_by_load": float(rate[0] @ rate[1] / width) if width else np.nan,
        }
        for value, low, high, choice, width, rate in found
    ]


def _load(ids: NDArray[np.uint16], layer: LayerMeta) -> NDArray[np.int64]:
    return np.bincount(ids[ids != EMPTY_SLOT], minlength=layer.num_choices)


_SCHEMA = {
    "layer": pl.UInt32,
    "checkpoint": pl.String,
    "place": pl.UInt32,
    "choice": pl.String,
    "n_tokens": pl.Int64,
    "n_docs": pl.Int64,
}
_SCHEMA |= dict.fromkeys(("saturation", "lo", "hi", "chance", "chance_by_load"), pl.Float64)
