"""One measurement of a model's experts: windows, its folder, and what it says."""

import numpy as np
import polars as pl
import pytest
from refusals import refused
from test_expert_worth import loss_sums, texts
from test_interventions import decoder

from moe_lab.errors import AnalysisError, ConfigError, TraceError
from moe_lab.worth import Forbid, batches, expert_losses, expert_scores, expert_worth, measures
from moe_lab.worth import ablation as ablation_module
from moe_lab.worth.ablation import Ablation, untouched_loss
from moe_lab.worth.batches import padded_batches, pass_bytes
from moe_lab.worth.measures import EditKind
from moe_lab.worth.paired_passes import Untouched
from moe_lab.worth.worth_files import read_meta, refuse_taken
from moe_lab.worth.worth_sentences import curve_sentences, pruning_price, worth_sentences


def test_a_document_longer_than_the_context_runs_in_windows_and_predicts_each_token_once():
    model, long = decoder(), np.random.default_rng(1).integers(0, 40, 70)  # context 32
    documents = [texts()[0], long, texts()[1]]
    passes = padded_batches(model, documents, 64)
    windows = [item for batch in passes for item in batch.documents if item.number == 1]
    assert [len(item.ids) for item in windows] == [32, 32, 8]
    assert all(batch.ids.numel() <= 64 for batch in passes)
    assert sum(bool((batch.docs == 1).any()) for batch in passes) == 2
    got = expert_losses(model, documents, experts=[(1, 4)], batch_tokens=64)
    row = got.row(1, named=True)
    parts = [long[start : start + 32] for start in (0, 31, 62)]
    change = [loss_sums(model, part, Forbid(1, 4))[0] - loss_sums(model, part)[0] for part in parts]
    assert (row["doc"], row["tokens"]) == (1, 69)
    assert row["d_loss"] == pytest.approx(sum(float(part.sum()) for part in change), abs=1e-9)
    scores = expert_scores(model, documents, batch_tokens=64).filter(layer=1, expert=4)
    assert scores["tokens"].to_list() == [len(documents[0]), 72, len(documents[2])]
    alone = expert_scores(model, [long], batch_tokens=64).filter(layer=1, expert=4)
    assert scores["norm"][1] == pytest.approx(alone["norm"][0])


def test_a_measurement_writes_its_tables_and_is_not_replaced(tmp_path):
    model, documents = decoder(), texts(12)
    ablation = Ablation(model, documents, experts=3)
    assert ablation.measured == {0: 3, 1: 3}
    tables = ablation.run(tmp_path, {"source": "here"})
    meta = read_meta(tmp_path)
    assert meta["source"] == "here"
    assert (meta["documents"], meta["edit"], meta["notes"]) == (12, "forbid", [])
    assert meta["loss"] == pytest.approx(
        float(sum(loss_sums(model, ids)[0].sum() for ids in documents))
        / sum(len(ids) - 1 for ids in documents)
    )
    for name, table in tables.items():
        written = pl.read_parquet(tmp_path / f"{name}.parquet").drop("measured", strict=False)
        assert written.sort(table.columns).equals(table.sort(table.columns))
    assert meta["sentences"] == worth_sentences(
        tables["worth"], tables["losses"], tables["agreement"], meta["loss"]
    )
    with refused("out", AnalysisError):
        ablation.run(tmp_path)
    with refused("worth", AnalysisError):
        read_meta(tmp_path / "other")


def test_where_a_token_runs_every_expert_each_can_be_silenced_and_none_forbidden(tmp_path):
    options = {"experts": 1, "curves": True, "pairs": 1}
    silenced = Ablation(decoder(top_k=6), texts(6), edit=EditKind.SILENCE, **options)
    assert set(silenced.minutes()) == {"losses", "scores", "curves", "pairs"}
    assert {"worth", "top_k", "pairs"} <= set(silenced.run(tmp_path))
    with refused("edits", TraceError):
        Ablation(decoder(top_k=6), texts(6), **options).minutes()


def test_documents_of_a_token_are_counted_and_left_out(tmp_path):
    documents = texts(6)
    alone = expert_worth(expert_losses(decoder(), documents, experts=2))
    several = [documents[0], np.array([3]), *documents[1:], np.array([], np.int64)]
    ablation = Ablation(decoder(), several, experts=2, left_out={"blank": 3, "repeated": 0})
    worth = ablation.run(tmp_path)["worth"]
    assert worth["d_loss"].to_numpy() == pytest.approx(alone["d_loss"].to_numpy())
    meta = read_meta(tmp_path)
    assert meta["left_out"] == {"blank": 3, "of fewer than two tokens": 2}
    assert meta["documents"] == 6
    assert meta["notes"] == ["Documents left out: 3 blank and 2 of fewer than two tokens."]


def test_passes_that_do_not_fit_into_memory_are_refused(monkeypatch):
    model, long = decoder(), [np.zeros(70, np.int64)]  # 32 tokens of 40 words in float64
    assert (
        pass_bytes(model, 32) == 32 * 40 * 24 == Ablation(model, long, batch_tokens=32).pass_bytes
    )
    monkeypatch.setattr(batches, "free_memory", lambda device: 32 * 40 * 24 - 1)
    with refused("batch_tokens", AnalysisError):
        padded_batches(model, long, 32)
    monkeypatch.setattr(batches, "free_memory", lambda device: 32 * 40 * 24)
    assert len(padded_batches(model, long, 32)) == 3
    monkeypatch.setattr(batches, "free_memory", lambda device: None)
    assert len(padded_batches(model, long, 10**9)) == 1


def test_a_folder_of_other_things_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "scores.parquet").write_text("mine")
    (tmp_path / ".hidden").touch()
    with refused("out", AnalysisError):
        refuse_taken(tmp_path)
    (tmp_path / "scores.parquet").unlink()
    refuse_taken(tmp_path)
    refuse_taken(tmp_path / "new")


def test_an_interrupted_measurement_goes_on_and_the_plan_is_of_what_is_left(tmp_path, monkeypatch):
    model, documents = decoder(), texts(12)
    whole = Ablation(model, documents, experts=3).run(tmp_path / "whole")
    monkeypatch.setattr(measures, "TIMED_SECONDS", 1e-9)
    monkeypatch.setattr(measures, "perf_counter", iter(range(1000)).__next__)
    ablation, passes = Ablation(model, documents, experts=3), []
    assert ablation.minutes()["losses"] == pytest.approx(2 * (1 + 3) / 60)
    original = Untouched.differences

    def differences(self, *rest):
        if len(passes) == 4:
            raise KeyboardInterrupt
        passes.append(1)
        return original(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Untouched, "differences", differences)
        with pytest.raises(KeyboardInterrupt):
            ablation.run(tmp_path / "cut")
    assert ablation.minutes(tmp_path / "cut")["losses"] == pytest.approx((1 + 2) / 60)
    again = ablation.run(tmp_path / "cut")
    assert again["losses"].equals(whole["losses"])
    with refused("path", AnalysisError):
        Ablation(model, documents[:-1], experts=3).minutes(tmp_path / "cut")


def test_curves_and_pairs_are_measured_on_request(tmp_path):
    ablation = Ablation(decoder(layers=1), texts(12), curves=True, pairs=4)
    assert set(ablation.minutes()) == {"losses", "scores", "curves", "pairs"}
    tables = ablation.run(tmp_path)
    assert ablation.ks == tables["top_k"]["k"].to_list() == [1, 2, 3, 4]
    assert tables["curves"].filter(order="measured loss").height == 4
    assert tables["pairs"].height == tables["exchanges"].height == 4
    assert curve_sentences(tables["curves"])[0] in read_meta(tmp_path)["sentences"]
    unbounded = tables["curves"].with_columns(lo=pl.lit(None, pl.Float64))
    assert " nats/token on documents that " in curve_sentences(unbounded)[0]
    with refused("layers", ConfigError):
        Ablation(decoder(), texts(), layers=[0], curves=True)
    with refused("alone", ConfigError):
        Ablation(decoder(), texts(), curves=True, alone=True)


def test_one_document_is_measured_without_intervals_and_curves_of_removal(tmp_path):
    ablation = Ablation(decoder(layers=1), texts(1), curves=True, pairs=1)
    assert ablation.minutes()["curves"] > 0
    tables = ablation.run(tmp_path)
    assert "curves" not in tables
    assert tables["top_k"]["k"].to_list() == [1, 2, 3, 4]
    assert tables["worth"]["lo"].null_count() == 6
    assert tables["pairs"]["lo"].null_count() == 1
    meta = read_meta(tmp_path)
    assert meta["notes"] == ["No curves of removal: they need two documents."]
    assert meta["sentences"][0].startswith("Cannot tell which of 6 experts matter from 1 document")


def test_where_few_experts_are_left_the_curves_are_shorter_and_a_note_says_so(tmp_path):
    documents = texts(8)
    classes = {"half": [np.where(np.arange(len(ids)) % 2, "a", "b") for ids in documents]}
    model = decoder(layers=1, num_experts=3)
    ablation = Ablation(model, documents, curves=True, classes=classes, alone=True)
    assert ablation.minutes()["curves"] > 0
    tables = ablation.run(tmp_path)
    assert tables["curves"]["share"].unique().sort().to_list() == [0.25, 0.375]
    (note,) = read_meta(tmp_path)["notes"]
    assert note.startswith("No curve without 12.5 % and 50 % of the experts: ")
    assert tables["top_k_alone"]["class"].unique().sort().to_list() == ["a", "b"]
    assert ablation.ks == tables["top_k_alone"]["k"].unique().sort().to_list() == [1, 2, 3]


def test_where_k_cannot_be_changed_a_note_says_so(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise TraceError("router 0: expected a router with its number of slots")

    monkeypatch.setattr(ablation_module, "top_k_losses", refuse)
    tables = Ablation(decoder(layers=1), texts(10), curves=True).run(tmp_path)
    assert "top_k" not in tables
    (note,) = read_meta(tmp_path)["notes"]
    assert note.startswith("No losses against k: router 0")


# ------------------------------------------------------------------------------------------------
# sentences


def planted(costs, documents=40, noise=0.0, seed=0):
    """Losses [layer 0, expert, doc] of 10 tokens each, whose means are ``costs``."""
    draws = np.random.default_rng(seed).normal(size=(len(costs), documents))
    draws -= draws.mean(axis=1, keepdims=True)
    return pl.DataFrame(
        [
            {
                "layer": 0, "expert": expert, "edit": "forbid", "by": None, "class": None,
                "doc": doc, "tokens": 10.0, "d_loss": 10 * (cost + noise * draws[expert, doc]),
                "kl": 0.0, "used": 1.0, "d_loss_used": 0.0,
            }
            for expert, cost in enumerate(costs)
            for doc in range(documents)
        ],
        schema_overrides={"by": pl.String, "class": pl.String},
    )  # fmt: skip


def agreement(**scores):
    rows = [
        {"layer": None, "score": name, "rho": rho, "lo": low, "hi": high, "experts": 4, "docs": 40}
        for name, (rho, low, high) in scores.items()
    ]
    return pl.DataFrame(rows, schema_overrides={"layer": pl.Int64})


def test_the_sentence_counts_what_matters_and_what_costs_nothing():
    losses = planted([0.5, 0.1, 0.0005, -0.0005], noise=1e-5)
    first, second = worth_sentences(
        expert_worth(losses),
        losses,
        agreement(reap=(0.7, 0.6, 0.8), frequency=(0.2, 0.1, 0.3)),
        3.0,
    )
    assert first.startswith(
        "2 of 4 measured experts matter (above 0.1 % of the loss, 0.0030 nats/token), most of all "
        "expert 0 of layer 0 (0.5000 nats/token, "
    )
    assert "2 cost less on half of the documents: pruning them costs" in first
    assert first.endswith("on the other half, if single losses add up.")
    assert second == (
        "reap orders these 4 experts best (rank correlation with the measured loss 0.70, 0.60 to "
        "0.80)."
    )


def test_experts_that_all_cost_nothing_cannot_all_be_pruned():
    losses = planted([0.0005, -0.0005], noise=1e-5)
    first, *_ = worth_sentences(expert_worth(losses), losses, agreement(reap=(0.2, 0.1, 0.3)), 3.0)
    assert "on half of the documents all do, and their losses add up to " in first
    assert "pruning" not in first


def test_what_cannot_be_told_comes_with_the_documents_that_would_tell():
    losses = planted([0.5, 0.004], noise=0.02)
    worth = expert_worth(losses)
    _, second, third = worth_sentences(worth, losses, agreement(reap=(0.2, -0.2, 0.6)), 3.0)
    row = worth.row(1, named=True)
    needed = 40 * ((row["d_loss"] - row["lo"]) / 0.001) ** 2
    number = int(second.split("about ")[1].split(" documents")[0].replace(",", ""))
    assert second.startswith("Cannot tell for 1 expert: about ")
    assert needed <= number <= 1.1 * needed
    assert third.startswith("Cannot tell whether any score orders these 4 experts as the loss does")
    assert third.endswith("about 160 documents would tell.")
    few = planted([0.5], documents=4)
    (alone,) = worth_sentences(expert_worth(few), few, agreement(), 3.0)
    assert alone.startswith("Cannot tell which of 1 expert matter from 4 documents")


def test_experts_that_too_few_documents_used_are_counted_apart():
    losses = planted([0.5, 0.0], noise=1e-5)
    unused = {
        name: pl.when(expert=1).then(0).otherwise(pl.col(name)) for name in ("used", "d_loss")
    }
    losses = losses.with_columns(**unused)
    reap = agreement(reap=(0.7, 0.6, 0.8))
    first, second, _ = worth_sentences(expert_worth(losses), losses, reap, 3.0)
    assert first.startswith("1 of 2 measured experts matters ")
    assert second == (
        "Cannot tell for 1 expert that fewer than 5 documents used: an interval needs as many."
    )


def test_pruning_is_chosen_on_one_half_of_the_documents_and_judged_on_the_other():
    losses = planted([0.0, 0.0, 1.0])
    # Expert 1 is free on the even documents alone; expert 0 costs .2 on the odd ones.
    odd = pl.col("doc") % 2 == 1
    losses = losses.with_columns(
        d_loss=pl.when(odd & (pl.col("expert") == 0)).then(2.0)
        .when(odd & (pl.col("expert") == 1)).then(5.0).otherwise("d_loss")
    )  # fmt: skip
    price = pruning_price(losses, 0.01)
    assert price is not None
    assert price["experts"] == 2
    assert price["d_loss"] == pytest.approx(0.7)
    assert pruning_price(losses, -1.0) is None


def test_loss_of_the_untouched_model_in_float64_is_exact():
    model, documents = decoder(), texts(3)
    losses = [loss_sums(model, ids)[0] for ids in documents]
    mean = sum(float(part.sum()) for part in losses) / sum(map(len, losses))
    assert untouched_loss(model, documents) == pytest.approx(mean, abs=1e-12)
