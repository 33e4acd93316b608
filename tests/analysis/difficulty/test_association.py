"""``difficulty_association`` against oracles that share no code with it, and in words where there
is nothing to measure.
"""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from refusals import refused
from scipy import stats
from simulated_routers import (
    Corpus,
    World,
    simulate_corpus,
    simulate_router,
)
from single_cue_routers import cue_corpus, cue_verdicts, false_verdicts

from moe_lab.analysis import difficulty_association
from moe_lab.analysis.difficulty import (
    association,
    difficulty_curves,
    difficulty_information,
    difficulty_nulls,
)
from moe_lab.analysis.difficulty.alignment import layers_of, since
from moe_lab.analysis.difficulty.association import Pairing, Rows, pairings, tables
from moe_lab.analysis.difficulty.context import copied_suffix
from moe_lab.errors import AnalysisError

COLUMNS = [
    "layer",
    "align",
    "rho_raw",
    "rho_strata",
    "rho_token",
    "rho_token_lo",
    "rho_token_hi",
    "p",
    "q",
]
COLUMNS += ["verdict", "n_tokens", "n_docs"]
FEW: dict[str, Any] = {"resamples": 300}


@pytest.fixture(scope="module")
def tokens():
    return simulate_corpus(Corpus(documents=220, tokens=150, vocabulary=300), seed=3)


@pytest.fixture(scope="module")
def routed(tokens):
    return simulate_router(
        tokens, World(frequency=0.5, difficulty=0.15), "difficulty", seed=4
    ).with_columns(layer=pl.lit(2))


def row_of(frame, align="input", layer=None):
    frame = frame.filter(pl.col("align") == align)
    return (frame if layer is None else frame.filter(pl.col("layer") == layer)).row(0, named=True)


def dummies(codes):
    """Indicator columns, one a value."""
    distinct, code = np.unique(codes, return_inverse=True)
    return np.eye(len(distinct))[code]


def residual_by_least_squares(values, *codes):
    design = np.hstack([dummies(code) for code in codes])
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def test_the_columns_are_those_that_others_rely_on(routed):
    result = difficulty_association(routed, difficulty="difficulty", seed=0, **FEW)
    assert result.columns[: len(COLUMNS)] == COLUMNS
    assert result["align"].to_list() == ["input", "target"]
    assert result["layer"].to_list() == [2, 2]


def test_raw_rank_correlations_are_those_of_scipy(routed):
    used = routed.filter(pl.col("pos") > 0)
    hard, spent = used["difficulty"].to_numpy(), used["ffn_count"].to_numpy()
    row = row_of(difficulty_association(routed, "difficulty", details=True, **FEW))
    assert row["rho_raw"] == pytest.approx(stats.spearmanr(hard, spent).statistic, abs=1e-12)
    assert row["xi"] == pytest.approx(stats.chatterjeexi(hard, spent).statistic, abs=1e-12)
    assert row["n_tokens"] == used.height - row["n_alone"]


def test_the_headline_is_the_correlation_of_rank_residuals_from_a_regression_on_ids(routed):
    used = routed.filter(pl.col("pos") > 0)
    ranks = [stats.rankdata(used[name]) for name in ("difficulty", "ffn_count")]
    left = [residual_by_least_squares(rank, used["token_id"].to_numpy()) for rank in ranks]
    row = row_of(difficulty_association(routed, "difficulty", **FEW))
    assert row["rho_token"] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-10)


def test_the_target_alignment_takes_out_both_the_id_that_went_in_and_the_one_to_come(routed):
    small = routed.filter(pl.col("doc") < 40)
    following = small.with_columns(
        next_id=pl.col("token_id").shift(-1).over("doc"),
        next_hard=pl.col("difficulty").shift(-1).over("doc"),
    )
    used = following.filter((pl.col("pos") > 0) & pl.col("next_id").is_not_null())
    ranks = [stats.rankdata(used[name]) for name in ("next_hard", "ffn_count")]
    left = [
        residual_by_least_squares(rank, used["token_id"].to_numpy(), used["next_id"].to_numpy())
        for rank in ranks
    ]
    row = row_of(
        difficulty_association(small, "difficulty", min_documents=2, details=True, **FEW), "target"
    )
    assert row["rho_raw"] == pytest.approx(
        stats.spearmanr(used["next_hard"], used["ffn_count"]).statistic, abs=1e-12
    )
    # Tokens alone in a group are left out by us; their residual is 0 in a regression too.
    assert row["rho_token"] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-8)


def test_rows_may_come_in_any_order_and_lazily(routed):
    shuffled = routed.sample(fraction=1, shuffle=True, seed=1)
    plain = difficulty_association(routed, "difficulty", **FEW)
    assert difficulty_association(shuffled.lazy(), "difficulty", **FEW).equals(plain)


def test_only_ranks_of_difficulty_count(routed):
    plain = row_of(difficulty_association(routed, "difficulty", **FEW))
    bent = row_of(
        difficulty_association(routed.with_columns(pl.col("difficulty").exp()), "difficulty", **FEW)
    )
    assert bent["rho_token"] == pytest.approx(plain["rho_token"], abs=1e-12)


def test_the_same_seed_gives_the_same_interval(routed):
    first, same, other = (
        difficulty_association(routed, "difficulty", seed=seed, **FEW) for seed in (5, 5, 6)
    )
    assert first.equals(same)
    assert first["rho_token_lo"][0] != other["rho_token_lo"][0]


def test_a_static_layer_is_said_in_words(tokens):
    fixed = tokens.with_columns(layer=pl.lit(0), ffn_count=pl.lit(8))
    result = difficulty_association(fixed, "difficulty", **FEW)
    assert result["verdict"].to_list() == ["static layer"] * 2
    assert "every token has a compute of 8" in result["note"][0]
    assert result["rho_token"].null_count() == 2


def test_a_static_layer_does_not_hide_another(tokens, routed):
    both = ["doc", "pos", "token_id", "difficulty", "ffn_count"]
    fixed = tokens.with_columns(ffn_count=pl.lit(8, pl.UInt8)).select(
        *both, layer=pl.lit(0, pl.Int32)
    )
    layers = pl.concat([routed.select(*both, "layer"), fixed])
    result = difficulty_association(layers, "difficulty", **FEW)
    assert result["layer"].to_list() == [0, 0, 2, 2]
    assert row_of(result, layer=2)["verdict"] == "difficulty-aligned"
    assert row_of(result, layer=0)["verdict"] == "static layer"


def test_fewer_than_30_effective_documents_are_not_judged(routed):
    few = difficulty_association(routed.filter(pl.col("doc") < 25), "difficulty", **FEW)
    assert few["verdict"].to_list() == ["inconclusive"] * 2
    assert "effective documents of 25; at least 30" in few["note"][0]
    assert few["rho_token"].null_count() == 0


def test_repeated_documents_count_once_and_a_long_one_counts_as_one(routed):
    """Every document four times: the interval and the number are those of the documents once."""
    once = difficulty_association(routed, "difficulty", details=True, **FEW)
    copies = [routed.with_columns(doc=pl.col("doc") + 10_000 * number) for number in range(4)]
    four = difficulty_association(pl.concat(copies), "difficulty", details=True, **FEW)
    assert four["n_effective"].to_list() == pytest.approx(once["n_effective"].to_list(), rel=1e-9)
    widths = [(frame["rho_token_hi"] - frame["rho_token_lo"]).to_numpy() for frame in (once, four)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    giant = routed.with_columns(
        doc=pl.when(pl.col("doc") < 100).then(0).otherwise("doc"),
        pos=pl.col("pos") + pl.when(pl.col("doc") < 100).then(1000 * pl.col("doc")).otherwise(0),
    )
    assert difficulty_association(giant, "difficulty", details=True, **FEW)["n_effective"][0] < 10


def test_short_documents_are_left_out(routed):
    short = routed.with_columns(
        doc=pl.when(pl.col("doc") < 10)
        .then(1000 + pl.col("doc") * 100 + pl.col("pos") // 50)
        .otherwise("doc")
    )
    whole = row_of(difficulty_association(routed.filter(pl.col("doc") >= 10), "difficulty", **FEW))
    cut = row_of(difficulty_association(short, "difficulty", **FEW))
    assert cut["n_docs"] == whole["n_docs"] == 210
    assert cut["rho_token"] == whole["rho_token"]


def test_tokens_whose_id_occurs_once_are_counted_and_say_nothing(routed):
    places = pl.int_range(pl.len()) % 10 == 3
    lonely = routed.with_columns(
        token_id=pl.when(places).then(10_000 + pl.int_range(pl.len())).otherwise("token_id")
    )
    row = row_of(difficulty_association(lonely, "difficulty", details=True, **FEW))
    hidden = routed.with_columns(difficulty=pl.when(~places).then("difficulty"))
    rest = row_of(difficulty_association(hidden, "difficulty", **FEW))
    assert row["n_alone"] > routed.height // 12
    assert row["n_tokens"] == rest["n_tokens"]
    assert row["rho_token"] == pytest.approx(rest["rho_token"], abs=0.02)


def test_ids_that_all_occur_once_cannot_be_judged(routed):
    result = difficulty_association(
        routed.with_columns(token_id=pl.int_range(pl.len())), "difficulty", **FEW
    )
    assert result["verdict"].to_list() == ["inconclusive"] * 2
    assert result["n_tokens"].to_list() == [0, 0]
    assert "no token id occurs twice" in result["note"][0]


def test_missing_difficulties_leave_tokens_out_and_are_counted(routed):
    place = pl.int_range(pl.len()) % 7
    holes = routed.with_columns(
        difficulty=pl.when(place == 0)
        .then(None)
        .when(place == 1)
        .then(float("nan"))
        .otherwise("difficulty")
    )
    row = row_of(difficulty_association(holes, "difficulty", details=True, **FEW))
    used = holes.filter(
        (pl.col("pos") > 0) & pl.col("difficulty").is_not_null() & pl.col("difficulty").is_not_nan()
    )
    assert row["rho_raw"] == pytest.approx(
        stats.spearmanr(used["difficulty"], used["ffn_count"]).statistic, abs=1e-12
    )
    assert row["n_missing"] == routed.filter(pl.col("pos") > 0).height - used.height


def test_no_difficulty_at_all_is_inconclusive(routed):
    result = difficulty_association(
        routed.with_columns(difficulty=pl.lit(None)), "difficulty", **FEW
    )
    assert result["verdict"].to_list() == ["inconclusive"] * 2
    assert result["note"][0] == "no token has both compute and a difficulty"


def test_target_pairs_need_neighbours(routed):
    """Where every other token is missing from the trace there is no next token to pair with."""
    gaps = routed.filter(pl.col("pos") % 2 == 0)
    assert (
        difficulty_association(gaps, "difficulty", min_document_tokens=1, **FEW)[
            "n_tokens"
        ].to_list()[1]
        == 0
    )


def test_position_0_is_left_out_unless_asked_for(routed):
    sink = routed.with_columns(
        ffn_count=pl.when(pl.col("pos") == 0).then(200).otherwise("ffn_count")
    )
    plain = row_of(difficulty_association(routed, "difficulty", **FEW))
    assert row_of(difficulty_association(sink, "difficulty", **FEW))["rho_raw"] == plain["rho_raw"]
    assert (
        row_of(difficulty_association(sink, "difficulty", include_first=True, **FEW))["rho_raw"]
        != plain["rho_raw"]
    )


def test_a_router_that_is_a_table_over_ids_is_called_so(tokens):
    lookup = tokens.with_columns(layer=pl.lit(0), ffn_count=(pl.col("token_id") * 7919) % 5)
    row = row_of(difficulty_association(lookup, "difficulty", **FEW))
    assert row["verdict"] == "identity-driven"
    assert row["rho_token"] == 0
    assert "compute is a function of the token id" in row["note"]


def test_a_table_over_the_next_id_is_called_so_under_the_target_alignment(tokens):
    looked = tokens.with_columns(
        layer=pl.lit(0),
        ffn_count=((pl.col("token_id") * 7919) % 5).shift(-1).over("doc").fill_null(0),
    )
    row = row_of(difficulty_association(looked, "difficulty", details=True, **FEW), "target")
    assert row["verdict"] in ("identity-driven", "no material association")
    assert abs(row["rho_token"]) < 0.02


def test_a_difficulty_that_the_id_decides_cannot_be_followed_within_ids(routed):
    frequency = routed.with_columns(difficulty=-pl.len().over("token_id").log())
    row = row_of(difficulty_association(frequency, "difficulty", **FEW))
    assert row["verdict"] == "inconclusive"
    assert "function of the token id" in row["note"]


def test_compute_that_follows_documents_alone_is_task_level(tokens):
    level = (
        tokens.group_by("doc")
        .agg(level=pl.col("difficulty").mean())
        .with_columns(rank=pl.col("level").rank() / pl.len())
    )
    generator = np.random.default_rng(0)
    joined = tokens.join(level, on="doc", maintain_order="left")
    spent = generator.binomial(12, 0.25 + 0.5 * joined["rank"].to_numpy())
    # Within a document, compute is a coin; between documents it follows their mean difficulty.
    row = row_of(
        difficulty_association(
            tokens.with_columns(layer=pl.lit(0), ffn_count=spent), "difficulty", details=True, **FEW
        )
    )
    assert row["verdict"] == "task-level only"
    assert row["rho_token"] > 0.05 > 0.02 > abs(row["rho_document"])


def test_a_class_that_splits_an_id_is_not_taken_for_difficulty(tokens):
    """Compute follows the lexer class, and one id is harder in one class than in the other: within
    ids alone this looks like a choice.
    """
    generator = np.random.default_rng(2)
    inside = generator.integers(0, 2, tokens.height)
    frame = tokens.with_columns(
        layer=pl.lit(0),
        lexer=pl.Series(np.where(inside == 1, "comment", "name_other")),
        difficulty=pl.col("difficulty") + pl.Series(0.4 * inside),
        ffn_count=pl.Series(generator.binomial(12, 0.4 + 0.2 * inside)),
    )
    row = row_of(difficulty_association(frame, "difficulty", details=True, **FEW))
    assert row["rho_token"] > 0.05
    assert row["verdict"] == "identity-driven"
    assert "lexer class" in row["note"]


def test_rare_ids_can_be_pooled_within_strata(routed):
    own = row_of(difficulty_association(routed, "difficulty", details=True, **FEW))
    pooled = row_of(
        difficulty_association(routed, "difficulty", pool_below=30, details=True, **FEW)
    )
    assert pooled["n_alone"] == 0 <= own["n_alone"]
    assert pooled["rho_token"] != own["rho_token"]


def test_identity_control_survives_a_vocabulary_of_rare_ids():
    """Most ids are rare here; compared with others of their band instead of with themselves they
    would pass for difficulty.
    """
    tokens = simulate_corpus(
        Corpus(documents=250, tokens=120, vocabulary=20_000, by_id=2.0), seed=8
    )
    difficulty = tokens.group_by("token_id").agg(mean=pl.col("difficulty").mean())
    table = tokens.join(difficulty, on="token_id", maintain_order="left")["mean"].to_numpy()
    spent = np.random.default_rng(0).binomial(12, 1 / (1 + np.exp(-table)))
    frame = tokens.with_columns(layer=pl.lit(0), ffn_count=spent)
    row = row_of(difficulty_association(frame, "difficulty", **FEW))
    assert row["rho_raw"] > 0.5
    assert abs(row["rho_token"]) < 0.03
    assert row["verdict"] in ("frequency-driven", "identity-driven")
    assert (
        row_of(difficulty_association(frame, "difficulty", pool_below=30, **FEW))["rho_token"] > 0.1
    )


def test_the_false_discovery_rate_is_over_all_rows(tokens):
    layers = pl.concat(
        [
            simulate_router(tokens, World(), "difficulty", seed).with_columns(layer=pl.lit(seed))
            for seed in range(4)
        ]
    )
    result = difficulty_association(layers, "difficulty", **FEW)
    assert result["q"].to_numpy() == pytest.approx(
        stats.false_discovery_control(result["p"].to_numpy()), abs=1e-12
    )


def test_layers_are_measured_together_as_alone(tokens, monkeypatch):
    monkeypatch.setattr(association, "TOGETHER", 2)
    routes = [
        simulate_router(tokens, World(difficulty=0.15), "difficulty", seed=layer).with_columns(
            layer=pl.lit(layer), spent=pl.col("ffn_count") * scale
        )
        for layer, scale in enumerate([1.0, 0.5, 1 / 3, 1.0, 100.0])
    ]
    routes[3] = routes[3].filter(pl.col("pos") != 7)  # its own tokens
    options: dict[str, Any] = {"compute": "spent", "difficulty": "difficulty"}
    more: dict[str, Any]
    for analysis, more in (
        (difficulty_association, {"details": True, "resamples": 100}),
        (difficulty_nulls, {"draws": 20}),
        (difficulty_curves, {"resamples": 20}),
        (difficulty_information, {"shuffles": 1}),
    ):
        alone = pl.concat(analysis(route, **options, **more) for route in routes)
        together = analysis(pl.concat(routes).sample(fraction=1, shuffle=True), **options, **more)
        of_all_rows = [name for name in ("q", "verdict", "note") if name in alone.columns]
        assert_frame_equal(together.drop(of_all_rows), alone.drop(of_all_rows), check_exact=True)


def test_ranks_and_groups_of_one_alignment_are_held_at_a_time(tokens):
    layers = pl.concat(
        simulate_router(tokens, World(), "difficulty", seed).with_columns(layer=pl.lit(seed))
        for seed in range(2)
    )
    held: list[weakref.ref[Pairing]] = []

    def only_one(pairing):
        held.append(weakref.ref(pairing))
        assert sum(kept() is not None for kept in held) == 1

    def name(tokens, pairing, _):
        return tokens.layer, pairing.aligned.align.value

    rows = Rows(only_one, name, lambda found: pl.DataFrame(found, orient="row"))
    (aligns,) = tables(pairings(layers, "difficulty", "ffn_count"), rows)
    assert aligns.rows() == [(0, "input"), (1, "input"), (0, "target"), (1, "target")]
    assert len(held) == 2


def test_other_notions_of_compute_are_columns(routed):
    mass = routed.with_columns(gate_mass=pl.col("ffn_count") / 24)
    count, gate = (
        difficulty_association(mass, "difficulty", compute=name, **FEW)
        for name in ("ffn_count", "gate_mass")
    )
    assert gate["rho_token"].to_list() == pytest.approx(count["rho_token"].to_list(), abs=1e-12)


def test_what_cannot_be_computed_is_refused_in_one_sentence(routed):
    with refused("hard", AnalysisError):
        difficulty_association(routed, "hard")
    with refused("pos", AnalysisError):
        difficulty_association(pl.concat([routed, routed]), "difficulty")
    with refused("difficulty", AnalysisError):
        difficulty_association(
            routed.with_columns(pl.col("difficulty").cast(pl.String)), "difficulty"
        )
    with refused("resamples"):
        difficulty_association(routed, "difficulty", resamples=10)


def test_a_relation_that_bends_is_said_to_bend():
    corpus = simulate_corpus(Corpus(documents=250, tokens=200, vocabulary=300), 3)
    hard = corpus.with_columns(pl.col("difficulty") - pl.col("difficulty").mean().over("token_id"))
    ends = hard["difficulty"].to_numpy() ** 2
    spent = np.random.default_rng(0).binomial(12, 1 / (1 + np.exp(1 - 0.5 * ends)))
    frame = corpus.with_columns(layer=pl.lit(0), ffn_count=spent)
    row = row_of(difficulty_association(frame, "difficulty", details=True, **FEW))
    assert abs(row["rho_token"]) < 0.05
    assert row["rho_bend"] > 0.1
    assert row["verdict"] == "not monotone"
    assert "easiest and the hardest tokens get most" in row["note"]


def test_the_band_is_stated_in_compute():
    corpus = simulate_corpus(Corpus(documents=250, tokens=200, vocabulary=300), 4)
    routed = simulate_router(corpus, World(difficulty=0.3), "difficulty", 5)
    frame = routed.with_columns(layer=pl.lit(0))
    row = row_of(difficulty_association(frame, "difficulty", details=True, **FEW))
    hard = frame.filter(pl.col("pos") > 0).with_columns(
        hard=pl.col("difficulty") - pl.col("difficulty").mean().over("token_id")
    )
    low, high = (hard["hard"].quantile(share) for share in (0.1, 0.9))
    easiest = hard.filter(pl.col("hard") <= low).select(pl.mean("share")).item()
    hardest = hard.filter(pl.col("hard") >= high).select(pl.mean("share")).item()
    assert row["verdict"] == "difficulty-aligned"
    assert row["compute_percent"] == pytest.approx(100 * (hardest / easiest - 1), rel=0.2)


@pytest.mark.parametrize(
    ("column", "begins", "what"),
    [("boundary", "after_newline", "line"), ("subword", "word_start", "word")],
)
def test_a_router_that_sees_the_place_in_a_line_or_word_is_driven_by_context(column, begins, what):
    """Difficulty falls along the line, and so does compute: without the column that looks like
    following difficulty.
    """
    generator = np.random.default_rng(5)
    corpus = simulate_corpus(Corpus(documents=220, tokens=200, vocabulary=100), 5)
    begin = generator.random(corpus.height) < 0.1
    place = since(begin, corpus["doc"].to_numpy())
    spent = generator.binomial(12, 1 / (1 + np.exp(0.05 * place)))
    frame = corpus.with_columns(
        pl.col("difficulty") - 0.1 * place, layer=pl.lit(0), ffn_count=spent
    )
    assert row_of(difficulty_association(frame, "difficulty", **FEW))["verdict"] == (
        "difficulty-aligned"
    )
    marked = frame.with_columns(pl.Series(column, np.where(begin, begins, "inside")))
    row = row_of(difficulty_association(marked, "difficulty", strata=[], details=True, **FEW))
    assert row["verdict"] == "context-driven"
    assert abs(row[f"rho_place_in_the_{what}"]) < 0.02
    assert f"its place in the {what}" in row["note"]


def test_the_reliability_of_a_difficulty_is_that_of_two_halves_stepped_up():
    """True difficulty of variance 1 within ids and an error of variance 1: a reliability of 1/2,
    which takes 1 - sqrt(1/2) of the correlation.
    """
    generator = np.random.default_rng(6)
    corpus = simulate_corpus(Corpus(documents=220, tokens=200, vocabulary=50, by_document=0.0), 6)
    exact = simulate_router(corpus, World(difficulty=0.3), "difficulty", 7).with_columns(
        layer=pl.lit(0)
    )
    errors = generator.normal(0, np.sqrt(2), (2, corpus.height))
    noisy = exact.with_columns(
        difficulty=pl.col("difficulty") + pl.Series(errors.mean(axis=0)),
        difficulty_half_a=pl.col("difficulty") + pl.Series(errors[0]),
        difficulty_half_b=pl.col("difficulty") + pl.Series(errors[1]),
    )
    true = row_of(difficulty_association(exact, "difficulty", details=True, **FEW))
    row = row_of(difficulty_association(noisy, "difficulty", details=True, **FEW))
    assert true["reliability"] is None
    assert "reliability" not in true["note"]
    assert row["reliability"] == pytest.approx(0.5, abs=0.05)
    corrected = row["rho_token"] / np.sqrt(row["reliability"])
    assert corrected == pytest.approx(true["rho_token"], rel=0.1)
    assert f"without error the correlation would be about {corrected:+.3f}" in row["note"]
    deaf = noisy.with_columns(
        difficulty_half_a=pl.Series(errors[0]), difficulty_half_b=pl.Series(errors[1])
    )
    assert "hardly measured" in row_of(difficulty_association(deaf, "difficulty", **FEW))["note"]


def test_the_place_is_counted_from_the_last_beginning_or_from_the_document():
    begins = np.array([False, False, True, False, False, False, True])
    doc = np.array([0, 0, 0, 0, 1, 1, 1])
    assert since(begins, doc).tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_the_copied_suffix_is_the_longest_one_that_was_followed_by_the_token():
    ids = np.array([1, 2, 3, 1, 2, 3, 9, 2, 3, 1, 2])
    doc = np.zeros(len(ids), dtype=np.int64)
    assert copied_suffix(ids, doc).tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 1, 0, 3]
    assert copied_suffix(np.tile(ids, 2), np.repeat([0, 1], len(ids)))[len(ids) :].tolist() == (
        copied_suffix(ids, doc).tolist()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_routers_that_see_one_cue_are_never_called_aligned_or_inverted(kind):
    """The reduced form of ``python experiments/single_cue_routers.py``."""
    verdicts = cue_verdicts(cue_corpus(kind, 200, 300), range(1), resamples=300)
    assert false_verdicts(verdicts)["false"].sum() == 0
    right = verdicts.filter(
        (pl.col("cue") == "difficulty of the token") & (pl.col("align") == "input")
    )
    assert right["verdict"].to_list() == ["difficulty-aligned"]


@pytest.mark.parametrize("compute", ["ffn_count", "difficulty"])
def test_layers_that_share_their_tokens_are_read_as_each_is_alone(compute):
    rng = np.random.default_rng(0)
    size = 400
    keys = pl.DataFrame(
        {
            "doc": rng.permutation(np.repeat([0, 1, 2, 3], [150, 120, 100, 30])),
            "token_id": rng.integers(0, 9, size),
            "difficulty": rng.random(size),
        }
    ).with_columns(pos=pl.int_range(pl.len()).over("doc"))
    layers = []
    for layer in range(4):
        spent = pl.Series(rng.integers(0, 9, size).astype(float))
        if layer == 2:
            spent[7] = float("nan")
        frame = keys.with_columns(layer=pl.lit(layer), ffn_count=spent)
        if layer == 3:
            frame = frame.with_columns(difficulty=pl.Series(rng.random(size)))
        layers.append(frame)
    together = list(layers_of(pl.concat(layers), "difficulty", compute, None, 64))
    for frame, found in zip(layers, together, strict=True):
        (alone,) = layers_of(frame, "difficulty", compute, None, 64)
        assert found.layer == alone.layer
        assert found.same_tokens(alone)
        assert np.array_equal(found.compute, alone.compute)
    assert together[1].pos is together[0].pos


def test_the_committed_measurement_of_12_layers_takes_less_than_a_minute_and_3_gigabytes():
    folder = Path(__file__).parents[3] / "experiments" / "benchmarks" / "results"
    measured = pl.read_parquet(folder / "difficulty_speed.parquet")
    assert measured["layers"].unique().to_list() == [12]
    assert (measured["tokens"].to_numpy() > 2_700_000).all()
    seconds = measured.group_by("round").agg(pl.col("seconds").sum())["seconds"]
    assert np.median(seconds.to_numpy()) < 60
    assert (measured["gigabytes"].to_numpy() < 3).all()
