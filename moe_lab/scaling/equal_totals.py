"""Other ways to spend the parameters of experts: n-gram tables, depth, width, each at the same
total.

``at_total(model, total, alternative)`` makes ``model`` as large as ``total`` by one of them, so
that a sweep can ask at each total whether more experts were the best use of it (LongCat-Flash-Lite,
arXiv 2601.21204 section 3, asks it of tables).
"""

from collections.abc import Callable, Iterable
from contextlib import suppress

from moe_lab.accounting import count
from moe_lab.config import require
from moe_lab.errors import ConfigError, expected
from moe_lab.model import DecoderConfig, NgramConfig
from moe_lab.scaling.alternatives_compared import TOLERANCE, Alternative

__all__ = ["BETWEEN", "Alternative", "at_total"]


def at_total(
    model: DecoderConfig,
    total: int,
    alternative: Alternative | str,
    *,
    tolerance: float = TOLERANCE,
) -> DecoderConfig:
    """``model`` with as many more experts, table rows, layers or channels as make ``total``
    parameters (embedding and head included).

    Experts per token, and for tables and experts the rest of the model, stay what they are; depth
    and width also run more parameters per token, which the caller has to pay for in tokens.

    Raises:
        ConfigError: ``model`` is larger than ``total`` already, has no MoE layers, or cannot be
            brought within ``tolerance`` of it.
    """
    require(model.moe is not None, "a model with MoE layers", "a dense one", field="moe")
    size = count(model).total
    require(
        size <= total,
        f"a total of at least the model's own {size:,} parameters",
        f"{total:,}",
        field="total",
    )
    found = min(
        _CANDIDATES[Alternative(alternative)](model, total),
        key=lambda one: abs(count(one).total - total),
        default=None,
    )
    got = 0 if found is None else count(found).total
    if found is None or abs(got - total) > tolerance * total:
        raise ConfigError(
            expected(
                f"{total:,} parameters by {Alternative(alternative)} within {tolerance:.0%}",
                f"{got:,} at the nearest",
            )
        )
    return found


def _experts(model: DecoderConfig, total: int) -> Iterable[DecoderConfig]:
    assert model.moe is not None
    moe, router = model.moe, model.moe.router
    more = model.replace(moe=moe.replace(router=router.replace(num_experts=router.num_experts + 1)))
    one = count(more).total - count(model).total
    wanted = router.num_experts + (total - count(model).total) // one
    for experts in (wanted, wanted + 1):
        yield model.replace(moe=moe.replace(router=router.replace(num_experts=experts)))


def _ngram(model: DecoderConfig, total: int) -> Iterable[DecoderConfig]:
    """Tables of 2- and 3-grams, two of each (N >= 3 and K >= 2: section 3.3), or those that the
    model has, larger.

    Rows near a whole or half multiple of the vocabulary hash many bigrams alike, so of the ratios
    that come within the tolerance the one is taken that lies best between them (docs/decoder.md has
    the collisions).
    """
    ngram = NgramConfig(table_ratio=0.5) if model.ngram is None else model.ngram
    places = max(1, len(ngram.layers))
    base = count(
        model.replace(ngram=ngram.replace(table_ratio=0.5))
    ).total - places * _table_parameters(model, ngram, 0.5)
    one = places * model.vocab_size * model.d_model
    exact, slack = (total - base) / one, 0.75 * TOLERANCE * total / one
    if exact < 1:
        wanted = exact
    else:
        near = [
            whole + part
            for whole in range(int(exact - slack), int(exact + slack) + 1)
            for part in BETWEEN
        ]
        clear = min(near, key=lambda ratio: abs(ratio - exact))
        wanted = min(max(clear, exact - slack), exact + slack)
    if wanted > 0:
        # Where no ratio within the tolerance is far enough from a whole number, the caller says
        # which one is nearest.
        with suppress(ConfigError):
            yield model.replace(ngram=ngram.replace(table_ratio=round(wanted, 4)))


BETWEEN = (0.37, 0.63)
"""Parts of a whole that lie well between a half and a whole."""


def _table_parameters(model: DecoderConfig, ngram: NgramConfig, ratio: float) -> int:
    return (
        sum(ngram.replace(table_ratio=ratio).table_rows(model.vocab_size))
        * model.d_model
        // ngram.num_tables
    )


def _depth(model: DecoderConfig, total: int) -> Iterable[DecoderConfig]:
    """More layers; expert width takes up what no whole layer fits."""
    one = count(model.replace(num_layers=model.num_layers + 1)).total - count(model).total
    layers = model.num_layers + max(0, (total - count(model).total) // one)
    for number in (layers, layers + 1):
        yield from _expert_widths(model.replace(num_layers=number), total)


def _width(model: DecoderConfig, total: int) -> Iterable[DecoderConfig]:
    """A wider stream and wider experts in proportion, with as many heads of the same size as are
    nearest to that.
    """
    assert model.moe is not None
    if model.latent_attention is not None:
        raise ConfigError(
            expected("grouped-query attention to widen a model", "latent attention", "depth"),
            field="latent_attention",
        )
    groups = model.num_heads // model.kv_heads
    for d in range(model.d_model, 16 * model.d_model, 4):
        factor = d / model.d_model
        kv = max(1, round(model.kv_heads * factor))
        moe = model.moe.replace(d_model=d, d_expert=round(model.moe.d_expert * factor))
        wider = model.replace(
            d_model=d, num_heads=kv * groups, num_kv_heads=kv, head_dim=model.dim_per_head, moe=moe
        )
        if count(wider).total > (1 + TOLERANCE) * total and d > model.d_model:
            return
        yield from _expert_widths(wider, total)


def _expert_widths(model: DecoderConfig, total: int) -> Iterable[DecoderConfig]:
    """``model`` with experts up to a quarter narrower or wider, the one of them that is nearest to
    ``total``.
    """
    assert model.moe is not None
    moe, size = model.moe, count(model).total
    one = count(model.replace(moe=moe.replace(d_expert=moe.d_expert + 1))).total - size
    wanted = moe.d_expert + round((total - size) / one)
    if abs(wanted - moe.d_expert) <= moe.d_expert / 4:
        yield model.replace(moe=moe.replace(d_expert=wanted))


_CANDIDATES: dict[Alternative, Callable[[DecoderConfig, int], Iterable[DecoderConfig]]] = {
    Alternative.EXPERTS: _experts,
    Alternative.NGRAM: _ngram,
    Alternative.DEPTH: _depth,
    Alternative.WIDTH: _width,
}
