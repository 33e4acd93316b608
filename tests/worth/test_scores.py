"""Scores of experts against a pass by hand, planted experts, and planted orders."""

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused
from test_expert_worth import texts
from test_interventions import decoder, moe_layers

from moe_lab.errors import AnalysisError
from moe_lab.worth import SCORES, expert_losses, expert_scores, score_agreement


@torch.no_grad()
def test_sums_are_those_of_each_expert_run_by_hand():
    model, documents = decoder(), texts(4)
    scores = expert_scores(model, documents)
    assert scores.height == 2 * 6 * 4
    seen: list[tuple] = []
    for number, ids in enumerate(documents):
        seen.clear()
        handles = [
            layer.register_forward_hook(lambda module, args, output: seen.append((args, output)))
            for layer in moe_layers(model)
        ]
        model(torch.from_numpy(ids)[None])
        for handle in handles:
            handle.remove()
        for layer, (module, (args, (_, routing))) in enumerate(
            zip(moe_layers(model), seen, strict=True)
        ):
            x_TD, bank = args[0].reshape(-1, 16), module.experts
            for expert in range(6):
                (row,) = scores.filter(layer=layer, expert=expert, doc=number).to_dicts()
                chosen_TK = routing.indices == expert
                used_T = chosen_TK.any(dim=1)
                gate_T = (routing.weights * chosen_TK).sum(dim=1)
                gate, up = (x_TD @ bank.gate_up[expert].T).chunk(2, dim=1)
                output_TD = (torch.nn.functional.silu(gate) * up) @ bank.down[expert].T
                norm_T = output_TD.norm(dim=1) * used_T
                assert row["tokens"] == len(ids)
                assert row["used"] == int(used_T.sum())
                assert row["gate"] == pytest.approx(float(gate_T.sum()))
                assert row["norm"] == pytest.approx(float((norm_T * gate_T).sum()), abs=1e-12)
                assert row["plain_norm"] == pytest.approx(float(norm_T.sum()), abs=1e-12)


def test_a_dead_expert_and_a_pair_of_copies_are_seen():
    model = decoder("topk_softmax")
    layer = moe_layers(model)[1]
    with torch.no_grad():
        layer.router.bias = torch.nn.Parameter(torch.tensor([0.0, -1e3, 0, 0, 0, 0]).double())
        layer.router.weight[3] = layer.router.weight[2]
        for value in layer.experts.parameters():
            value[3] = value[2]
    scores = expert_scores(model, texts()).filter(pl.col("layer") == 1)
    dead = scores.filter(expert=1)
    assert dead.select(pl.sum("used", "gate", "norm").sum()).rows() == [(0, 0, 0)]
    assert (dead["output_distance"] == 1).all()
    distances = scores.group_by("expert", maintain_order=True).first()
    assert distances["router_distance"].to_numpy()[2:4] == pytest.approx(0, abs=1e-12)
    outputs = distances["output_distance"].to_numpy()  # of sums over tokens, which differ a little
    assert outputs[2:4].max() < min(0.1, outputs[[0, 4, 5]].min())
    assert distances["router_distance"].to_numpy()[[0, 4, 5]].min() > 0.01


def planted(documents=12, experts=20, seed=0):
    """Losses in a known order with little noise; reap follows it, frequency is its reverse, gate
    mass says nothing.
    """
    generator = np.random.default_rng(seed)
    shape = (documents, experts)
    order = np.arange(experts) + 1.0
    columns = {
        "layer": np.zeros(shape, int),
        "expert": np.tile(np.arange(experts), (documents, 1)),
        "doc": np.repeat(np.arange(documents), experts).reshape(shape),
        "tokens": np.full(shape, 100.0),
    }
    noise = generator.normal(0, 0.01, shape)
    used = np.tile(100.0 - order, (documents, 1))
    losses = {"d_loss": 100 * (order + noise), "used": used, "kl": noise, "d_loss_used": noise}
    scores = {
        "used": used,
        "gate": np.tile(generator.permutation(order), (documents, 1)),
        "norm": used * order,
        "plain_norm": used * order**2,
        "router_distance": np.tile(order, (documents, 1)),
        "output_distance": np.tile(-order, (documents, 1)),
    }
    frames = [
        pl.DataFrame({name: values.reshape(-1) for name, values in {**columns, **part}.items()})
        for part in (losses, scores)
    ]
    every = {"by": pl.lit(None, pl.String), "class": pl.lit(None, pl.String)}
    return frames[0].with_columns(edit=pl.lit("forbid"), **every), frames[1]


def test_planted_orders_are_found():
    losses, scores = planted()
    agreement = score_agreement(scores, losses)
    assert agreement.height == 2 * len(SCORES)  # the layer, and the model of this one layer
    model = agreement.filter(pl.col("layer").is_null())
    assert model.drop("layer").equals(agreement.filter(layer=0).drop("layer"))
    found = {row["score"]: row for row in model.iter_rows(named=True)}
    for score in ("reap", "activation_norm", "router_distance"):
        assert found[score]["rho"] == pytest.approx(1)
        assert found[score]["top"] == 1
    for score in ("frequency", "output_distance"):
        assert found[score]["rho"] == pytest.approx(-1)
        assert found[score]["top"] == 0
    assert abs(found["gate_mass"]["rho"]) < 0.6
    assert found["reap"]["top_chance"] == 0.1
    assert found["reap"]["lo"] == pytest.approx(1)


def test_an_interval_follows_the_noise_of_the_documents():
    losses, scores = planted()
    generator = np.random.default_rng(1)
    noisy = losses.with_columns(
        d_loss=pl.col("d_loss") + pl.Series(generator.normal(0, 1500, losses.height))
    )
    (row,) = score_agreement(scores, noisy).filter(layer=0, score="reap").to_dicts()
    assert row["lo"] < row["rho"] < row["hi"]
    assert 0.1 < row["hi"] - row["lo"] < 1.5


def test_measured_losses_and_scores_of_one_model_fit_together():
    model, documents = decoder(), texts(6)
    scores, losses = expert_scores(model, documents), expert_losses(model, documents)
    agreement = score_agreement(scores, losses, resamples=50)
    assert agreement["experts"].to_list() == [6] * 14 + [12] * 7
    assert agreement["rho"].is_between(-1, 1).all()
    few = score_agreement(scores, losses.filter(pl.col("expert") < 2))
    assert few.filter(pl.col("layer") == 0)["rho"].null_count() == 7
    with refused("scores", AnalysisError):
        score_agreement(scores.filter(pl.col("doc") > 0), losses)
