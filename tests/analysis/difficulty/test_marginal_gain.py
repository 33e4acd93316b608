"""The causal arm: a model shifted both ways, and what moving compute would save."""

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from moe_lab.analysis import marginal_gain
from moe_lab.analysis.difficulty import (
    LEARNABILITY,
    gain_association,
    learnability,
    reallocation_regret,
)
from moe_lab.analysis.difficulty.gain import shifted
from moe_lab.analysis.difficulty.scored_documents import score
from moe_lab.errors import AnalysisError
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig

KINDS = {
    "longcat": {
        "num_zero_experts": 4,
        "controller": {"kind": "proportional", "rate": 0.1, "target_ffn_count": 2.0},
    },
    "moepp": {"num_zero_experts": 4},
    "top_p": {"top_k": 8, "top_p": 0.5},
    "remoe": {"router_bias": True},
    "expert_threshold": {"min_slots": 1},
}


def model_of(kind, seed=0, **fields):
    torch.manual_seed(seed)
    router = RouterConfig.from_dict({"kind": kind, "num_experts": 8, "top_k": 3} | fields)
    moe = MoEConfig(d_model=16, d_expert=16, router=router)
    model = Decoder(
        DecoderConfig(
            vocab_size=40,
            num_layers=2,
            d_model=16,
            num_heads=1,
            context_length=24,
            moe=moe,
            init_std=0.5,
        )
    )
    # One training step's worth of statistics: threshold rules take their cut-offs from it.
    output = model(torch.randint(0, 40, (8, 24)))
    for layer, routing in zip(model.moe_layers().values(), output.routings, strict=True):
        layer.router.update([routing.detach()])
    return model.eval()


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 40, length) for length in (30, 24, 1, 50, 7)]


def test_scores_are_those_of_the_model_on_each_window(documents):
    model = model_of("longcat", **KINDS["longcat"])
    found = score(model, documents, seq_length=24, batch_size=2)
    window = torch.tensor(documents[3][24:48])[None]
    output = model(window)
    losses = F.cross_entropy(output.logits[0, :-1], window[0, 1:], reduction="none")
    start = 30 + 24 + 1
    assert found.loss[start + 25 : start + 48] == pytest.approx(losses.detach().numpy(), abs=1e-4)
    for layer in range(2):
        assert (
            found.ffn_count[layer, start + 24 : start + 48].tolist()
            == output.routings[layer].ffn_count().tolist()
        )
    assert np.isnan(found.loss[[0, 30, 54, 55]]).all()
    assert np.isfinite(found.loss).sum() == sum(len(ids) - 1 for ids in documents)
    assert (found.norm_ratio > 0).all()
    assert set(found.frame()["layer"]) == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_moves_compute_both_ways_and_leaves_no_trace(kind, documents):
    model = model_of(kind, **KINDS[kind])
    before = score(model, documents, seq_length=24)
    with shifted(model, 0.4):
        more = score(model, documents, seq_length=24)
    with shifted(model, -0.4):
        less = score(model, documents, seq_length=24)
    after = score(model, documents, seq_length=24)
    assert less.ffn_count.mean() < before.ffn_count.mean() < more.ffn_count.mean()
    assert (more.ffn_count >= before.ffn_count).mean() > 0.9
    assert np.array_equal(before.loss, after.loss, equal_nan=True)


def test_gain_is_loss_with_less_minus_loss_with_more_per_expert(documents):
    gains = marginal_gain(
        model_of("longcat", **KINDS["longcat"]), documents, step=0.4, seq_length=24
    )
    expected = (gains["loss_less"] - gains["loss_more"]) / gains["moved"]
    assert gains["marginal_gain"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)
    assert gains["moved"][0] == pytest.approx(0.8, abs=0.3)
    assert gains.height == sum(len(ids) - 1 for ids in documents)
    second = gains.filter((pl.col("doc") == 1) & (pl.col("pos") == 5)).row(0, named=True)
    assert (second["token_id"], second["input_id"]) == (documents[1][5], documents[1][4])


def test_a_fixed_k_has_no_marginal_gain(documents):
    with refused("routers", AnalysisError):
        marginal_gain(model_of("softmax_topk"), documents)


def gains_of(gain, count, documents=210, length=40, seed=0):
    generator = np.random.default_rng(seed)
    doc = np.repeat(np.arange(documents), length)
    gain = np.asarray(gain)
    return pl.DataFrame(
        {
            "doc": doc,
            "pos": np.tile(np.arange(1, length + 1), documents),
            "token_id": generator.integers(0, 20, len(doc)),
        }
        | {
            "input_id": generator.integers(0, 20, len(doc)),
            "ffn_count": count,
            "loss": np.full(len(doc), 3.0),
        }
        | {
            "loss_less": 3.0 + gain / 2,
            "loss_more": 3.0 - gain / 2,
            "moved": np.full(len(doc), 1.0),
            "marginal_gain": gain,
        }
    )


def test_a_router_that_spends_where_it_pays_is_recognised():
    generator = np.random.default_rng(1)
    gain = generator.normal(size=8400)
    spends = gains_of(gain, generator.binomial(12, 1 / (1 + np.exp(-gain / 2))).astype(float))
    blind = gains_of(gain, generator.binomial(12, 0.5, 8400).astype(float))
    row = gain_association(spends, resamples=200).row(0, named=True)
    assert row["verdict"] == "difficulty-aligned"
    assert row["rho_token"] > 0.4
    assert abs(gain_association(blind, resamples=200)["rho_token"][0]) < 0.04


def test_regret_by_hand():
    """Four tokens, a quarter each way: greedy takes from the one that loses least (0.0) and gives
    to the one that wins most (1.0).
    """
    gains = gains_of([0.0, 2.0, 0.4, 0.8] * 2, np.ones(8), documents=2, length=4)
    saved = dict(reallocation_regret(gains, share=0.25).select("allocation", "saved").rows())
    assert saved["greedy"] == pytest.approx((1.0 * 2 - 0.0 * 2) / 8)
    assert saved["greedy"] >= max(saved.values())


def test_random_reallocation_saves_nothing_where_less_costs_as_much_as_more_gives():
    gains = gains_of(np.random.default_rng(3).normal(1.0, 0.5, size=8400), np.ones(8400))
    saved = dict(reallocation_regret(gains).select("allocation", "saved").rows())
    assert abs(saved["random"]) < 0.02 < saved["greedy"]
    assert abs(saved["by token id"]) < 0.02  # ids say nothing of the gain here


def test_learnability_classes_by_hand():
    losses = [[5, 5, 5], [1, 2, 3], [4, 2, 0.5], [0.1, 0.1, 0.1], [np.nan, 1, 1]]
    assert [LEARNABILITY[code] for code in learnability(np.array(losses))[:4]] == [
        "H->H",
        "L->H",
        "H->L",
        "L->L",
    ]
    assert learnability(np.array(losses))[4] == 255
    with refused("losses"):
        learnability(np.zeros((3, 1)))
