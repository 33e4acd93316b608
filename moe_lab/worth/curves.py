"""Loss against the share of experts removed, and against the number of experts of a token.

Compressors remove many experts at once, in the order of a score. ``removal_curves`` asks what that
costs: each order is chosen on the documents at even places and judged on the others, since an order
chosen on the documents that judge it looks better than it is. ``top_k_losses`` changes the number
of experts of every token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from torch import nn

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.errors import AnalysisError, require
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.document_means import ratios
from moe_lab.worth.edits import Forbid, TopK
from moe_lab.worth.measured_rows import SUMS
from moe_lab.worth.paired_passes import edited_sums
from moe_lab.worth.scores import DISTANCES, MEANS
from moe_lab.worth.token_groups import Classes, TokenGroups

SHARES = (0.125, 0.25, 0.375, 0.5)
MEASURED = "measured loss"
"""The order of the measured loss, beside those of the scores."""
Order = Mapping[int, Sequence[int]]
"""Layer -> its experts from the first to be removed to the last."""


def removal_curves(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    scores: pl.DataFrame,
    losses: pl.DataFrame | None = None,
    *,
    shares: Sequence[float] = SHARES,
    random_orders: int = 10,
    batch_tokens: int = 2048,
    seed: int = 0,
    level: float = 0.95,
    path: Path | str | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> pl.DataFrame:
    """Loss against the share of experts removed, in the order of each score.

    Args:
        documents: those of ``scores`` and ``losses``.
        scores: of ``expert_scores``. ``output_distance`` is of all documents, also those that
            judge.
        losses: of ``expert_losses`` for all experts; its order is then judged too.
        shares: of the real experts of each layer that cannot be chosen, rounded to whole experts.
        random_orders: drawn with ``seed``, as the baseline.
        path: a Parquet file of the sums as they are measured; those that it holds are not measured
            again.

    Returns:
        [order, share, removed, d_loss, lo, hi, p_random, docs]: ``order`` names a score, "measured
        loss" or "random 1" and so on; ``removed`` experts of all layers; ``d_loss`` the change of
        the loss in nats per predicted token over the documents at odd places, with an interval over
        them. ``p_random`` is the share of orders that lose no more than this one, among
        the random orders and itself: small where the order is better than a random one, at least
        1 / (1 + random_orders), null for the random ones. A score that is not known has no curve.

    Raises:
        AnalysisError: a share that leaves fewer experts than a token uses; losses of some experts
            only; another measurement in ``path``.

    Example:
        >>> curves = removal_curves(model, documents, scores, losses, random_orders=19)
        >>> curves.filter(pl.col("share") == 0.25).sort("d_loss")
    """
    sites, _ = find_sites(model, readers, None)
    sizes = {site.layer: site.num_experts or 0 for site in sites}
    require(
        both_halves(documents),
        "documents at even places, which choose orders, and at odd places, which judge them",
        f"{len(documents)} documents",
        error=AnalysisError,
        field="documents",
    )
    orders = _orders(scores, losses, sizes)
    generator = np.random.default_rng(seed)
    for number in range(random_orders):
        orders[f"random {number + 1}"] = {
            layer: generator.permutation(size).tolist() for layer, size in sizes.items()
        }
    counts = [_removed(sites, share) for share in shares]
    cells = [
        (name, share, count) for name in orders for share, count in zip(shares, counts, strict=True)
    ]
    edits = [
        [
            Forbid(layer, expert)
            for layer, experts in orders[name].items()
            for expert in experts[: count[layer]]
        ]
        for name, _, count in cells
    ]
    judged = documents[1::2]
    sums = edited_sums(model, judged, edits, batch_tokens=batch_tokens, path=path, readers=readers)
    tokens, d_loss = sums[:, :, 0, 0].T, sums[:, :, 0, SUMS.index("d_loss")].T
    mean, low, high = ratios(d_loss, tokens, level)
    frame = pl.DataFrame(
        {
            "order": [name for name, _, _ in cells],
            "share": [float(share) for _, share, _ in cells],
            "removed": [sum(count.values()) for _, _, count in cells],
            "d_loss": mean,
            "lo": low,
            "hi": high,
        }
    )
    random = pl.col("order").str.starts_with("random ")
    by_share = {
        share: part.filter(random)["d_loss"].to_numpy()
        for (share,), part in frame.group_by("share")
    }
    p = [
        (1 + (by_share[share] <= loss).sum()) / (1 + random_orders)
        for share, loss in frame.select("share", "d_loss").iter_rows()
    ]
    return frame.with_columns(
        p_random=pl.when(random | (random_orders == 0)).then(None).otherwise(pl.Series(p)),
        docs=int((tokens[:, 0] > 0).sum()),
    ).with_columns(pl.col("lo", "hi").fill_nan(None))


def both_halves(documents: Sequence[np.ndarray]) -> bool:
    """Has each half of the documents one of at least two tokens?"""
    return all(any(len(ids) > 1 for ids in documents[half::2]) for half in (0, 1))


def possible_shares(model: nn.Module, shares: Sequence[float] = SHARES) -> list[float]:
    """The shares that remove an expert and leave as many as a token uses."""
    sites, _ = find_sites(model, None, None)
    sizes = [(site.num_experts or 0, site.num_zero_experts, site.top_k or 1) for site in sites]
    return [
        share
        for share in shares
        if any(round(share * size) for size, *_ in sizes)
        and all(size + zero - round(share * size) >= k for size, zero, k in sizes)
    ]


def _removed(sites: Sequence[TracedRouter], share: float) -> dict[int, int]:
    """Layer -> how many of its experts are removed."""
    counts = {}
    for site in sites:
        size = site.num_experts or 0
        counts[site.layer] = round(share * size)
        left = size + site.num_zero_experts - counts[site.layer]
        require(
            0 < share < 1 and left >= (site.top_k or 1),
            f"a share above 0 that leaves at least {site.top_k} of {size} experts in layer "
            f"{site.layer}",
            share,
            error=AnalysisError,
            field="shares",
        )
    require(
        sum(counts.values()),
        "a share of at least one expert",
        share,
        error=AnalysisError,
        field="shares",
    )
    return counts


def _orders(
    scores: pl.DataFrame, losses: pl.DataFrame | None, sizes: Mapping[int, int]
) -> dict[str, Order]:
    """Name -> order, from the documents at even places."""
    means = {
        name: (pl.sum(above) / pl.sum(below)).fill_nan(0) for name, (above, below) in MEANS.items()
    } | {name: pl.col(name).first() for name in DISTANCES}
    chosen = scores.filter(pl.col("doc") % 2 == 0)
    values = chosen.group_by("layer", "expert").agg(**means)
    orders = {
        name: _ascending(values, name, sizes, "scores")
        for name in means
        if not values[name].null_count()
    }
    if losses is not None:
        every = losses.filter(pl.col("class").is_null() & (pl.col("doc") % 2 == 0))
        value = every.group_by("layer", "expert").agg(loss=pl.sum("d_loss") / pl.sum("tokens"))
        orders[MEASURED] = _ascending(value, "loss", sizes, "losses")
    return orders


def _ascending(values: pl.DataFrame, name: str, sizes: Mapping[int, int], field: str) -> Order:
    orders = {
        layer: values.filter(pl.col("layer") == layer).sort(name, "expert")["expert"].to_list()
        for layer in sizes
    }
    require(
        all(len(orders[layer]) == size for layer, size in sizes.items()),
        f"{field} of all experts of the model",
        f"{values.height} of {sum(sizes.values())}",
        error=AnalysisError,
        field=field,
    )
    return orders


def top_k_losses(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    ks: Sequence[int],
    *,
    classes: Classes | None = None,
    align: Align = Align.INPUT,
    alone: bool = False,
    batch_tokens: int = 2048,
    level: float = 0.95,
    path: Path | str | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> pl.DataFrame:
    """Loss against the number of experts of every token, in all layers at once, by class.

    Args:
        ks: numbers of experts (with zero-compute experts, of slots).
        classes, align: as for ``expert_losses``; by default a loss counts for the class of the
            token at whose place it is predicted, which is the one that has k experts.
        alone: the tokens of one class at a time have k experts, and all others their own; rows are
            of the class that has them. Without it all tokens have k, so that a class may change by
            its context.
        path: as for ``removal_curves``.

    Returns:
        [k, by, class, d_loss, lo, hi, gain, gain_lo, gain_hi, kl, tokens, docs]: change of the loss
        in nats per predicted token against the model as it is; ``gain`` is what k buys: the loss at
        the next smaller of ``ks`` less the loss at k (null for the smallest). Intervals are over
        documents.

    Raises:
        TraceError: naming the router, where its k cannot be changed.
        AnalysisError: ``alone`` without classes, or with another ``align`` than "input".

    Example:
        >>> top_k_losses(model, documents, range(1, 9)).select("k", "d_loss", "gain")
    """
    ks = sorted(set(ks))
    groups = TokenGroups(documents, classes, align)
    edits: list[list[TopK]] = [[TopK(None, k)] for k in ks]
    places = range(1, len(groups.names))
    require(
        not alone or (places and groups.align is Align.INPUT),
        "classes of the tokens that have k experts, for those of a class alone",
        "none" if not places else groups.align,
        error=AnalysisError,
        field="alone",
    )
    sums = edited_sums(
        model,
        documents,
        edits * len(places) if alone else edits,
        groups,
        alone=[group for group in places for _ in ks] if alone else None,
        batch_tokens=batch_tokens,
        path=path,
        readers=readers,
    )
    if alone:  # of each class the passes in which it has k
        parts = sums.reshape(len(places), len(ks), *sums.shape[1:])
        sums = np.zeros((len(ks), *sums.shape[1:]))
        for group in places:
            sums[:, :, group] = parts[group - 1][:, :, group]
    frames = []
    for place, k in enumerate(ks):
        tokens, loss, kl, *_ = np.moveaxis(sums[place], 2, 0)
        mean, low, high = ratios(loss, tokens, level)
        frame = groups.labels.with_columns(
            k=pl.lit(k, pl.Int64), d_loss=mean, lo=low, hi=high,
            gain=pl.lit(None, pl.Float64), gain_lo=pl.lit(None, pl.Float64),
            gain_hi=pl.lit(None, pl.Float64),
            kl=kl.sum(axis=0) / np.maximum(tokens.sum(axis=0), 1),
            tokens=pl.Series(tokens.sum(axis=0)).cast(pl.Int64),
            docs=pl.Series((tokens > 0).sum(axis=0)).cast(pl.Int64),
        )  # fmt: skip
        if place:
            less = sums[place - 1, :, :, SUMS.index("d_loss")] - loss
            gain, gain_low, gain_high = ratios(less, tokens, level)
            frame = frame.with_columns(
                gain=pl.Series(gain), gain_lo=pl.Series(gain_low), gain_hi=pl.Series(gain_high)
            )
        frames.append(frame)
    rows = pl.concat(frames)
    return (
        (rows.drop_nulls("class") if alone else rows)
        .select("k", pl.exclude("k"))
        .with_columns(pl.col(pl.Float64).fill_nan(None))
    )
