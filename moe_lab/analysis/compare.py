"""Differences between two traces of one architecture: two checkpoints, two prompts, before and
after fine-tuning.

``compare`` gives each layer in a row, ``load_shift`` each expert. Where the two traces hold the
same tokens the documents are drawn jointly and the choices are also compared token by token;
otherwise each trace's documents are drawn on their own.
"""

from collections.abc import Callable

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
    unit_counts,
)
from moe_lab.analysis.requirements import of_tokens
from moe_lab.analysis.saturation import difference, overlap_rows
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
    rows = []
    for layer in by_layer(second):
        counts = [unit_counts(trace, layer, docs)[:, 0].astype(np.float64) for trace, docs in sides]
        rows.append(
            {"layer": layer.layer, "tokens_a": first.num_tokens, "tokens_b": second.num_tokens}
            | _loads(layer, counts, Resampling(resamples, seed, level), same)
            | _choices(first, second, layer, sides[1][1], Resampling(resamples, seed, level), same)
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
    frames = []
    for layer in by_layer(second):
        counts = [unit_counts(trace, layer, docs)[:, 0].astype(np.float64) for trace, docs in sides]
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


def _choices(
    first: Trace,
    second: Trace,
    layer: LayerMeta,
    docs: Documents,
    resampling: Resampling,
    same: bool,
) -> dict[str, float | int]:
    if not same:
        return {"shared": 0}
    top, whole = overlap_rows(first, second, layer, docs, resampling)
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
