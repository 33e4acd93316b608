"""Two experts at once: do their losses add up, and can one stand in for the other?"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from torch import nn

from moe_lab.errors import TraceError, require
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.worth.document_means import ratios
from moe_lab.worth.edits import Exchange
from moe_lab.worth.measured_rows import SUMS
from moe_lab.worth.measures import EDITS, EditKind
from moe_lab.worth.paired_passes import edited_sums

Pairs: TypeAlias = int | Sequence[tuple[int, int, int]] | None
TOKENS, D_LOSS, KL, USED, D_LOSS_USED = range(len(SUMS))


def pair_losses(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    pairs: Pairs,
    *,
    edit: EditKind = EditKind.FORBID,
    batch_tokens: int = 2048,
    seed: int = 0,
    level: float = 0.95,
    path: Path | str | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> pl.DataFrame:
    """What two experts of a layer are worth together, beside what each is worth alone.

    Args:
        pairs: (layer, first, second); a number: so many pairs of each layer, drawn with ``seed``;
            None: all pairs.
        path: as for ``removal_curves``.

    Returns:
        [layer, first, second, d_first, d_second, d_both, excess, lo, hi, docs]: changes of the loss
        in nats per predicted token without the one, the other and both; ``excess`` is ``d_both``
        less the sum of the others, with an interval over documents (null where fewer than five
        used one of the two). Above 0, each stands in for the other; at 0 the losses of single
        experts add up.

    Raises:
        TraceError: a pair that is not there.

    Example:
        >>> pair_losses(model, documents, [(3, 0, 17)])
    """
    chosen = chosen_pairs(model, pairs, seed, readers)
    make = EDITS[edit]
    singles = sorted({(layer, expert) for layer, *both in chosen for expert in both})
    edits = [[make(*single)] for single in singles]
    edits += [[make(layer, first), make(layer, second)] for layer, first, second in chosen]
    sums = edited_sums(
        model, documents, edits, batch_tokens=batch_tokens, path=path, readers=readers
    )
    sums_SDQ = sums[:, :, 0]
    place = {single: number for number, single in enumerate(singles)}
    firsts, seconds = (
        sums_SDQ[[place[layer, both[which]] for layer, *both in chosen], :, D_LOSS].T
        for which in (0, 1)
    )
    together = sums_SDQ[len(singles) :, :, D_LOSS].T
    tokens = sums_SDQ[len(singles) :, :, TOKENS].T
    used = sums_SDQ[len(singles) :, :, USED].T
    touched = (used > 0) | (together != 0)
    excess, low, high = ratios(together - firsts - seconds, tokens, level, touched)
    total = tokens.sum(axis=0)
    return _frame(
        chosen,
        d_first=firsts.sum(axis=0) / total,
        d_second=seconds.sum(axis=0) / total,
        d_both=together.sum(axis=0) / total,
        excess=excess,
        lo=low,
        hi=high,
        docs=(tokens > 0).sum(axis=0),
    )


def exchange_losses(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    pairs: Pairs = None,
    *,
    batch_tokens: int = 2048,
    seed: int = 0,
    level: float = 0.95,
    path: Path | str | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> pl.DataFrame:
    """What it costs to send the tokens of one expert to another and back, with their gate weights.

    Args:
        pairs, path: as for ``pair_losses``, whose file it can share.

    Returns:
        [layer, first, second, d_loss, lo, hi, d_loss_used, used_lo, used_hi, kl, tokens, used,
        docs]: change of the loss in nats per predicted token, over all tokens and over those
        predicted where one of both was used (``used`` tokens), and the divergence of the edited
        prediction from the untouched one, per token. Two experts that compute the same have 0
        everywhere. Where none of them was used nothing is said about them.

    Raises:
        TraceError: a pair that is not there.

    Example:
        >>> found = exchange_losses(model, documents)
        >>> found.filter(pl.col("used_hi") < 0.01, pl.col("kl") < 0.001)  # redundant pairs
    """
    chosen = chosen_pairs(model, pairs, seed, readers)
    edits = [[Exchange(*pair)] for pair in chosen]
    sums = edited_sums(
        model, documents, edits, batch_tokens=batch_tokens, path=path, readers=readers
    )
    tokens, loss, kl, used, loss_used = np.moveaxis(sums[:, :, 0], (2, 0), (0, 2))
    touched = (used > 0) | (loss != 0)
    mean, low, high = ratios(loss, tokens, level, touched)
    mean_used, used_low, used_high = ratios(loss_used, used, level)
    return _frame(
        chosen,
        d_loss=mean,
        lo=low,
        hi=high,
        d_loss_used=mean_used,
        used_lo=used_low,
        used_hi=used_high,
        kl=kl.sum(axis=0) / tokens.sum(axis=0),
        tokens=tokens.sum(axis=0).astype(int),
        used=used.sum(axis=0).astype(int),
        docs=(tokens > 0).sum(axis=0),
    )


def chosen_pairs(
    model: nn.Module, pairs: Pairs, seed: int, readers: Mapping[str, Reader] | None
) -> list[tuple[int, int, int]]:
    """(layer, first, second) of the pairs that are measured."""
    sites, _ = find_sites(model, readers, None)
    every = {
        site.layer: [(site.layer, *both) for both in combinations(range(site.num_experts or 0), 2)]
        for site in sites
    }
    if pairs is None:
        return [pair for layer in every.values() for pair in layer]
    if isinstance(pairs, int):
        most = max(map(len, every.values()), default=0)
        what = f"1 to {most} pairs, as many as the experts of a layer make"
        require(1 <= pairs <= most, what, pairs, field="pairs")
        generator = np.random.default_rng(seed)
        return [
            layer[place]
            for layer in every.values()
            for place in sorted(generator.permutation(len(layer))[:pairs].tolist())
        ]
    for layer, first, second in pairs:
        require(
            (layer, min(first, second), max(first, second)) in every.get(layer, []),
            f"(layer, first, second) with two experts of one of the layers {sorted(every)}",
            (layer, first, second),
            error=TraceError,
            field="pairs",
        )
    return list(pairs)


def _frame(pairs: Sequence[tuple[int, int, int]], **columns: np.ndarray) -> pl.DataFrame:
    schema: dict[str, Any] = dict.fromkeys(("layer", "first", "second"), pl.Int64)
    return (
        pl.DataFrame(pairs, schema=schema, orient="row")
        .with_columns(**{name: pl.Series(values) for name, values in columns.items()})
        .with_columns(pl.col(pl.Float64).fill_nan(None))
    )
