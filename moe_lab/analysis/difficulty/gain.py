"""The worth of one more expert for each token: the loss of the same model with a little less and a
little more compute for all tokens.

The only causal arm of the analysis. A bias is added to the real experts of every layer before
selection, so that the mean ``ffn_count`` of a layer moves by ``step`` either way; nothing else
changes. The marginal gain of a token is its loss with less minus its loss with more. A router
spends where it matters if tokens that it gives more also gain more; its regret is what could be
saved by moving compute between tokens at an equal total.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.analysis.difficulty.association import difficulty_association
from moe_lab.analysis.difficulty.compute_budget import held_out_mean
from moe_lab.analysis.difficulty.scored_documents import Scored, score
from moe_lab.config import require
from moe_lab.errors import AnalysisError
from moe_lab.model import Decoder
from moe_lab.routing import BudgetShift, Router, RouterContext, Routing

SEARCH_STEPS = 6
SEARCH_DOCUMENTS, SEARCH_TOKENS = 24, 128
LARGEST_SHIFT = 64.0


def marginal_gain(
    model: Decoder,
    documents: Sequence[NDArray],
    numbers: Sequence[int] | None = None,
    *,
    step: float = 0.5,
    seq_length: int = 128,
    batch_size: int = 32,
) -> pl.DataFrame:
    """Loss of every predicted token with less, the same and more compute.

    Args:
        model: with routers whose number of real experts can vary.
        documents: [n] arrays of ids that the model was not trained on; ``numbers``: the ``doc`` of
            each.
        step: how far the mean ``ffn_count`` of a layer is to move each way (at most half way to the
            end of its range).

    Returns:
        [doc, pos, token_id, input_id, ffn_count, loss, loss_less, loss_more, moved, marginal_gain]:
        ``ffn_count`` is the mean over layers at the place that predicts the token
        (``align="target"``), whose id is ``input_id``; ``moved`` is how many experts a layer the
        two passes lie apart on average over all tokens; ``marginal_gain = (loss_less - loss_more) /
        moved``, in nats per expert.

    Raises:
        AnalysisError: no layer's count can be moved.
    """
    require(step > 0, "a step above 0", step)
    routers = [layer.router for layer in model.moe_layers().values()]
    require(
        routers and all(can_shift(router) for router in routers),
        "routers with zero-compute experts or a free count",
        ", ".join(sorted({router.config.kind for router in routers})) or "no MoE layer",
        "a longcat run",
        error=AnalysisError,
        field="routers",
    )
    long_enough = [ids[:SEARCH_TOKENS] for ids in documents if len(ids) > 1]
    sample = long_enough[:: max(1, len(long_enough) // SEARCH_DOCUMENTS)]
    base = score(model, documents, numbers, seq_length=seq_length, batch_size=batch_size)
    centre = float(base.ffn_count.mean())
    moved = []
    for sign in (-1, 1):
        shift = _shift_for(model, sample, centre + sign * step, seq_length, batch_size)
        with shifted(model, shift):
            moved.append(
                score(model, documents, numbers, seq_length=seq_length, batch_size=batch_size)
            )
    return _gains(base, *moved)


def _gains(base: Scored, less: Scored, more: Scored) -> pl.DataFrame:
    scored = np.flatnonzero(np.isfinite(base.loss))
    before = scored - 1  # the place that predicts; a document's first token has no loss
    moved = float(more.ffn_count.mean() - less.ffn_count.mean())
    require(
        moved > 0,
        "a shift that changes how many experts run",
        f"a difference of {moved:g}",
        "a larger step",
        error=AnalysisError,
    )
    gain = (less.loss[scored] - more.loss[scored]) / moved
    return pl.DataFrame(
        {
            "doc": base.doc[scored],
            "pos": base.pos[scored],
            "token_id": base.token_id[scored],
            "input_id": base.token_id[before],
            "ffn_count": base.ffn_count[:, before].mean(axis=0),
            "loss": base.loss[scored],
            "loss_less": less.loss[scored],
            "loss_more": more.loss[scored],
            "moved": np.full(len(scored), moved),
            "marginal_gain": gain,
        }
    )


def gain_association(
    gains: pl.DataFrame, seed: int = 0, *, resamples: int = 1000, min_documents: int = 200
) -> pl.DataFrame:
    """Rank correlation of ``ffn_count`` with ``marginal_gain``: the row of
    ``difficulty_association`` for ``align="target"``.
    """
    # Compute belongs to the place before the token, gain to the token: one row a place, so that
    # ``target`` pairs them.
    spent = gains.select("doc", pl.col("pos") - 1, "ffn_count", token_id="input_id")
    gained = gains.select("doc", "pos", "marginal_gain", own_id="token_id")
    frame = spent.join(gained, on=["doc", "pos"], how="full", coalesce=True)
    # The last token of a document predicts nothing; its compute is never used.
    frame = frame.with_columns(
        pl.coalesce("token_id", "own_id").alias("token_id"),
        pl.col("ffn_count").fill_null(0.0),
        layer=pl.lit(0),
    )
    table = difficulty_association(
        frame,
        "marginal_gain",
        seed,
        resamples=resamples,
        min_documents=min_documents,
        min_document_tokens=0,
        include_first=True,
    )
    return table.filter(pl.col("align") == Align.TARGET.value).drop("layer")


def reallocation_regret(gains: pl.DataFrame, *, share: float = 0.25, seed: int = 0) -> pl.DataFrame:
    """Nats per token that moving compute between tokens would save at an equal total, to first
    order.

    A ``share`` of the tokens gives up what the step to less takes, and as many get what the step to
    more adds.

    Args:
        share: of all tokens, given to and taken from, at most 0.5.

    Returns:
        [allocation, saved, share] for ``random`` (tokens drawn blindly), ``by token id`` (tokens
        ranked by the mean gain of their id in the other half of the documents: what a lookup could
        save), ``greedy`` (ranked by their own measured gain: an upper bound, since it also picks
        what is noise). A saving above 0 is regret of the model's own allocation.
    """
    require(0 < share <= 0.5, "a share above 0 and at most 0.5", share)
    lost = (gains["loss_less"] - gains["loss"]).to_numpy().astype(np.float64)
    won = (gains["loss"] - gains["loss_more"]).to_numpy().astype(np.float64)
    count = max(1, int(share * len(lost)))
    doc, ids = (gains[name].to_numpy().astype(np.int64) for name in ("doc", "token_id"))
    predicted = [held_out_mean(values, doc, ids, seed) for values in (lost, won)]
    drawn = np.random.default_rng(seed).random(len(lost))
    rankings = {
        "random": (drawn, drawn),
        "by token id": (predicted[0], predicted[1]),
        "greedy": (lost, won),
    }
    rows = []
    for name, (giving, getting) in rankings.items():
        taken = np.argsort(giving, kind="stable")[:count]  # those who lose least
        rest = np.ones(len(lost), dtype=bool)
        rest[taken] = False
        places = np.flatnonzero(rest)
        given = places[np.argsort(-getting[places], kind="stable")[:count]]
        rows.append(
            {
                "allocation": name,
                "saved": float(won[given].sum() - lost[taken].sum()) / len(lost),
                "share": share,
            }
        )
    return pl.DataFrame(rows)


def can_shift(router: Router) -> bool:
    """Whether a bias can change how many real experts a token has."""
    return router.config.budget_shift is not BudgetShift.NONE


@contextmanager
def shifted(model: Decoder, shift: float) -> Iterator[None]:
    """Shift every MoE layer by ``shift`` in favour of real experts within the block, and restore it
    afterwards.

    Where the router selects with a bias, the bias moves and gate weights do not. Where it has none,
    logits move and weights with them; in a top-p router the mass p moves, in odds.
    """
    with ExitStack() as stack:
        for layer in model.moe_layers().values():
            stack.enter_context(_shifted_router(layer.router, shift))
        yield


@contextmanager
def _shifted_router(router: Router, shift: float) -> Iterator[None]:
    bias = getattr(router.controller, "bias", None)
    config, shifted_by = router.config, router.config.budget_shift
    # Controllers that steer something else carry a bias that nothing reads.
    if shifted_by is BudgetShift.BIAS and isinstance(bias, torch.Tensor):
        kept = bias.clone()
        bias[: config.num_experts] += shift
        try:
            yield
        finally:
            bias.copy_(kept)
        return
    if shifted_by is BudgetShift.MASS:
        mass = router.setting("top_p")
        odds = mass / (1 - mass) * np.exp(shift)
        router.config = config.replace(top_p=float(np.clip(odds / (1 + odds), 1e-6, 1 - 1e-6)))
        try:
            yield
        finally:
            router.config = config
        return
    plain = router.route

    def route(logits_TE: torch.Tensor, context: RouterContext) -> Routing:
        moved = logits_TE.clone()
        moved[:, : config.num_experts] += shift
        return plain(moved, context)

    router.route = route  # type: ignore[method-assign]
    try:
        yield
    finally:
        del router.route


def _shift_for(
    model: Decoder, documents: Sequence[NDArray], target: float, seq_length: int, batch_size: int
) -> float:
    """The shift at which the mean ``ffn_count`` is about ``target`` (as far towards it as it goes),
    by doubling and bisection.
    """

    def mean(shift: float) -> float:
        with shifted(model, shift):
            return float(
                score(
                    model, documents, seq_length=seq_length, batch_size=batch_size
                ).ffn_count.mean()
            )

    sign = 1.0 if target > mean(0.0) else -1.0
    size = 1e-2
    while sign * (mean(sign * size) - target) < 0 and size < LARGEST_SHIFT:
        size *= 4
    low, high = 0.0, size
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sign * (mean(sign * middle) - target) < 0 else (low, middle)
    return sign * high
