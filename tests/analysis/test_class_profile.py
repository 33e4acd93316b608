"""Compute per token class, against averages taken by hand and worlds whose answer is known."""

import importlib

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.analysis import class_profile
from moe_lab.analysis.document_bootstrap import document_weights, expanded_interval
from moe_lab.errors import AnalysisError
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.rows import rows_of


def ids_with(counts, k=4):
    """[T, k] slots: the first ``counts[t]`` run real experts 0.., the rest zero-compute ones from 4
    on.
    """
    slots = np.arange(k)
    return np.where(slots < np.asarray(counts)[:, None], slots, 4 + slots)


def test_means_are_those_of_the_tokens_of_each_class(make_trace):
    ffn = {0: [4, 1, 2, 3, 4, 0], 3: [4, 3, 2, 1, 0, 4]}
    kinds = ["eos", "name", "space", "eos", "name", None]
    trace = make_trace(
        {n: ids_with(c) for n, c in ffn.items()},
        4,
        4,
        doc=[0, 0, 0, 1, 1, 1],
        pos=[0, 1, 2, 0, 1, 2],
        kind=kinds,
    )
    profile = class_profile(trace, "kind")
    assert profile.columns[:7] == ["layer", "class", "n_tokens", "n_docs", "mean", "lo", "hi"]
    assert profile.select("layer", "class", "n_tokens", "n_docs", "mean").rows() == [
        (None, "name", 2, 2, 2.0),
        (None, "space", 1, 1, 2.0),
        (0, "name", 2, 2, 2.5),
        (0, "space", 1, 1, 2.0),
        (3, "name", 2, 2, 1.5),
        (3, "space", 1, 1, 2.0),
    ]
    with_first = class_profile(trace, "kind", include_first=True).filter(
        pl.col("layer") == 3, pl.col("class") == "eos"
    )
    assert with_first["mean"].to_list() == [2.5]


def test_a_class_of_four_documents_has_no_interval(make_trace):
    trace = make_trace(
        ids_with([1, 2, 3, 4, 2, 4, 3, 1, 4, 2]),
        4,
        4,
        doc=np.arange(10) // 2,
        pos=[1, 2] * 5,
        kind=["a", "b"] * 4 + ["a", "a"],
    )
    rows = {
        row["class"]: row
        for row in class_profile(trace, "kind").filter(pl.col("layer") == 0).rows(named=True)
    }
    assert rows["b"]["lo"] is rows["b"]["hi"] is rows["b"]["adjusted_lo"] is None
    assert 1 <= rows["a"]["lo"] < rows["a"]["mean"] < rows["a"]["hi"] <= 4


def test_intervals_are_the_same_for_the_same_seed_and_shrink_with_the_level(make_trace):
    generator = np.random.default_rng(0)
    doc = np.repeat(np.arange(30), 20)
    trace = make_trace(
        ids_with(generator.integers(0, 5, 600)),
        4,
        4,
        doc=doc,
        pos=np.arange(600) % 20 + 1,
        kind="a",
    )
    first, second = (class_profile(trace, "kind", seed=5) for _ in range(2))
    assert first.equals(second)
    wide = class_profile(trace, "kind", seed=5, level=0.99)
    assert (wide["hi"] - wide["lo"] > first["hi"] - first["lo"]).all()


def test_the_interval_is_as_wide_as_the_spread_of_document_means(make_trace):
    """Tokens of a document are all alike, so 40 documents are 40 observations, however many tokens
    they hold.
    """
    generator = np.random.default_rng(1)
    level = generator.integers(0, 5, 40)
    doc = np.repeat(np.arange(40), 50)
    pos = np.arange(2000) % 50 + 1
    trace = make_trace(ids_with(level[doc]), 4, 4, doc=doc, pos=pos, kind="a")
    table = class_profile(trace, "kind", resamples=4000).filter(pl.col("layer") == 0)
    (row,) = table.rows(named=True)
    assert row["mean"] == pytest.approx(level.mean())
    assert (row["hi"] - row["lo"]) / 2 == pytest.approx(1.96 * level.std() / np.sqrt(40), rel=0.08)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(make_trace):
    """60 corpora of 25 documents: 95 % intervals of a mean that is 2 in truth."""
    covered, doc = 0, np.repeat(np.arange(25), 8)
    for seed in range(60):
        generator = np.random.default_rng(seed)
        counts = np.clip(generator.integers(1, 4, 25)[doc] + generator.integers(-1, 2, 200), 0, 4)
        trace = make_trace(ids_with(counts), 4, 4, doc=doc, pos=np.arange(200) % 8 + 1, kind="a")
        (row,) = (
            class_profile(trace, "kind", seed=seed, resamples=400)
            .filter(pl.col("layer") == 0)
            .rows(named=True)
        )
        covered += row["lo"] <= 2 <= row["hi"]
    assert 50 <= covered <= 60


def test_adjustment_removes_a_difference_that_is_all_frequency(make_trace):
    """Compute follows the frequency band alone; class "space" is mostly frequent, class "name"
    mostly rare.
    """
    generator = np.random.default_rng(2)
    kind = generator.integers(0, 2, 8000)
    rare = generator.random(8000) < np.where(kind == 1, 0.8, 0.2)
    names, bands = np.array(["space", "name"])[kind], np.array(["common", "rare"])[rare.astype(int)]
    columns = {
        "doc": np.arange(8000) // 40,
        "pos": np.arange(8000) % 40 + 1,
        "kind": names,
        "freq_band": bands,
    }
    trace = make_trace(ids_with(np.where(rare, 3, 1)), 4, 4, **columns)
    rows = {
        row["class"]: row
        for row in class_profile(trace, "kind").filter(pl.col("layer") == 0).rows(named=True)
    }
    assert rows["name"]["mean"] - rows["space"]["mean"] > 1
    assert rows["name"]["adjusted"] == pytest.approx(rows["space"]["adjusted"])
    assert rows["name"]["coverage"] == pytest.approx(1)
    assert rows["name"]["adjusted"] == pytest.approx(1 + 2 * rare.mean(), abs=0.02)


def test_coverage_says_how_much_of_the_text_an_adjusted_mean_speaks_of(make_trace):
    trace = make_trace(
        ids_with([1, 2, 3, 4]),
        4,
        4,
        pos=[1, 2, 3, 4],
        kind=["a", "a", "b", "b"],
        freq_band=["x", "x", "y", "y"],
    )
    profile = class_profile(trace, "kind").filter(pl.col("layer") == 0)
    assert profile["coverage"].to_list() == [0.5, 0.5]
    assert profile["adjusted"].to_list() == [1.5, 3.5]


def test_an_unknown_column_or_level_is_refused(make_trace):
    trace = make_trace([[0]], 2, kind="a")
    with refused("column", AnalysisError):
        class_profile(trace, "lexer")
    with refused("level"):
        class_profile(trace, "kind", level=95)


def test_a_trace_without_usable_tokens_gives_an_empty_profile(make_trace):
    assert class_profile(make_trace([[0]], 2, kind="a"), "kind").height == 0


def test_another_value_of_the_routing_is_profiled_where_every_token_has_it(make_trace):
    trace = make_trace(
        ids_with([4, 4, 4, 4]), 4, 4, doc=[0, 0, 1, 1], pos=[1, 2, 1, 2], kind=["a", "b", "a", "b"]
    )
    rows = trace.routing.select("pos", "gate_mass_ffn").collect()
    means = class_profile(trace, "kind", "gate_mass_ffn").filter(pl.col("layer").is_null())
    for kind, pos in (("a", 1), ("b", 2)):
        want = rows.filter(pl.col("pos") == pos)["gate_mass_ffn"].mean()
        assert means.filter(pl.col("class") == kind)["mean"].item() == pytest.approx(want)
    with refused("value", AnalysisError):
        class_profile(trace, "kind", "loss")


def spread_values(folder):
    """A trace of two layers with means a hundred times their spread, in three bands, and what it
    was written from.
    """
    generator = np.random.default_rng(3)
    doc, pos = (np.arange(4000) // 40).astype(np.uint32), (np.arange(4000) % 40).astype(np.uint32)
    kind, band = generator.choice(["a", "b"], 4000), generator.integers(0, 3, 4000)
    base = 100 + band + generator.random(4000)[doc]
    values = {layer: (base + generator.random(4000)).astype(np.float32) for layer in (0, 1)}
    meta = TraceMeta(layers=(LayerMeta(0, 4, 0, 1), LayerMeta(1, 4, 0, 1)))
    with TraceWriter(folder, meta, rows_per_part=700) as writer:
        columns = {"doc": doc, "pos": pos, "token_id": pos, "kind": kind, "freq_band": band}
        writer.write_tokens(pl.DataFrame(columns))
        zero, one = np.zeros(4000, np.uint8), np.ones((4000, 1))
        for layer, of in values.items():
            writer.write_rows(
                layer,
                {"doc": doc, "pos": pos, "experts": zero[:, None].astype(np.uint16), "entropy": of}
                | {"weights": one.astype(np.float16), "ffn_count": zero + 1, "zero_count": zero}
                | {"gate_mass_ffn": of, "margin": of, "dropped": zero},
                np.array([4000, 0, 0, 0]),
            )
    stratum = 10 * band + np.log2(pos + 1).astype(int)
    return open_trace(folder), doc, kind, stratum, values


def test_intervals_are_those_of_sums_in_double_precision(tmp_path):
    """Of each layer, and of the mean over both, against sums of each draw."""
    trace, doc, kind, stratum, values = spread_values(tmp_path / "t")
    profile = class_profile(trace, "kind", "entropy", include_first=True, resamples=200)
    (weights_BD,) = document_weights(100, 200, 0)

    def drawn(chosen, of):
        return weights_BD @ np.bincount(doc[chosen], of[chosen].astype(np.float64), 100)

    of_layer = values | {None: (values[0].astype(np.float64) + values[1]) / 2}
    assert profile.height == 6
    for row in profile.rows(named=True):
        of = of_layer[row["layer"]]
        total_B = total_weight = np.zeros(200)
        for one in set(stratum):
            here = (stratum == one) & (kind == row["class"])
            tokens_B = drawn(here, np.ones(4000))
            weight_B = np.where(tokens_B > 0, (stratum == one).mean(), 0)
            total_B = total_B + weight_B * drawn(here, of) / np.maximum(tokens_B, 1)
            total_weight = total_weight + weight_B
        here = kind == row["class"]
        raw_B = drawn(here, of) / drawn(here, np.ones(4000))
        low, high = map(float, expanded_interval(total_B / total_weight, 0.95, row["n_docs"]))
        assert row["adjusted_lo"] == pytest.approx(low, abs=2e-6 * (high - low))
        assert row["adjusted_hi"] == pytest.approx(high, abs=2e-6 * (high - low))
        low, high = map(float, expanded_interval(raw_B, 0.95, row["n_docs"]))
        assert (row["lo"], row["hi"]) == pytest.approx((low, high), rel=1e-13)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("class_profile", "HELD_TOKENS", 0),
        ("class_profile", "EXACT_SINGLE", 0),
        ("class_profile", "MAX_CELLS", 0),
        ("document_bootstrap", "BLOCK_CELLS", 100 * 50),
    ],
)
def test_ways_of_computing_give_the_same_frame(tmp_path, monkeypatch, module, name, value):
    """Token codes that are read again for each layer, counts in double precision, layers one by
    one, and draws in blocks of 50.
    """
    trace, *_ = spread_values(tmp_path / "t")
    whole = class_profile(trace, "kind", "entropy", resamples=200)
    monkeypatch.setattr(importlib.import_module(f"moe_lab.analysis.{module}"), name, value)
    assert class_profile(trace, "kind", "entropy", resamples=200).equals(whole)


def test_keys_of_the_token_table_are_columns_like_others(make_trace):
    trace = make_trace(ids_with([1, 2, 3, 4]), 4, 4, doc=[0, 0, 1, 1], pos=[1, 2, 1, 2])
    profile = class_profile(trace, "pos").filter(layer=0)
    assert profile.select("class", "n_docs", "mean").rows() == [(1, 2, 2.0), (2, 2, 3.0)]
    assert class_profile(trace, "doc").filter(layer=0)["mean"].to_list() == [1.5, 3.5]


def test_tokens_that_were_not_routed_are_in_no_class(make_trace, tmp_path):
    """The last token of each request of an engine: all numbers are those of the other tokens."""
    doc, pos = np.repeat(np.arange(6), 9), np.tile(np.arange(9), 6)
    generator = np.random.default_rng(1)
    kind = generator.choice(["a", "b"], len(doc))
    kind[pos == 9 - 1] = "a"
    ffn = generator.integers(0, 5, len(doc))
    routed = pos < 9 - 1
    kept = {"doc": doc[routed], "pos": pos[routed], "kind": kind[routed]}
    alone = make_trace(ids_with(ffn[routed]), 4, 4, **kept)
    tokens = pl.DataFrame({"doc": doc, "pos": pos, "token_id": 0, "kind": kind, "routed": routed})
    with TraceWriter(tmp_path / "engine", alone.meta) as writer:
        writer.write_tokens(tokens)
        (layer,) = alone.meta.layers
        rows = rows_of(layer, alone.routing.collect().drop("layer"))
        writer.write_rows(0, rows, alone.layer_counts(layer))
    assert class_profile(open_trace(tmp_path / "engine"), "kind").equals(
        class_profile(alone, "kind")
    )


def test_a_class_that_is_not_a_number_is_no_class(make_trace):
    kind = [0.5, float("nan"), 0.5, float("nan")]
    trace = make_trace(ids_with([1, 2, 3, 4]), 4, 4, pos=[1, 2, 3, 4], kind=kind)
    profile = class_profile(trace, "kind").filter(layer=0)
    assert profile.select("class", "n_tokens", "mean").rows() == [(0.5, 2, 2.0)]
