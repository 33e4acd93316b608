"""Differences between two traces of one architecture: two checkpoints, two prompts, before and
after fine-tuning.

``compare`` gives each layer in a row, ``load_shift`` each expert. Where the two traces hold the
same tokens the documents are drawn jointly and the choices are also compared token by token;
otherwise each trace's documents are drawn on their own.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab import measures
from moe_lab.analysis.aligned_rows import by_layer
from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling, expanded_interval
from moe_lab.analysis.document_sums import (
    Documents,
    documents,
    nulls,
    over,
)
from moe_lab.analysis.requirements import of_tokens
from moe_lab.analysis.saturation import Rows, difference, overlap_rows
from moe_lab.analysis.slot_counts import unit_counts
from moe_lab.errors import AnalysisError, require
from moe_lab.trace import LayerMeta, Trace


@of_tokens
def compare(
    first: Trace, second: Trace, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """Divergence of the loads and overlap of the choices, per layer.

    Args:
        first, second: traces with the same layers and experts.
        resamples, seed, level: of the percentile intervals from resampling documents.

    Returns:
        [layer, tokens_a, tokens_b, bits, bits_lo, bits_hi, moved, moved_expert, load_cv_a,
        load_cv_b, zero_share_a, zero_share_b, shared, top1, top1_lo, top1_hi, overlap, overlap_lo,
        overlap_hi, overlap_chance]: ``bits`` is the Jensen-Shannon divergence of the two loads over
        all slots (reflected interval, as in ``domain_divergence``); ``moved`` half the summed
        absolute change of the experts' shares, the share of slots that changed hands, and
        ``moved_expert`` the expert whose share changed most. Over the ``shared`` tokens that both
        traces hold: ``top1`` the share with the same first choice, ``overlap`` the mean share of
        the second trace's experts that the first chose too, and ``overlap_chance`` what the two
        loads alone would give. ``shared`` is 0 and the rest null where the texts differ.

    Raises:
        AnalysisError: other layers or numbers of experts.
    """
    sides, same = _sides(first, second)
    layers, rows, resampling = by_layer(second), [], Resampling(resamples, seed, level)
    chosen = overlap_rows(first, second, sides[1][1], resampling) if same else repeat(None)
    for layer, overlap, *counts in zip(layers, chosen, *_counts(layers, sides), strict=False):
        rows.append(
            {"layer": layer.layer, "tokens_a": first.num_tokens, "tokens_b": second.num_tokens}
            | _loads(layer, counts, resampling, same)
            | _choices(overlap)
        )
    return nulls(pl.DataFrame(rows, schema=_SCHEMA))


def load_shift(
    first: Trace, second: Trace, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """The change of each expert's share of the slots.

    Returns:
        [layer, expert, is_zero, share_a, share_b, shift, lo, hi]: ``shift = share_b - share_a``
            with its percentile interval; the shares
        are of all slots of the layer.

    Raises:
        AnalysisError: other layers or numbers of experts.
    """
    sides, same = _sides(first, second)
    layers, frames = by_layer(second), []
    for layer, *counts in zip(layers, *_counts(layers, sides), strict=True):
        shares = [_share(table.sum(axis=0)) for table in counts]
        low, high = _interval(
            counts, lambda a, b: _share(b) - _share(a), Resampling(resamples, seed, level), same
        )
        experts = np.arange(layer.num_choices)
        frame = pl.DataFrame(
            {
                "expert": experts.astype(np.uint16),
                "is_zero": experts >= layer.num_experts,
                "share_a": shares[0],
                "share_b": shares[1],
            }
            | {"shift": shares[1] - shares[0], "lo": low, "hi": high}
        )
        frames.append(frame.select(pl.lit(layer.layer, pl.UInt32).alias("layer"), pl.all()))
    return nulls(pl.concat(frames))


def _sides(first: Trace, second: Trace) -> tuple[list[tuple[Trace, Documents]], bool]:
    """Each trace with its documents, and whether the two hold the same tokens (then the documents
    are the same too).
    """
    shapes = [
        [(layer.layer, layer.num_experts, layer.num_zero_experts) for layer in by_layer(trace)]
        for trace in (first, second)
    ]
    require(
        shapes[0] == shapes[1],
        "two traces of the same layers and experts",
        "others",
        "traces of one architecture",
        error=AnalysisError,
        field="layers",
    )
    cells = max(layer.num_choices for layer in first.meta.layers)
    return [(trace, documents(trace, cells)) for trace in (first, second)], not difference(
        first, second
    )


def _counts(
    layers: Sequence[LayerMeta], sides: list[tuple[Trace, Documents]]
) -> list[Iterator[Floats]]:
    """[U, E] slots of each layer, for each trace."""
    return [
        (counts_UGE[:, 0].astype(np.float64) for counts_UGE in unit_counts(trace, layers, docs))
        for trace, docs in sides
    ]


def _loads(
    layer: LayerMeta, counts: list[Floats], resampling: Resampling, same: bool
) -> dict[str, float | int]:
    totals = [table.sum(axis=0) for table in counts]
    real = [total[: layer.num_experts] for total in totals]
    bits = float(measures.jensen_shannon_bits(*totals))
    low, high = _interval(
        counts, lambda a, b: measures.jensen_shannon_bits(a, b)[:, None], resampling, same
    )
    shift = _share(totals[1]) - _share(totals[0])
    values: dict[str, float | int] = {
        "bits": bits,
        "bits_lo": max(2 * bits - float(high[0]), 0.0),
        "bits_hi": min(2 * bits - float(low[0]), 1.0),
    }
    values |= {
        "moved": float(np.abs(shift).sum() / 2),
        "moved_expert": int(np.abs(np.nan_to_num(shift)).argmax()),
    }
    for name, total, own in zip("ab", totals, real, strict=True):
        values |= {
            f"load_cv_{name}": float(measures.load_cv(own)),
            f"zero_share_{name}": float(over(total.sum() - own.sum(), total.sum())),
        }
    return values


def _choices(overlap: Rows | None) -> dict[str, float | int]:
    if overlap is None:
        return {"shared": 0}
    top, whole = overlap
    values: dict[str, float | int] = {"shared": int(whole["n_tokens"])}
    for name, row in (("top1", top), ("overlap", whole)):
        values |= {
            name: float(row["saturation"]),
            f"{name}_lo": float(row["lo"]),
            f"{name}_hi": float(row["hi"]),
        }
    return values | {"overlap_chance": float(whole["chance_by_load"])}


def _interval(
    counts: list[Floats],
    statistic: Callable[[Floats, Floats], Floats],
    resampling: Resampling,
    same: bool,
) -> tuple[Floats, Floats]:
    """Ends [M] of the interval of ``statistic(loads_a [B, E], loads_b [B, E]) -> [B, M]``."""
    units = [len(table) for table in counts]
    if same:
        return resampling.interval(
            lambda weights: statistic(weights @ counts[0], weights @ counts[1]), units[0]
        )
    generators = [np.random.default_rng([resampling.seed, side]) for side in (0, 1)]
    drawn = [
        generator.multinomial(unit, np.full(unit, 1 / unit), size=resampling.resamples) @ table
        for generator, unit, table in zip(generators, units, counts, strict=True)
    ]
    return expanded_interval(statistic(*drawn), resampling.level, min(units))


def _share(load: NDArray[np.float64]) -> Floats:
    return over(load, load.sum(axis=-1, keepdims=True))


def _floats(*names: str) -> dict[str, type[pl.DataType]]:
    return dict.fromkeys(names, pl.Float64)


_SCHEMA = (
    {"layer": pl.UInt32, "tokens_a": pl.Int64, "tokens_b": pl.Int64}
    | _floats("bits", "bits_lo", "bits_hi", "moved")
    | {"moved_expert": pl.Int64}
    | _floats("load_cv_a", "load_cv_b", "zero_share_a", "zero_share_b")
    | {"shared": pl.Int64}
    | _floats("top1", "top1_lo", "top1_hi", "overlap", "overlap_lo", "overlap_hi", "overlap_chance")
)
