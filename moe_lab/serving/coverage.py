"""``coverage``: the fewest experts that hold a share of what a layer does, and how much they hold
on text that they were not chosen on; ``calibration_tokens``: how many tokens until every expert has
enough of them.

Shape letters: U units of documents, G groups, L layers, E real experts.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import by_layer
from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS, RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import Documents, documents, nulls
from moe_lab.analysis.map_reduce import Fold, Sum, cells, counted, reduced
from moe_lab.analysis.slot_counts import coded_batches, unit_counts
from moe_lab.analysis.token_groups import Grouping, grouping
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.files import write_json
from moe_lab.serving.expert_sets import require_real_experts, require_tokens
from moe_lab.trace import LayerMeta, Trace

MEASURES = ("slots", "gate_mass")


def coverage(
    trace: Trace,
    shares: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    *,
    of: str = "slots",
    by: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """The fewest experts of each layer that hold each share, chosen on one half of the documents
    and judged on the other.

    Args:
        trace: also one made up from counts, for ``of="slots"``.
        shares: of all real experts' slots or gate mass, above 0 and at most 1.
        of: "slots" or "gate_mass" (sum of gate weights).
        by: a token column; each of its values has lists of its own.

    Returns:
        [layer, (by,) share, n_experts, chosen, held, lo, hi, experts, n_docs, note]: ``chosen`` is
        what the list holds on its own half, ``held`` on the other one, with an interval over its
        documents; ``experts`` are ids, the most used first.

    Raises:
        AnalysisError: aliased experts; one document; gate mass of a trace without weights.

    Example:
        >>> coverage(open_trace("traces/x"), [0.9], of="gate_mass")
    """
    require_real_experts(trace, "coverage")
    require(of in MEASURES, f"a measure among {', '.join(MEASURES)}", repr(of))
    require(all(0 < share <= 1 for share in shares), "shares above 0 and at most 1", list(shares))
    if of == "gate_mass" and not trace.meta.has_weights:
        raise AnalysisError(expected("a trace with gate weights", "one without", 'of="slots"'))
    groups = None if by is None else grouping(trace, by)
    layers = by_layer(trace)
    size = max(layer.num_choices for layer in layers) * (1 if groups is None else len(groups))
    docs = documents(trace, size)
    if docs.units < 2:
        raise AnalysisError(
            expected("at least 2 documents to choose on one and judge on another", docs.units)
        )
    half = np.random.default_rng(seed).permutation(docs.units) < docs.units // 2
    resampling = Resampling(resamples, seed, level)
    rows = []
    for layer in layers:
        table_UGE = _sums(trace, layer, docs, groups, of)
        for place in range(table_UGE.shape[1]):
            known, unseen = table_UGE[half, place], table_UGE[~half, place]
            value = [] if groups is None else [groups.values[place]]
            rows.extend(
                [layer.layer, *value, share, *_list(known, unseen, share, resampling)]
                for share in shares
            )
    schema = {
        "layer": pl.UInt32,
        **({} if groups is None else {groups.name: groups.values.dtype}),
        "share": pl.Float64,
        "n_experts": pl.Int64,
        **dict.fromkeys(("chosen", "held", "lo", "hi"), pl.Float64),
        "experts": pl.List(pl.Int64),
        "n_docs": pl.Int64,
        "note": pl.String,
    }
    return nulls(pl.DataFrame(rows, schema=schema, orient="row"))


def _list(known: Floats, unseen: Floats, share: float, resampling: Resampling) -> list:
    total_E = known.sum(axis=0)
    order = np.argsort(-total_E, kind="stable")
    held = np.cumsum(total_E[order])
    number = int(np.searchsorted(held, share * held[-1] * (1 - 1e-12)) + 1) if held[-1] else 0
    experts = order[:number]
    unseen = unseen[unseen.sum(axis=1) > 0]
    inside, asked = unseen[:, experts].sum(axis=1), unseen.sum(axis=1)

    def part(weights: Floats) -> Floats:
        below = weights @ asked
        return np.divide(weights @ inside, below, out=np.full_like(below, np.nan), where=below > 0)

    low, high = resampling.interval(part, len(unseen))
    note = "" if len(unseen) >= MIN_DOCUMENTS else (
        f"No interval: fewer than {MIN_DOCUMENTS} documents."
    )  # fmt: skip
    chosen = held[number - 1] / held[-1] if number else np.nan
    value = float(part(np.ones((1, len(unseen))))[0]) if len(unseen) else np.nan
    return [number, chosen, value, float(low), float(high), experts.tolist(), len(unseen), note]


def _sums(
    trace: Trace, layer: LayerMeta, docs: Documents, groups: Grouping | None, of: str
) -> Floats:
    """[U, G, E] slots or gate mass of the real experts."""
    if of == "slots":
        counts = next(unit_counts(trace, [layer], docs, groups))[:, :, : layer.num_experts]
        return counts.astype(np.float64)
    shape = docs.units, 1 if groups is None else len(groups), layer.num_choices
    layers = (layer.layer,) if groups is None else (layer.layer, None)
    arguments = layer, docs, groups
    whole = groups is not None and groups.whole
    (table_UGE,) = reduced([Sum(_mass, (trace,), layers, _added(shape), arguments, whole)])
    return table_UGE[:, :, : layer.num_experts]


def _mass(trace: Trace, layer: LayerMeta, docs: Documents, groups: Grouping | None) -> pl.DataFrame:
    """[cell, mass]: gate mass in cells of [U, G, E], file by file: sums of floats depend on their
    order.
    """
    size = 1 if groups is None else len(groups)
    frames = [pl.DataFrame(schema={"cell": pl.UInt32, "mass": pl.Float64})]
    for frame, codes_T in coded_batches(trace, layer, groups, "weights"):
        row_T = docs.unit(frame["doc"].to_numpy()) * size + codes_T
        slots = frame["experts"].list.len().to_numpy()
        expert_R = frame["experts"].explode().drop_nulls().to_numpy()
        weight_R = frame["weights"].explode().drop_nulls().cast(pl.Float64).to_numpy()
        inside = np.repeat(codes_T >= 0, slots)
        cell_R = (np.repeat(row_T, slots) * layer.num_choices + expert_R)[inside]
        mass = np.bincount(cell_R, weights=weight_R[inside]).astype(np.float64)  # also of no token
        cell = np.flatnonzero(mass)
        frames.append(pl.DataFrame({"cell": cell.astype(np.uint32), "mass": mass[cell]}))
    return pl.concat(frames)


def _added(shape: tuple[int, ...]) -> Fold[Floats]:
    """A fold that adds up frames of ``_mass`` in a table, in their order."""

    def fold(total: Floats | None, frame: pl.DataFrame) -> Floats:
        table = np.zeros(shape) if total is None else total
        np.add.at(table.reshape(-1), frame["cell"].to_numpy(), frame["mass"].to_numpy())
        return table

    return fold


def write_expert_lists(frame: pl.DataFrame, path: Path | str) -> None:
    """The lists of one share as JSON, {"layers": {"3": [ids]}}: what partial fine-tuning (ESFT) and
    offload read. An existing file is replaced when the new one is complete.

    Raises:
        AnalysisError: a frame with several lists of one layer.
    """
    if frame["layer"].n_unique() != frame.height:
        raise AnalysisError(
            expected("one list for each layer", f"{frame.height} rows", "filtering by share")
        )
    lists = {str(row["layer"]): row["experts"] for row in frame.iter_rows(named=True)}
    write_json(Path(path), {"layers": lists})


def calibration_tokens(
    trace: Trace, least: int = 1, *, confidence: float = 0.95, seed: int = 0
) -> pl.DataFrame:
    """The number of tokens of calibration text that gives every expert at least ``least`` tokens.

    Returns:
        [layer, measured, bound, unreached]: ``measured`` tokens until the last expert had them,
        with the documents in a random order (null where the trace is too short); ``bound``: tokens
        after which independent tokens of the measured load leave any expert short with a
        probability of at most ``1 - confidence`` (union bound over experts, Chernoff's for each;
        null where an expert never ran); ``unreached``: experts that the trace leaves short.

    Raises:
        AnalysisError: rows made up from counts; aliased experts.
    """
    require_tokens(trace, "calibration")
    require(least >= 1, "at least 1 token", least)
    require(0 < confidence < 1, "a confidence between 0 and 1", confidence)
    docs = documents(trace)
    order = np.random.default_rng(seed).permutation(docs.units)
    rows = []
    for layer in by_layer(trace):
        counts_UGE = next(unit_counts(trace, [layer], docs))
        counts_UE = counts_UGE[:, 0, : layer.num_experts].astype(np.int64)
        tokens_U = _tokens(trace, layer, docs)
        running = np.cumsum(counts_UE[order], axis=0)
        enough = (running >= least).all(axis=1)
        measured = int(np.cumsum(tokens_U[order])[enough.argmax()]) if enough.any() else None
        total = counts_UE.sum(axis=0)
        rate = total.min() / max(tokens_U.sum(), 1)
        bound = _enough(rate, least, math.log(len(total) / (1 - confidence))) if rate else None
        rows.append([layer.layer, measured, bound, int((total < least).sum())])
    schema = {
        "layer": pl.UInt32, "measured": pl.Int64, "bound": pl.Int64, "unreached": pl.Int64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def _enough(rate: float, least: int, logs: float) -> int:
    """The least n with ``exp(-(n q - least + 1)^2 / (2 n q)) <= exp(-logs)`` (Chernoff's lower
    tail, P(X <= least - 1)).
    """
    short = least - 1
    mean = short + logs + math.sqrt(logs * logs + 2 * logs * short)
    return math.ceil(mean / rate)


def _tokens(trace: Trace, layer: LayerMeta, docs: Documents) -> NDArray[np.int64]:
    """[U] tokens."""
    fold = counted((docs.units,))
    (table,) = reduced([Sum(_token_cells, (trace,), (layer.layer,), fold, (layer, docs))])
    return table


def _token_cells(trace: Trace, layer: LayerMeta, docs: Documents) -> pl.DataFrame:
    table = np.zeros(docs.units, np.int64)
    for batch in trace.batches(layer.layer, ["doc"]):
        table += np.bincount(docs.unit(batch["doc"].to_numpy()), minlength=docs.units)
    return cells(table)
