"""What a measurement of experts says, in sentences: which matter, which cost nothing, what that
means for pruning, and which score orders them as the loss does.

An expert *costs nothing* where the upper end of its interval is below ``FREE_SHARE`` of the model's
loss, and *matters* where the lower end is above. For the rest the number of documents is given that
would tell. Experts that are chosen and judged on the same documents look better than they are:
what pruning costs is chosen on the documents at even places and judged on those at odd ones. It is
a sum of single losses, and says so.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl

from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS, Floats
from moe_lab.number_format import count_of, decimal, listing
from moe_lab.worth.document_means import ratios
from moe_lab.worth.scores import SCORES
from moe_lab.worth.worth_files import FREE_SHARE


def worth_sentences(
    worth: pl.DataFrame,
    losses: pl.DataFrame,
    agreement: pl.DataFrame,
    loss: float,
    free_share: float = FREE_SHARE,
) -> list[str]:
    """The answer, then what is not decided, then the score that orders experts best.

    Args:
        worth, losses, agreement: of ``expert_worth``, ``expert_losses`` and ``score_agreement``.
        loss: of the untouched model, in nats per predicted token.
        free_share: of ``loss``; what costs less costs nothing.
    """
    rows = worth.filter(pl.col("class").is_null())
    docs, number = int(rows["docs"].max()), rows.height  # type: ignore[arg-type]
    if rows["lo"].null_count() == number:
        return [
            f"Cannot tell which of {count_of(number, 'expert')} matter from "
            f"{count_of(docs, 'document')}: an interval needs {MIN_DOCUMENTS}, and one that is "
            "narrow enough more."
        ]
    bound = free_share * loss
    judged = rows.with_columns(verdict=verdict_of(bound))
    sentences = [_answer(judged, losses, bound, free_share)]
    unclear = judged.filter(verdict="cannot tell").drop_nulls("lo")
    if unclear.height:
        needed = _rounded(float(np.median(_documents_needed(unclear, bound))))
        half = " for half of them" if unclear.height > 1 else ""
        sentences.append(
            f"Cannot tell for {count_of(unclear.height, 'expert')}: about {needed} documents would "
            f"tell{half}."
        )
    if rare := judged["lo"].null_count():
        sentences.append(
            f"Cannot tell for {count_of(rare, 'expert')} that fewer than {MIN_DOCUMENTS} documents "
            "used: an interval needs as many."
        )
    return [*sentences, *_scores(agreement)]


def verdict_of(bound: float) -> pl.Expr:
    """ "matters", "costs nothing" or "cannot tell" for rows of ``expert_worth``."""
    return (
        pl.when(pl.col("lo") > bound)
        .then(pl.lit("matters"))
        .when(pl.col("hi") < bound)
        .then(pl.lit("costs nothing"))
        .otherwise(pl.lit("cannot tell"))
    )


def _answer(judged: pl.DataFrame, losses: pl.DataFrame, bound: float, free_share: float) -> str:
    docs, number = count_of(int(judged["docs"].max()), "document"), judged.height  # type: ignore[arg-type]
    matters, free = (judged.filter(verdict=name) for name in ("matters", "costs nothing"))
    least = f"{100 * free_share:g} % of the loss, {bound:.4f} nats/token"
    verb = "matters" if matters.height == 1 else "matter"
    first = f"{matters.height} of {count_of(number, 'measured expert')} {verb} (above {least})"
    if matters.height:
        top = matters.sort("d_loss").row(-1, named=True)
        first += (
            f", most of all expert {top['expert']} of layer {top['layer']} "
            f"({top['d_loss']:.4f} nats/token, {_ends(top)})"
        )
    price = pruning_price(losses, bound)
    if not free.height or price is None:
        return f"{first}, and {free.height or 'none'} cost less; {docs}."
    act = {"forbid": "pruning", "silence": "silencing"}[judged["edit"][0]]
    chosen = price["experts"]
    cost = f"{decimal(price['d_loss'], 4)} nats/token ({_ends(price)}) on the other half"
    if chosen == number:
        return (
            f"{first}, and {free.height} cost less: on half of the documents all do, and their "
            f"losses add up to {cost}, but a token needs some of them; {docs}."
        )
    return (
        f"{first}, and {free.height} cost less; {docs}. {chosen} cost less on half of the "
        f"documents: {act} {'it' if chosen == 1 else 'them'} costs {cost}, if single losses add up."
    )


def pruning_price(losses: pl.DataFrame, bound: float) -> dict | None:
    """experts, d_loss, lo, hi: the summed loss of the experts that cost less than ``bound`` on the
    documents at even places, on those at odd places; None: no such experts, or too few
    documents for an interval.
    """
    every = losses.filter(pl.col("class").is_null())
    keys = ["layer", "expert"]
    halves = [every.filter(pl.col("doc") % 2 == half) for half in (0, 1)]
    chosen = (
        halves[0]
        .group_by(keys)
        .agg(cost=pl.sum("d_loss") / pl.sum("tokens"))
        .filter(pl.col("cost") < bound)
    )
    judged = halves[1].join(chosen, on=keys, how="semi")
    by_doc = judged.group_by("doc").agg(pl.sum("d_loss"), pl.first("tokens")).sort("doc")
    if by_doc.height < MIN_DOCUMENTS:
        return None
    above, below = (by_doc.select(name).to_numpy() for name in ("d_loss", "tokens"))
    mean, low, high = (float(part[0]) for part in ratios(above, below))
    return {"experts": chosen.height, "d_loss": mean, "lo": low, "hi": high}


def _documents_needed(unclear: pl.DataFrame, bound: float) -> Floats:
    """Documents at which the interval of each would leave the bound on one side: its width falls
    with their square root.
    """
    mean, low, high = unclear.select("d_loss", "lo", "hi").to_numpy().T
    reach = np.where(mean > bound, mean - low, high - mean)  # the end beyond the bound
    return unclear["docs"].to_numpy() * (reach / np.maximum(np.abs(mean - bound), 1e-12)) ** 2


def _rounded(number: float) -> str:
    """Two significant digits, upwards."""
    step = 10 ** max(int(np.log10(max(number, 1))) - 1, 0)
    return f"{int(np.ceil(number / step) * step):,}"


def _scores(agreement: pl.DataFrame) -> list[str]:
    """Which score orders the experts of the model as the loss does."""
    rows = agreement.filter(pl.col("layer").is_null()).drop_nulls(["rho", "lo"]).sort("rho")
    if not rows.height:
        return []
    best, docs = rows.row(-1, named=True), int(rows["docs"][0])
    what = f"rank correlation with the measured loss {decimal(best['rho'], 2)}, {_ends(best, 2)}"
    if best["lo"] > 0:
        near = rows.filter((pl.col("hi") >= best["lo"]) & (pl.col("score") != best["score"]))
        others = f"; not shown to be worse: {listing(near['score'].to_list())}" * bool(near.height)
        return [f"{best['score']} orders these {best['experts']} experts best ({what}){others}."]
    reach = best["rho"] - best["lo"]
    needed = docs * (reach / max(abs(best["rho"]), 1e-3)) ** 2
    return [
        f"Cannot tell whether any score orders these {best['experts']} experts as the loss does: "
        f"{best['score']} does best ({what}); about {_rounded(needed)} documents would tell."
    ]


def curve_sentences(curves: pl.DataFrame, share: float = 0.25) -> list[str]:
    """What the best order of a score loses at a share of the experts, beside random orders.

    Args:
        curves: of ``removal_curves``.
    """
    rows = curves.filter(share=share)
    random = rows.filter(pl.col("order").str.starts_with("random "))
    scores = rows.filter(pl.col("order").is_in(SCORES)).sort("d_loss")
    if not scores.height or not random.height:
        return []
    best, others = scores.row(0, named=True), decimal(random["d_loss"].to_numpy().mean(), 4)
    ends = "" if best["lo"] is None else f" ({_ends(best)})"
    return [
        f"Without {100 * share:g} % of the experts of each layer, in the order of {best['order']}, "
        f"the model loses {decimal(best['d_loss'], 4)} nats/token{ends} on documents "
        f"that the order was not chosen on; random orders lose {others} on average."
    ]


def _ends(row: Mapping, digits: int = 4) -> str:
    return f"{decimal(row['lo'], digits)} to {decimal(row['hi'], digits)}"
