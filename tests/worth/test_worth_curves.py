"""Removal curves, losses against k, pairs and replays: against plain passes and planted models."""

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused
from test_expert_worth import loss_sums, texts
from test_interventions import decoder, moe_layers

from moe_lab.errors import AnalysisError, TraceError
from moe_lab.trace import capture, open_trace
from moe_lab.worth import (
    Exchange,
    Forbid,
    Replay,
    TopK,
    exchange_losses,
    expert_losses,
    expert_scores,
    intervene,
    pair_losses,
    removal_curves,
    replay_divergence,
    top_k_losses,
)
from moe_lab.worth.curves import possible_shares


def mean_change(model, documents, *edits):
    """Nats per predicted token, document by document."""
    total, tokens = 0.0, 0
    for ids in documents:
        before, _, _ = loss_sums(model, ids)
        with torch.no_grad(), intervene(model, *edits):
            log_q = model(torch.from_numpy(ids)[None]).logits[0, :-1].log_softmax(dim=1)
        after = -log_q.gather(1, torch.from_numpy(ids)[1:, None])[:, 0]
        total, tokens = total + float((after - before).sum()), tokens + len(ids) - 1
    return total / tokens


def test_an_order_is_chosen_on_one_half_and_judged_on_the_other():
    model, documents = decoder(), texts(16)
    scores, losses = expert_scores(model, documents), expert_losses(model, documents)
    curves = removal_curves(model, documents, scores, losses, shares=(1 / 6, 0.5), random_orders=3)
    assert curves["order"].n_unique() == 7 + 1 + 3
    assert curves.filter(share=0.5)["removed"].unique().to_list() == [6]
    assert curves["docs"].unique().to_list() == [8]
    half = losses.filter(pl.col("doc") % 2 == 0)
    worth = half.group_by("layer", "expert").agg(pl.sum("d_loss"))
    least = [worth.filter(layer=layer).sort("d_loss")["expert"].to_list()[:3] for layer in (0, 1)]
    edits = [Forbid(layer, expert) for layer in (0, 1) for expert in least[layer]]
    (row,) = curves.filter(order="measured loss", share=0.5).to_dicts()
    assert row["d_loss"] == pytest.approx(mean_change(model, documents[1::2], *edits), abs=1e-9)
    assert row["lo"] < row["d_loss"] < row["hi"]
    random = curves.filter(pl.col("order").str.starts_with("random"), share=0.5)
    assert random["p_random"].null_count() == 3
    beaten = (random["d_loss"] <= row["d_loss"]).sum()
    assert row["p_random"] == (1 + beaten) / 4


def test_what_an_order_would_see_of_its_judges_does_not_move_it():
    model, documents = decoder(), texts(12)
    scores, losses = expert_scores(model, documents), expert_losses(model, documents)
    curves = removal_curves(model, documents, scores, losses, shares=(0.5,), random_orders=0)
    sums = ["used", "gate", "norm", "plain_norm"]
    judges = pl.col("doc") % 2 == 1
    spoiled = scores.with_columns(
        pl.when(judges).then(1000.0 * (7 - pl.col("expert"))).otherwise(pl.col(name)).alias(name)
        for name in sums
    )
    turned = losses.with_columns(
        d_loss=pl.when(judges).then(-1000 * pl.col("d_loss")).otherwise(pl.col("d_loss"))
    )
    again = removal_curves(model, documents, spoiled, turned, shares=(0.5,), random_orders=0)
    assert again.equals(curves)
    assert curves["p_random"].null_count() == curves.height


def test_shares_and_frames_that_do_not_fit_are_refused():
    model, documents = decoder(), texts(6)
    scores = expert_scores(model, documents)
    for share in (0.0, 0.05, 0.9, 1.0):
        with refused("shares", AnalysisError):
            removal_curves(model, documents, scores, shares=(share,))
    with refused("documents", AnalysisError):
        removal_curves(model, documents[:1], scores)
    with refused("losses", AnalysisError):
        removal_curves(model, documents, scores, expert_losses(model, documents, experts=2))
    with refused("scores", AnalysisError):
        removal_curves(model, documents, scores.filter(pl.col("expert") > 0))


def test_losses_against_k_are_those_of_the_whole_model():
    model, documents = decoder(), texts(8)
    parity = [np.where(ids % 2 == 0, "even", "odd") for ids in documents]
    frame = top_k_losses(model, documents, (3, 1, 2), classes={"parity": parity})
    every = frame.filter(pl.col("class").is_null())
    assert every["k"].to_list() == [1, 2, 3]
    for row in every.iter_rows(named=True):
        change = mean_change(model, documents, TopK(None, row["k"]))
        assert row["d_loss"] == pytest.approx(change, abs=1e-9)
    own = frame.filter(k=2)  # the model's own k
    assert own.select("d_loss", "kl", "lo", "hi").sum().rows() == [(0, 0, 0, 0)]
    less = frame.filter(k=1)
    assert less["gain"].null_count() == less.height == 3
    assert own["gain"].to_list() == pytest.approx(less["d_loss"].to_list())
    by_class = frame.filter(pl.col("class").is_not_null())
    for k in (1, 2, 3):
        part = by_class.filter(k=k)
        mean = np.average(part["d_loss"].to_numpy(), weights=part["tokens"].to_numpy())
        assert mean == pytest.approx(every.filter(k=k)["d_loss"].item(), abs=1e-12)
    (odd,) = own.filter(pl.col("class") == "odd").to_dicts()
    assert odd["tokens"] == sum((ids[:-1] % 2 == 1).sum() for ids in documents)


def test_a_class_alone_has_k_experts_where_its_tokens_are(tmp_path):
    model, documents = decoder(), texts(6)
    classes = {"parity": [np.where(ids % 2, "odd", "even") for ids in documents]}
    path = tmp_path / "alone.parquet"
    frame = top_k_losses(model, documents, [1, 2], classes=classes, alone=True, path=path)
    assert frame.select("k", "class").rows() == [
        (k, name) for k in (1, 2) for name in ("even", "odd")
    ]
    changes, tokens = 0.0, 0
    for ids in documents:
        odd = torch.from_numpy(ids % 2 == 1)[None]
        less = loss_sums(model, ids, TopK(None, 1, odd))[0] - loss_sums(model, ids)[0]
        changes += float(less[ids[:-1] % 2 == 1].sum())
        tokens += int((ids[:-1] % 2 == 1).sum())
    (row,) = frame.filter(pl.col("class") == "odd", k=1).to_dicts()
    assert row["tokens"] == tokens
    assert row["d_loss"] == pytest.approx(changes / tokens, abs=1e-9)
    assert frame.filter(k=2)["d_loss"].to_list() == pytest.approx([0, 0], abs=1e-12)
    together = top_k_losses(model, documents, [1, 2], classes=classes)
    (whole,) = together.filter(pl.col("class") == "odd", k=1).to_dicts()
    assert whole["d_loss"] != pytest.approx(row["d_loss"], abs=1e-6)
    again = top_k_losses(model, documents, [1, 2], classes=classes, alone=True, path=path)
    assert again.equals(frame)
    with refused("alone", AnalysisError):
        top_k_losses(model, documents, [1], alone=True)


def test_shares_that_fit_no_layer_are_not_asked_for():
    assert possible_shares(decoder()) == [0.125, 0.25, 0.375, 0.5]
    assert possible_shares(decoder(top_k=4)) == [0.125, 0.25, 0.375]
    assert possible_shares(decoder(num_experts=3)) == [0.25, 0.375]


def test_a_pair_loses_what_both_lose():
    model, documents = decoder(), texts(8)
    (row,) = pair_losses(model, documents, [(1, 2, 5)]).to_dicts()
    for name, edits in (
        ("d_first", [Forbid(1, 2)]),
        ("d_second", [Forbid(1, 5)]),
        ("d_both", [Forbid(1, 2), Forbid(1, 5)]),
    ):
        assert row[name] == pytest.approx(mean_change(model, documents, *edits), abs=1e-9)
    assert row["excess"] == pytest.approx(row["d_both"] - row["d_first"] - row["d_second"])
    assert row["lo"] < row["excess"] < row["hi"]
    assert pair_losses(model, documents[:2], 2)["layer"].to_list() == [0, 0, 1, 1]
    for pair in ((1, 2, 2), (1, 0, 6), (7, 0, 1)):
        with refused("pairs", TraceError):
            pair_losses(model, documents, [pair])


def test_copies_are_found_by_their_exchange_and_stand_in_for_each_other():
    model, documents = decoder("topk_softmax", top_k=1), texts(8)
    layer = moe_layers(model)[1]
    used = int(model(torch.from_numpy(documents[0])[None]).routings[1].counts()[:6].argmax())
    other = (used + 1) % 6
    with torch.no_grad():
        for value in layer.experts.parameters():
            value[other] = value[used]
        layer.router.weight[other] = layer.router.weight[used] * (1 + 1e-3)
    found = exchange_losses(model, documents).filter(layer=1)
    assert found.height == 15
    free = found.filter(pl.col("kl") < 1e-9, pl.col("used") > 0)
    assert free.select("first", "second").rows() == [tuple(sorted((used, other)))]
    (row,) = exchange_losses(model, documents, [(1, 0, 3)]).to_dicts()
    change = mean_change(model, documents, Exchange(1, 0, 3))
    assert row["d_loss"] == pytest.approx(change, abs=1e-9)
    assert row["d_loss_used"] is not None
    (pair,) = pair_losses(model, documents, [(1, used, other)]).to_dicts()
    assert abs(pair["d_first"]) + abs(pair["d_second"]) < 0.1 * abs(pair["d_both"])


def test_a_replay_of_the_models_own_trace_diverges_by_its_rounded_weights_alone(tmp_path):
    model, documents = decoder(), texts(7)
    with torch.no_grad(), capture(model, tmp_path / "t"):
        for ids in documents:
            model(torch.from_numpy(ids)[None])
    trace = open_trace(tmp_path / "t")
    frame = replay_divergence(model, trace, batch_tokens=60)
    ids, weights = frame.to_dicts()
    assert [ids["selection"], weights["selection"]] == ["recorded ids", "recorded ids and weights"]
    assert abs(ids["kl"]) < 1e-12
    assert abs(ids["d_loss"]) < 1e-12
    assert 0 < weights["kl"] < 1e-4
    assert ids["tokens"] == sum(len(item) - 1 for item in documents)


def test_a_replay_in_another_model_is_compared_with_the_recorder(tmp_path):
    recorder, model, documents = decoder(), decoder(), texts(7)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight += 0.3 * torch.randn_like(layer.router.weight)
        with capture(recorder, tmp_path / "t"):
            for ids in documents:
                recorder(torch.from_numpy(ids)[None])
    trace = open_trace(tmp_path / "t")
    own, ids, weights = replay_divergence(model, trace, recorder=recorder).to_dicts()
    assert own["selection"] == "own selection"
    assert own["kl"] > ids["kl"] > weights["kl"] > 0  # the models differ in their routers alone
    alone = replay_divergence(model, trace).to_dicts()[0]
    total, tokens = 0.0, 0
    for number, item in enumerate(documents):
        _, log_p, _ = loss_sums(model, item)
        with torch.no_grad(), intervene(model, Replay(trace, first_document=number)):
            log_q = model(torch.from_numpy(item)[None]).logits[0, :-1].log_softmax(dim=1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(item) - 1
    assert alone["kl"] == pytest.approx(total / tokens, abs=1e-12)


def test_a_trace_without_whole_documents_is_refused(tmp_path):
    model = decoder()
    with torch.no_grad(), capture(model, tmp_path / "t"):
        model(torch.zeros(1, 4, dtype=torch.long))
    trace = open_trace(tmp_path / "t")
    frame = trace.tokens.collect().with_columns(pos=pl.col("pos") + 1)

    class Shifted:
        tokens = frame.lazy()
        meta = trace.meta

    with refused("trace", AnalysisError):
        replay_divergence(model, Shifted())  # type: ignore[arg-type]
