"""The measured worth of experts: against plain passes, in planted models, and resumed."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused
from test_interventions import decoder, moe_layers

from moe_lab.errors import AnalysisError, TraceError
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.worth import (
    EditKind,
    Forbid,
    Silence,
    expert_losses,
    expert_minutes,
    expert_worth,
    intervene,
    measured_rows,
    measures,
)
from moe_lab.worth.paired_passes import Untouched
from moe_lab.worth.shared_prefix import SharedPrefix


def texts(number=7, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 40, int(length)) for length in generator.integers(5, 25, number)]


def loss_sums(model, ids, edit=None):
    """(loss of each predicted token, log-probabilities, routings) of one document alone."""
    tokens = torch.from_numpy(ids)[None]
    with torch.no_grad():
        if edit is None:
            output = model(tokens)
        else:
            with intervene(model, edit):
                output = model(tokens)
    log_p = output.logits[0, :-1].log_softmax(dim=1)
    return -log_p.gather(1, tokens[0, 1:, None])[:, 0], log_p, output.routings


@pytest.mark.parametrize(("edit", "kind"), [(Forbid, "forbid"), (Silence, "silence")])
def test_sums_are_those_of_each_document_run_alone(edit, kind):
    model, documents = decoder(), texts()
    got = expert_losses(model, documents, experts=[(0, 2), (1, 4)], edit=EditKind(kind))
    assert got.select("layer", "expert").unique().rows() != []
    for row in got.iter_rows(named=True):
        ids = documents[row["doc"]]
        before, log_p, routings = loss_sums(model, ids)
        after, log_q, _ = loss_sums(model, ids, edit(row["layer"], row["expert"]))
        used = (routings[row["layer"]].indices == row["expert"]).any(dim=1)[:-1]
        assert row["edit"] == kind
        assert row["tokens"] == len(ids) - 1
        assert row["used"] == int(used.sum())
        assert row["d_loss"] == pytest.approx(float((after - before).sum()), abs=1e-5)
        assert row["d_loss_used"] == pytest.approx(float((after - before)[used].sum()), abs=1e-5)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        assert row["kl"] == pytest.approx(float(kl), abs=1e-5)


@pytest.mark.parametrize("align", ["target", "input"])
def test_losses_by_class_are_those_of_its_tokens(align):
    model, documents = decoder(), texts()
    parity = [np.where(ids % 3 == 0, "third", "other") for ids in documents]
    domain = [["a" if number % 2 else None] * len(ids) for number, ids in enumerate(documents)]
    classes = {"parity": parity, "domain": domain}
    losses = expert_losses(model, documents, experts=[(1, 4)], classes=classes, align=align)
    for row in losses.iter_rows(named=True):
        ids = documents[row["doc"]]
        before, after = (loss_sums(model, ids, edit)[0] for edit in (None, Forbid(1, 4)))
        counted = {
            None: np.ones(len(ids) - 1, bool),
            "parity": (parity[row["doc"]] == row["class"])[1:]
            if align == "target"
            else (parity[row["doc"]] == row["class"])[:-1],
            "domain": np.full(len(ids) - 1, row["doc"] % 2 == 1),
        }[row["by"]]
        assert row["tokens"] == counted.sum()
        assert row["d_loss"] == pytest.approx(float((after - before)[counted].sum()), abs=1e-9)
    worth = expert_worth(losses)
    assert worth.select("by", "class").rows() == [
        (None, None), ("domain", "a"), ("parity", "other"), ("parity", "third"),
    ]  # fmt: skip
    assert worth["docs"].to_list()[:2] == [7, 3]
    assert worth.filter(by="domain")["lo"].null_count() == 1
    with refused("classes", AnalysisError):
        expert_losses(model, documents, classes={"domain": domain[1:]})


def test_a_shared_prefix_gives_the_logits_of_the_whole_pass_to_the_bit():
    model = decoder(layers=3)
    ids = torch.from_numpy(texts()[0])[None]
    sites, _ = find_sites(model, None, None)
    calls: list[int] = []
    for place, site in enumerate(sites):
        prefix = SharedPrefix(model, site)
        calls.clear()
        with torch.no_grad():
            with prefix.recorded():
                untouched = model(ids).logits
            with intervene(model, Forbid(site.layer, 1)):
                whole = model(ids).logits
            handles = [
                layer.router.register_forward_hook(lambda *_: calls.append(1))
                for layer in moe_layers(model)
            ]
            with intervene(model, Forbid(site.layer, 1)), prefix.reused():
                assert torch.equal(model(ids).logits, whole)
            assert len(calls) == len(sites) - place
            with prefix.reused():
                assert torch.equal(model(ids).logits, untouched)
            for handle in handles:
                handle.remove()
        assert "forward" not in vars(model.blocks[0])


def test_layers_that_run_twice_or_are_written_into_are_not_shared():
    model = decoder()
    site = find_sites(model, None, None)[0][1]
    ids = torch.from_numpy(texts()[0])[None]
    prefix = SharedPrefix(model, site)
    with torch.no_grad(), prefix.recorded():
        model(ids)
        model(ids)
    assert not prefix.usable

    def write(module, args):
        args[0].add_(1)

    handle = model.blocks[1].register_forward_pre_hook(write)
    with torch.no_grad(), prefix.recorded():
        model(ids)
    handle.remove()
    assert not prefix.usable


def test_means_are_over_tokens_and_intervals_from_documents():
    losses = expert_losses(decoder(), texts(12), experts=2)
    worth = expert_worth(losses)
    assert worth.height == 4
    for row in worth.iter_rows(named=True):
        own = losses.filter(layer=row["layer"], expert=row["expert"])
        sums = {name: float(own[name].to_numpy().sum()) for name in measures.SUMS}
        assert row["d_loss"] == pytest.approx(sums["d_loss"] / sums["tokens"])
        assert row["d_loss_used"] == pytest.approx(sums["d_loss_used"] / sums["used"])
        assert row["lo"] < row["d_loss"] < row["hi"]
        assert row["kl"] > 0
        assert row["docs"] == 12
    few = expert_worth(expert_losses(decoder(), texts(4), experts=1))
    assert few["lo"].null_count() == few.height


def test_a_dead_expert_is_worth_nothing_and_a_needed_one_something():
    model = decoder("topk_softmax")
    router = moe_layers(model)[1].router
    with torch.no_grad():
        router.bias = torch.nn.Parameter(torch.tensor([0.0, -1e3, 0, 0, 0, 1e3]).double())
    worth = expert_worth(expert_losses(model, texts(), experts=[(1, 1), (1, 5)]))
    dead, always = worth.sort("expert").iter_rows(named=True)
    assert (dead["d_loss"], dead["kl"], dead["used"]) == (0, 0, 0)
    assert dead["d_loss_used"] is None
    assert always["used"] == always["tokens"]
    assert always["kl"] > 0


def count_edited_passes(monkeypatch, stop_at=None):
    """A list of (layer, expert, documents) that grows with each edited pass."""
    measured, original = [], Untouched.differences

    def differences(self, edits, *rest):
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        documents = sorted(document.number for document in self.batch.documents)
        measured.append((edits[0].layer, edits[0].expert, *documents))
        return original(self, edits, *rest)

    monkeypatch.setattr(Untouched, "differences", differences)
    return measured


def test_a_measurement_goes_on_at_the_expert_and_batch_where_it_stopped(tmp_path, monkeypatch):
    model, documents, path = decoder(), texts(), tmp_path / "losses.parquet"
    options: dict[str, Any] = {"experts": 3, "batch_tokens": 60}
    with monkeypatch.context() as patch:
        every = count_edited_passes(patch)
        whole = expert_losses(model, documents, **options)
    assert len(set(every)) == len(every) > 2 * 3  # more than one batch
    with monkeypatch.context() as patch:
        count_edited_passes(patch, stop_at=5)
        with pytest.raises(KeyboardInterrupt):
            expert_losses(model, documents, path=path, **options)
    with monkeypatch.context() as patch:
        later = count_edited_passes(patch)
        again = expert_losses(model, documents, path=path, **options)
    assert later == every[5:]
    assert again.equals(whole)
    with refused("path", AnalysisError):
        expert_losses(model, documents, path=path, edit=EditKind.SILENCE, **options)
    with torch.no_grad():
        parameter = next(model.parameters())
        parameter.copy_(parameter.flip(0))  # of the same sum
    with refused("path", AnalysisError):
        expert_losses(model, documents, path=path, **options)


def test_a_damaged_measurement_is_refused_and_any_folder_name_is_taken(tmp_path):
    path, options = tmp_path / "[1]*" / "losses.parquet", {"experts": 1, "layers": [1]}
    whole = expert_losses(decoder(), texts(), path=path, **options)
    assert expert_losses(decoder(), texts(), path=path, **options).equals(whole)
    path.write_bytes(path.read_bytes()[:500])
    with refused("path", AnalysisError):
        expert_losses(decoder(), texts(), path=path, **options)


def test_what_was_measured_is_written_while_it_runs(tmp_path, monkeypatch):
    path, heights = tmp_path / "losses.parquet", []
    monkeypatch.setattr(measured_rows, "WRITE_SECONDS", 0.0)
    original = Untouched.differences

    def differences(self, *rest):
        heights.append(pl.read_parquet(path).height if path.exists() else 0)
        return original(self, *rest)

    monkeypatch.setattr(Untouched, "differences", differences)
    expert_losses(decoder(), texts(), experts=3, path=path)
    assert heights == [7 * passes for passes in range(6)]


def test_silence_passes_no_batch_that_does_not_use_the_expert(monkeypatch):
    model = decoder("topk_softmax")
    with torch.no_grad():
        moe_layers(model)[1].router.bias = torch.nn.Parameter(
            torch.tensor([0.0, -1e3, 0, 0, 0, 0]).double()
        )
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    silenced = expert_losses(model, texts(), experts=[(1, 1)], edit=EditKind.SILENCE)
    assert len(passes) == 1
    expert_losses(model, texts(), experts=[(1, 1)])
    assert len(passes) == 3
    handle.remove()
    assert silenced["d_loss"].abs().sum() == silenced["kl"].abs().sum() == 0


def test_layers_can_be_chosen(monkeypatch):
    model = decoder(layers=3)
    every = expert_losses(model, texts(), experts=2)
    some = expert_losses(model, texts(), experts=2, layers=[0, 2])
    assert some.equals(every.filter(pl.col("layer") != 1))
    with refused("layers", TraceError):
        expert_losses(model, texts(), layers=[3])


def test_minutes_are_passes_times_their_seconds(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(measures, "perf_counter", lambda: 60.0 * next(clock))
    documents = [np.arange(10)] * 6
    # Each pass takes a minute: per layer and batch one untouched pass and one for each expert.
    assert expert_minutes(decoder(), documents, experts=3, batch_tokens=20) == 2 * 3 * (1 + 3)
    assert expert_minutes(decoder(), documents, experts=3, layers=[1]) == 1 + 3


def test_what_cannot_be_measured_is_refused():
    with refused("documents", AnalysisError):
        expert_losses(decoder(), [np.array([1])])
    with refused("experts", TraceError):
        expert_losses(decoder(), texts(), experts=[(0, 6)])
    with refused("losses", AnalysisError):
        expert_worth(expert_losses(decoder(), texts(), experts=[(0, 1)]).clear())


@pytest.mark.hf
def test_families_of_transformers_share_their_prefix_too(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    documents = texts(3)
    got = expert_losses(model, documents, experts=[(1, 0)])
    for row in got.iter_rows(named=True):
        ids = torch.from_numpy(documents[row["doc"]])[None]
        with torch.no_grad():
            before = model(input_ids=ids, labels=ids).loss
            with intervene(model, Forbid(1, 0)):
                after = model(input_ids=ids, labels=ids).loss
        assert row["d_loss"] == pytest.approx(float(after - before) * row["tokens"], abs=1e-4)
