"""Counts against published totals and active figures: the data's exact counts, what laboratories
print, and totals of stored weights.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_lab.accounting import count, find_model, models
from moe_lab.accounting.model_names import facts
from moe_lab.accounting.parameter_count import Convention
from moe_lab.accounting.published import figure, rounds_to

# Configurations in the data that its own counts leave something out of, and what
OMITTED = {
    "microsoft/Phi-3.5-MoE": (
        "attention_bias",
        "lm_head_bias",
    ),  # 359,744 biases that the configuration has
    "MiniMaxAI/MiniMax-M3": ("moe_layer_freq",),  # three dense layers
}
BY_REAL_EXPERTS = {"K_e=0": "least", "K_e=8": "mean", "K_e=12": "most"}

# transformers 5.23, parameters of the causal model on the meta device
ALSO_EXACT = {
    "deepseek-ai/DeepSeek-V3.2": 671_877_929_216,
    "MiniMaxAI/MiniMax-Text-01": 456_089_655_296,
    "baidu/ERNIE-4.5-300B-A47B": 299_484_163_264,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": 480_154_875_392,
    "meta-llama/Llama-4-Maverick-17B-128E": 400_711_848_960,
    "Qwen/Qwen3.5-397B-A17B": 396_346_350_336,
}
# Stored weights of releases whose files hold the MTP module: total, and how often they repeat
# embedding and head in it
WITH_MTP = {
    "deepseek-ai/DeepSeek-V3": ({}, "684.5B", 2),
    "zai-org/GLM-5.1": ({}, "754B", 0),
    "zai-org/GLM-4.5": ({"num_nextn_predict_layers": 1}, "356.8B", 0),
    "Qwen/Qwen3-Next-80B-A3B": ({"num_nextn_predict_layers": 1}, "81.3B", 0),
    "baidu/ERNIE-4.5-300B-A47B": ({}, "300.5B", 0),
}
NOT_ROUNDED = {
    "moonshotai/Kimi-K2-Instruct": 0.01,
    "meituan-longcat/LongCat-2.0": 0.02,
    "tencent/Hunyuan-Large": 0.015,
    "deepseek-ai/DeepSeek-V2-Lite": 0.025,
    "Qwen/Qwen3-30B-A3B": 0.02,
    "inclusionAI/Ling-flash-2.0": 0.01,
    "Zyphra/ZAYA1-8B": 0.01,
    "LiquidAI/LFM2-8B-A1B": 0.04,
    "LiquidAI/LFM2.5-8B-A1B": 0.055,
    "JetBrains/Mellum2-12B-A2.5B": 0.025,
    "meta-models/Muse-Spark-Open-816B-A42B": 0.02,
    "zai-org/GLM-5.3-Flash": 0.035,
    "mistralai/Mistral-Small-4-119B": 0.025,
}


def entries(data_dir: Path) -> list[dict[str, Any]]:
    return json.loads((data_dir / "model_configs.json").read_text())["models"]


def config_of(name: str) -> dict[str, Any]:
    entry = find_model(name)
    assert entry is not None
    return entry["config"]


def as_counted(entry: dict[str, Any]) -> dict[str, Any]:
    left_out = OMITTED.get(entry["name"], ())
    return {key: value for key, value in entry["config"].items() if key not in left_out}


@pytest.mark.data
def test_every_exact_count_of_the_data_is_reproduced_to_the_parameter(data_dir: Path) -> None:
    with_counts = [entry for entry in entries(data_dir) if "counts" in entry]
    assert len(with_counts) == 46
    wrong = {
        entry["name"]: difference
        for entry in with_counts
        if (difference := count(as_counted(entry)).total - entry["counts"]["total"])
    }
    assert wrong == {}


@pytest.mark.data
def test_parts_and_active_parameters_of_the_data_are_reproduced_to_the_parameter(
    data_dir: Path,
) -> None:
    for entry in entries(data_dir):
        exact, counted = entry.get("counts", {}), count(as_counted(entry))
        names = {
            "routed_experts": "routed",
            "shared_experts": "shared",
            "ngram_tables": "ngram_table",
            "lm_head": "head",
        }
        for theirs, ours in {
            **names,
            "embed_tokens": "embedding",
            "ngram_projections": "ngram_projection",
        }.items():
            assert counted.by_part[ours] == exact.get(theirs, counted.by_part[ours]), (
                entry["name"],
                theirs,
            )
        keys: dict[Convention, str] = {
            "A": "active_incl_all_embeddings",
            "B": "active_excl_input_embedding",
            "C": "active_excl_embed_and_head",
        }
        for convention, key in keys.items():
            assert counted.active(convention) == exact.get(key, counted.active(convention)), (
                entry["name"],
                convention,
            )  # type: ignore[arg-type]
        for real, value in exact.get("active_excl_input_embedding_by_Ke", {}).items():
            assert counted.active("B", BY_REAL_EXPERTS[real]) == value, (entry["name"], real)  # type: ignore[arg-type]


@pytest.mark.data
def test_what_the_data_counts_leave_out_is_in_our_count(data_dir: Path) -> None:
    by_name = {entry["name"]: entry for entry in entries(data_dir)}
    phi = by_name["microsoft/Phi-3.5-MoE"]
    biases = 32 * (4096 + 2 * 1024 + 4096) + 32064  # q, k, v and o in 32 layers, and the head
    assert count(phi["config"]).total == phi["counts"]["total"] + biases
    m3 = count(by_name["MiniMaxAI/MiniMax-M3"]["config"])
    assert len(m3.moe_layers) == 57
    assert rounds_to(m3.active("C"), "23B")


@pytest.mark.data
def test_the_facts_of_the_package_agree_with_the_data(data_dir: Path) -> None:
    for entry in entries(data_dir):
        assert count(config_of(entry["name"])).total == count(entry["config"]).total, entry["name"]


def test_longcat_flash_counts_no_phantom_row() -> None:
    longcat = count(config_of("LongCat-Flash-Chat"))
    assert longcat.total == 560_664_958_976
    assert longcat.total + longcat.phantom == 741_053_585_408
    assert (longcat.active_min, longcat.active_mean, longcat.active_max) == (
        18_693_773_312,
        27_149_490_176,
        31_377_348_608,
    )


def test_longcat_2_matches_its_announcement() -> None:
    longcat = count(config_of("LongCat-2.0"))
    assert longcat.total == 1_638_616_773_376
    assert longcat.by_part["ngram_table"] == 134_978_871_296
    assert [
        round(value / 1e9, 1)
        for value in (longcat.active_min, longcat.active_mean, longcat.active_max)
    ] == [33.4, 48.7, 56.4]


def test_the_mean_of_real_experts_is_uniform_load_unless_it_is_published() -> None:
    config = {
        key: value
        for key, value in config_of("LongCat-2.0").items()
        if key != "expected_ffn_experts_K_e"
    }
    routed = next(iter(count(config).moe_layers.values()))
    assert routed.used is not None
    assert routed.used.mean == pytest.approx(12 * 768 / 896)
    assert any("10.2857 real experts" in sentence for sentence in count(config).assumed)


def test_deepseek_v4_pro_and_kimi_k3_match_their_reports() -> None:
    pro, k3 = count(config_of("DeepSeek-V4-Pro")), count(config_of("Kimi-K3"))
    assert (round(pro.total / 1e9, 1), round(pro.active("B") / 1e9, 2)) == (1573.0, 48.85)
    assert rounds_to(k3.total, "2.78T")
    assert rounds_to(k3.active("B"), "104.2B")


@pytest.mark.parametrize("name", ALSO_EXACT)
def test_further_published_models_are_exact(name: str) -> None:
    assert count(config_of(name)).total == ALSO_EXACT[name]


def test_kimi_linear_without_a_layer_list_follows_the_usual_pattern() -> None:
    config = {**config_of("Kimi-Linear-48B-A3B-Instruct"), "linear_attn_config": None}
    counted = count(
        {**config, "linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4}
    )
    assert counted.total == 49_133_074_464
    assert any(sentence.startswith("layer_types") for sentence in counted.assumed)


def test_glm_5_2_shares_one_indexer_among_four_layers() -> None:
    shared = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    assert count({**config_of("GLM-5"), **shared}).total == 743_377_000_704


@pytest.mark.parametrize("name", WITH_MTP)
def test_mtp_modules_explain_the_size_of_the_stored_weights(name: str) -> None:
    extra, stored, repeated = WITH_MTP[name]
    counted = count({**config_of(name), **extra})
    assert rounds_to(counted.total + counted.mtp + repeated * counted.by_part["embedding"], stored)


def test_published_totals_are_matched() -> None:
    far = {
        "moonshotai/Kimi-K2-Instruct",
        "moonshotai/Kimi-K2.5",
        "Zyphra/ZAYA1-8B",
        "moonshotai/Kimi-K2.6",
        "moonshotai/Kimi-K2.7-Code",
        "baidu/ERNIE-4.5-21B-A3B",
        "google/gemma-4-26B-A4B",  # published with its vision tower
    }
    limits = {"sarvamai/sarvam-30b": 0.075}  # named after its size without embeddings
    without_tables = {"deepseek-ai/DeepSeek-V4.1-Flash"}
    for row in models().iter_rows(named=True):
        limit = limits.get(row["name"], 0.06 if row["name"] in far else 0.025)
        total = row["total"] - (row["tables"] if row["name"] in without_tables else 0)
        assert total == pytest.approx(row["published_total"], rel=limit), row["name"]


def test_thirty_models_that_came_later_have_a_source_and_most_fit_to_the_digit() -> None:
    frame = models()
    assert len(frame) == 86
    later = [entry["name"] for entry in facts()[56:]]
    rows = [row for row in frame.iter_rows(named=True) if row["name"] in later]
    fitting = [row["name"] for row in rows if row["convention"] in row["fits"]]
    assert len(fitting) == 23
    silent = [row["name"] for row in rows if row["published_active"] is None]
    assert silent == ["allenai/FlexOlmo-7x7B-1T"]


def test_published_active_parameters_are_matched_in_the_named_convention() -> None:
    for row in models().drop_nulls("published_active").iter_rows(named=True):
        if row["name"] in NOT_ROUNDED:
            assert row["active"] == pytest.approx(
                row["published_active"], rel=NOT_ROUNDED[row["name"]]
            ), row["name"]
            assert row["convention"] not in row["fits"]
        else:
            assert row["convention"] in row["fits"], row["name"]


def test_published_ranges_are_the_least_and_most_experts() -> None:
    ranged = models().drop_nulls("published_min")
    assert set(ranged["family"]) == {"LongCat"}
    for row in ranged.iter_rows(named=True):
        assert row["active_min"] == pytest.approx(row["published_min"], rel=0.015), row["name"]
        assert row["active_max"] == pytest.approx(row["published_max"], rel=0.01), row["name"]


def test_94_and_97_percent_are_one_minus_active_over_total() -> None:
    rows = {row["name"]: row for row in models().iter_rows(named=True)}
    flash = rows["meituan-longcat/LongCat-Flash-Chat"]
    ends = [1 - flash[column] / flash["total"] for column in ("active_max", "active_min")]
    assert [f"{end:.0%}" for end in ends] == ["94%", "97%"]
    assert f"{rows['meituan-longcat/LongCat-2.0']['sparsity']:.0%}" == "97%"
    assert f"{rows['deepseek-ai/DeepSeek-V4-Pro']['sparsity']:.0%}" == "97%"
    v3 = rows["deepseek-ai/DeepSeek-V3"]
    assert f"{1 - v3['active_a'] / v3['total']:.0%}" == "94%"
    assert f"{v3['expert_sparsity']:.0%}" == "97%"  # the same model, by experts


def test_rounding_knows_the_digits_that_were_published() -> None:
    assert rounds_to(36.63e9, "37B")
    assert not rounds_to(37.55e9, "37B")
    assert rounds_to(12.88e9, "12.9B")
    assert not rounds_to(12.75e9, "12.9B")
    assert figure("1.04T") == 1.04e12


def test_every_fact_has_its_sources() -> None:
    for entry in facts():
        assert all(entry[key] for key in ("date_source", "config_source", "status")), entry["name"]
        assert entry["published"]["source"]
        assert entry["published"]["convention"] in "ABC"
