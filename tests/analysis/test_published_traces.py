"""OLMoE's and Mixtral's published tables, laid out as token-level traces and read back through the
whole instrument.

The tables say how often expert i ran on token id x. Slots are dealt to the tokens of an id so that
every token gets k distinct experts, which is always possible (an expert runs at most once per
token) and leaves every count as published.
"""

import json

import numpy as np
import polars as pl
import pytest
import torch

from moe_lab.analysis import (
    domain_divergence,
    expert_load,
    expert_vocabulary,
    load_summary,
    vocabulary_specialisation,
)
from moe_lab.routing import Routing
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, open_trace

pytestmark = [pytest.mark.data, pytest.mark.slow]
LAYERS = (0, 7, 15)
DOMAINS = ("arxiv", "book", "c4", "github", "wikipedia", "tulu")


def rounded(value):
    """The known answers are rounded to six decimals."""
    return pytest.approx(value, abs=5.1e-7)


def deal(counts, k):
    """[T, k] expert ids, T = sum(counts) / k, in which each expert occurs as often as ``counts``
    says and never twice in a row.
    """
    slots = np.repeat(np.arange(len(counts)), counts)
    return np.ascontiguousarray(slots.reshape(k, -1).T)


def write(folder, tokens, layers, num_experts):
    doc, pos = (tokens[name].to_numpy() for name in ("doc", "pos"))
    meta = TraceMeta(
        layers=tuple(
            LayerMeta(layer, num_experts, 0, ids.shape[1]) for layer, ids in layers.items()
        )
    )
    with TraceWriter(folder, meta, rows_per_part=60_000) as writer:
        writer.write_tokens(tokens)
        for layer, ids in layers.items():
            scores = torch.ones(1, 1).expand(len(ids), num_experts)
            writer.write_routing(
                layer,
                doc,
                pos,
                Routing(
                    torch.from_numpy(ids), torch.ones(ids.shape), scores, scores, num_experts, 0
                ),
            )
    return open_trace(folder).check()


@pytest.fixture(scope="module", params=["book", "github"])
def vocabulary(request, data_dir, tmp_path_factory):
    """The trace of one domain: 208,896 tokens with their ids, top-8 of 64, three layers."""
    with np.load(
        data_dir / "traces" / "olmoe" / f"eid2token_olmoe_{request.param}.npz", allow_pickle=False
    ) as arrays:
        table = pl.DataFrame({name: arrays[name] for name in arrays.files}).sort(
            "layer", "token_id", "expert"
        )
    layers, ids = {}, []
    for layer in LAYERS:
        rows = table.filter(pl.col("layer") == layer).partition_by("token_id", maintain_order=True)
        layers[layer] = np.concatenate([_dealt(part) for part in rows])
        ids.append(
            np.concatenate(
                [np.full(int(part["count"].sum()) // 8, part["token_id"][0]) for part in rows]
            )
        )
    assert all(np.array_equal(ids[0], other) for other in ids)
    row = np.arange(len(ids[0]))
    tokens = pl.DataFrame({"doc": row // 2048, "pos": row % 2048, "token_id": ids[0]})
    return request.param, write(
        tmp_path_factory.mktemp("olmoe") / request.param, tokens, layers, 64
    )


def _dealt(part):
    slots = np.repeat(part["expert"].to_numpy().astype(np.int64), part["count"].to_numpy())
    return slots.reshape(8, -1).T


@pytest.fixture(scope="module")
def known(data_dir):
    return json.loads((data_dir / "traces" / "olmoe" / "derived_known_answers.json").read_text())


def test_load_and_vocabulary_of_olmoe_equal_the_known_answers(vocabulary, known):
    domain, trace = vocabulary
    answers = [known[f"olmoe_{domain}/layer_{layer}"] for layer in LAYERS]
    load, ids = load_summary(trace), vocabulary_specialisation(trace)
    assert load["slots"].to_list() == [8 * answer["tokens"] for answer in answers]
    for column, name in [
        ("load_cv",) * 2,
        ("max_over_mean",) * 2,
        ("effective_experts",) * 2,
        ("max_violation", "maxvio"),
    ]:
        assert load[column].to_list() == [rounded(answer[name]) for answer in answers], column
    assert ids["ids"].to_list() == [answer["vocab_types"] for answer in answers]
    assert ids["mean"].to_list() == [rounded(answer["vocab_spec_topk_mean"]) for answer in answers]
    assert ids["token_weighted"].to_list() == [
        rounded(answer["vocab_spec_topk_tokenweighted"]) for answer in answers
    ]


def test_the_most_exclusive_ids_of_an_expert_are_those_of_the_table(vocabulary, data_dir):
    domain, trace = vocabulary
    with np.load(
        data_dir / "traces" / "olmoe" / f"eid2token_olmoe_{domain}.npz", allow_pickle=False
    ) as arrays:
        table = pl.DataFrame({name: arrays[name] for name in arrays.files}).filter(
            pl.col("layer") == 15
        )
    sizes = table.group_by("token_id").agg(n=pl.col("count").sum() // 8)
    wanted = (
        table.join(sizes, on="token_id")
        .filter(pl.col("n") >= 50)
        .with_columns(share=pl.col("count") / pl.col("n"))
    )
    best = wanted.group_by("expert").agg(pl.col("share").max()).sort("expert")
    found = expert_vocabulary(trace, layers=[15], top=1, min_count=50).sort("expert")
    assert found["share"].to_list() == pytest.approx(best["share"].to_list())


@pytest.mark.parametrize(
    ("model", "k", "experts"), [("olmoe-1b-7b-0924", 8, 64), ("mixtral-8x7b-v0.1", 2, 8)]
)
def test_domains_of_published_models_are_conserved_and_diverge_as_known(
    model, k, experts, data_dir, known, tmp_path
):
    table = json.loads((data_dir / "traces" / "olmoe" / "expert_counts.json").read_text())[model][
        "expert_counts"
    ]
    domains = [domain for domain in DOMAINS if domain in table]
    layers = {
        layer: np.concatenate([deal(table[domain][f"layer_{layer}"], k) for domain in domains])
        for layer in LAYERS
    }
    sizes = [sum(table[domain]["layer_0"]) // k for domain in domains]
    row = np.concatenate([np.arange(size) for size in sizes])
    doc = row // 2048 + np.repeat(np.arange(len(domains)) * 1000, sizes)
    tokens = pl.DataFrame(
        {"doc": doc, "pos": row % 2048, "token_id": 0, "domain": np.repeat(domains, sizes)}
    )
    trace = write(tmp_path / "trace", tokens, layers, experts)
    load = expert_load(trace, by="domain")
    for (layer, domain), part in load.group_by("layer", "domain"):
        assert part.sort("expert")["count"].to_list() == table[str(domain)][f"layer_{layer}"]
    assert set(
        load.filter(pl.col("domain") != "tulu")
        .group_by("layer", "domain")
        .agg(pl.col("count").sum())["count"]
    ) == {k * 208_896}
    if model.startswith("olmoe"):
        for layer, a, b, bits in (
            domain_divergence(trace, resamples=0)
            .select("layer", "domain_a", "domain_b", "bits")
            .rows()
        ):
            answers = known["_domain_jsd_bits_olmoe_expert_counts"][f"layer_{layer}"]
            assert bits == rounded(answers.get(f"{a}|{b}", answers.get(f"{b}|{a}"))), (layer, a, b)
