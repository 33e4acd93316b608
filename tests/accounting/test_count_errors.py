"""What a configuration may not say, and what is said about what it does not say: one line that
names the field.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from moe_lab.accounting import ParameterCount, count, find_model, flops
from moe_lab.accounting.model_names import facts
from moe_lab.errors import ConfigError
from moe_lab.hf.architectures import NOT_COUNTED
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "head_dim": 8,
}
REQUIRED = [
    name
    for name in MIXTRAL
    if name not in ("model_type", "tie_word_embeddings", "head_dim", "num_key_value_heads")
]


def config_of(name: str) -> dict[str, Any]:
    entry = find_model(name)
    assert entry is not None
    return entry["config"]


def message(config: Any, edits: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        count(config, edits)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


def test_a_complete_configuration_assumes_nothing() -> None:
    assert count(MIXTRAL).assumed == ()


@pytest.mark.parametrize("name", ["vitpose_backbone"])
def test_a_known_architecture_that_is_not_counted_is_refused_with_the_reason(name: str) -> None:
    text = message({**MIXTRAL, "model_type": name})
    assert name in text
    assert NOT_COUNTED[name.removesuffix("_text")] in text


def test_a_sarvam_release_names_the_bias_of_attention_otherwise() -> None:
    """The field names of sarvamai/sarvam-30b; transformers 5.24 maps them the same way."""
    release = {
        **without(MIXTRAL, "num_local_experts"),
        "model_type": "sarvam_moe",
        "num_experts": 4,
        "num_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    }
    biased = count({**release, "use_qkv_bias": True}).total - count(release).total
    assert biased == 3 * (4 + 2 + 2) * 8


def test_inkling_2_counts_the_rows_of_the_head_that_belong_to_tokens() -> None:
    config = {
        "model_type": "inkling2_text",
        "vocab_size": 100,
        "hidden_size": 32,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window_size": 4,
        "d_rel": 2,
        "rel_extent": 8,
        "conv_kernel_size": 4,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config |= heads | {f"swa_{name}": size for name, size in heads.items()}
    counted = count({**config, "unpadded_vocab_size": 93})
    assert (counted.by_part["head"], counted.phantom) == (93 * 32, 7 * 32)
    silent = count(config)
    assert (silent.by_part["head"], silent.phantom) == (100 * 32, 0)
    assert any("unpadded_vocab_size" in sentence for sentence in silent.assumed)
    assert "unpadded_vocab_size of at most 100" in message({**config, "unpadded_vocab_size": 101})


def test_an_unknown_architecture_is_named_with_near_ones() -> None:
    text = message({**MIXTRAL, "model_type": "mixtrel"})
    assert text.startswith(
        "expected a model_type with a known architecture, got 'mixtrel'; try one of mixtral"
    )
    assert "model_type" in message(without(MIXTRAL, "model_type"))


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name: str) -> None:
    wanted = {"num_local_experts": "num_experts"}.get(name, name)
    assert message(without(MIXTRAL, name)).startswith(
        f"expected a field {wanted} in the mixtral configuration, got none"
    )
    assert wanted in message({**MIXTRAL, name: None})


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [0, -4, 2.5, True, "many", [], {}])
def test_a_size_that_is_no_size_is_named(name: str, value: object) -> None:
    wanted = {"num_local_experts": "num_experts"}.get(name, name)
    assert wanted in message({**MIXTRAL, name: value})


def test_missing_sizes_of_latent_attention_are_named() -> None:
    for name in (
        "q_lora_rank",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "first_k_dense_replace",
        "n_shared_experts",
        "moe_intermediate_size",
    ):
        assert name in message(without(config_of("DeepSeek-V3"), name))


@pytest.mark.parametrize(
    ("edits", "text"),
    [
        (
            {"num_experts_per_tok": 5},
            "expected num_experts_per_tok of at most num_experts = 4, got num_experts_per_tok = 5",
        ),
        (
            {"num_key_value_heads": 3},
            "expected num_attention_heads divisible by num_key_value_heads = 3, got "
            "num_attention_heads = 4",
        ),
    ],
)
def test_contradictions_name_their_fields(edits: dict[str, Any], text: str) -> None:
    assert message({**MIXTRAL, **edits}) == text


def test_heads_that_do_not_divide_the_width_need_a_head_dim() -> None:
    odd = {**without(MIXTRAL, "head_dim"), "hidden_size": 34}
    assert message(odd).startswith(
        "expected hidden_size divisible by num_attention_heads = 4 where head_dim is absent, got "
        "hidden_size = 34"
    )
    assert count({**odd, "head_dim": 8}).total > 0


def test_two_names_with_two_values_contradict_each_other() -> None:
    text = message({**MIXTRAL, "num_experts": 8})
    assert text.startswith(
        "expected one value of num_experts in the mixtral configuration, got num_experts=8, "
        "num_local_experts=4"
    )
    assert count({**MIXTRAL, "num_experts": 4}).total == count(MIXTRAL).total


def test_zero_experts_widen_what_top_k_may_be() -> None:
    longcat = config_of("LongCat-Flash-Chat")
    assert (
        count({**longcat, "moe_topk": 700, "expected_ffn_experts_K_e": 500}).active_min
        == count(longcat).active_min + 444 * 1_056_964_608
    )
    assert "num_experts + zero_expert_num = 768" in message({**longcat, "moe_topk": 769})
    assert "expected_ffn_experts_K_e between 0 and 12" in message(
        {**longcat, "expected_ffn_experts_K_e": 13}
    )


def test_lists_must_have_one_entry_for_each_layer() -> None:
    gpt = config_of("gpt-oss-20b")
    assert "layer_types with num_hidden_layers = 25 entries" in message(
        {**gpt, "num_hidden_layers": 25}
    )
    assert "layer_types" in message({**gpt, "layer_types": "full_attention"})
    hybrid = config_of("Qwen3.5-35B-A3B")
    assert "'conv'" in message({**hybrid, "layer_types": ["conv"] * 40})


def test_a_flag_is_true_or_false() -> None:
    assert "expected attention_bias as true or false" in message(
        {**config_of("Qwen3-30B-A3B"), "attention_bias": "qkv only"}
    )


def test_per_layer_overrides_are_read_or_refused() -> None:
    wider = count({**MIXTRAL, "per_layer_config": {"1": {"intermediate_size": 96}}})
    assert wider.total - count(MIXTRAL).total == 4 * 3 * 32 * 48
    assert "per_layer_config" in message({**MIXTRAL, "per_layer_config": [1, 2]})
    assert "skip" in message({**MIXTRAL, "per_layer_config": {0: {"skip": ["mlp"]}}})


def test_defaults_are_listed_and_never_silent() -> None:
    counted = count(without(MIXTRAL, "head_dim", "num_key_value_heads", "tie_word_embeddings"))
    assert sorted(sentence.partition(" ")[0] for sentence in counted.assumed) == [
        "head_dim",
        "num_key_value_heads",
        "tie_word_embeddings",
    ]
    assert any(
        "head_dim = 8" in sentence and "not in the configuration" in sentence
        for sentence in counted.assumed
    )


@pytest.mark.parametrize(
    "aliases",
    [
        {"num_local_experts": "num_experts", "num_experts_per_tok": "moe_topk"},
        {"num_local_experts": "n_routed_experts", "num_experts_per_tok": "moe_k"},
        {
            "num_local_experts": "moe_num_experts",
            "num_experts_per_tok": "num_experts_per_token",
            "hidden_size": "d_model",
        },
        {
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "num_key_value_heads": "kv_n_heads",
        },
    ],
)
def test_aliases_of_hugging_face_are_accepted(aliases: dict[str, str]) -> None:
    renamed = {aliases.get(key, key): value for key, value in MIXTRAL.items()}
    assert count(renamed).to_dict() == count(MIXTRAL).to_dict()


def test_a_configuration_comes_from_a_dict_a_path_a_folder_or_an_object(tmp_path: Path) -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return MIXTRAL

    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    counts: list[ParameterCount] = [
        count(source) for source in (MIXTRAL, tmp_path, str(tmp_path / "config.json"), Config())
    ]
    assert len({one.total for one in counts}) == 1


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "expected a readable config.json" in message(tmp_path / "nowhere.json")
    assert "expected a readable config.json" in message(tmp_path)
    assert "bytes.json" in message(tmp_path / "bytes.json")
    assert "an error in line 1" in message(tmp_path / "broken.json")
    assert "got list" in message(tmp_path / "list.json")
    assert "got int" in message(7)


def test_the_class_name_stands_in_for_a_missing_model_type() -> None:
    named = {**without(MIXTRAL, "model_type"), "architectures": ["MixtralForCausalLM"]}
    assert count(named).to_dict() == count(MIXTRAL).to_dict()


def test_the_wrapper_decides_whether_embeddings_are_tied() -> None:
    inner = {**MIXTRAL, "tie_word_embeddings": True}
    assert (
        count(
            {"model_type": "some_vision_model", "text_config": inner, "tie_word_embeddings": False}
        ).total
        == count(MIXTRAL).total
    )
    assert (
        count({"model_type": "some_vision_model", "text_config": inner}).total
        == count(MIXTRAL).total - 100 * 32
    )


JUNK: tuple[Any, ...] = (
    *(None, "x", -1, 0, 1.5, True, 10**9, float("nan"), "8 (x)", "auto"),
    *(
        [],
        {},
        [1, 2],
        [None] * 3,
        [[1]],
        {"a": 1},
        {"len": 3, "rle": [[1, 3]]},
        {"len": 3, "rle": 5},
        {"len": 10**12, "rle": [[1, 10**12]]},
    ),
)


def test_damaged_configurations_end_in_one_line_whatever_is_damaged() -> None:
    rng = random.Random(0)
    own = DecoderConfig(
        d_model=32, num_heads=4, moe=MoEConfig(32, 16, RouterConfig(num_experts=4, top_k=2))
    ).to_dict()
    configs = [*(entry["config"] for entry in facts()), *[own] * 5]
    refused: list[str] = []
    for _ in range(3000):
        config = json.loads(json.dumps(rng.choice(configs)))
        inside = config
        key = rng.choice(list(inside))
        while isinstance(inside[key], dict) and inside[key] and rng.random() < 0.7:
            inside = inside[key]
            key = rng.choice(list(inside))
        inside[key] = rng.choice(JUNK)
        try:
            flops(count(config), 100, "decode", batch=3)
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) > 1000
    assert not any("\n" in text or len(text) > 600 for text in refused)


def test_an_edit_replaces_a_field_under_every_alias() -> None:
    assert (
        count(MIXTRAL, {"num_experts": 8}).total == count({**MIXTRAL, "num_local_experts": 8}).total
    )
    assert (
        count({"text_config": MIXTRAL}, {"n_routed_experts": 8}).total
        == count(MIXTRAL, {"num_experts": 8}).total
    )


def test_an_edit_that_changes_nothing_is_refused() -> None:
    assert message(MIXTRAL, {"rope_theta": 1e6}).startswith(
        "expected a field that the count of mixtral reads, got rope_theta"
    )
    assert "num_experts" in message(MIXTRAL, {"num_expert": 8})


@pytest.mark.parametrize(
    "nest",
    [
        lambda inner: {"model_type": "x", "llm_config": {"text_config": inner}},
        lambda inner: {"model_type": "x", "text_config": {"llm_config": inner}},
        lambda inner: {"thinker_config": {"text_config": inner, "audio_config": {}}},
        lambda inner: {**inner, "text_config": None},
        lambda inner: {**inner, "text_config": {}},
        lambda inner: {**inner, "quantization_config": {"quant_method": "fp8"}},
        lambda inner: {**inner, "quantization_config": "fp8"},
    ],
)
def test_parts_in_parts_and_fields_of_no_weight_change_nothing(nest) -> None:
    assert count(nest(MIXTRAL)).total == count(MIXTRAL).total


def test_parts_without_end_are_refused() -> None:
    nested = dict(MIXTRAL)
    for _ in range(5000):
        nested = {"text_config": nested}
    with pytest.raises(ConfigError, match="model_type"):
        count(nested)


@pytest.mark.parametrize("value", ["8", [8, 8], {"value": 8}, 8.5, True, -8, 10**30, float("nan")])
def test_numbers_of_another_kind_are_refused_by_name(value) -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        count({**MIXTRAL, "num_local_experts": value})
