"""Configurations of the kinds that people have, and hostile ones: the right count, a note where the
configuration says two things, or one line.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from moe_lab.accounting import count, flops
from moe_lab.accounting.model_names import facts
from moe_lab.cli import main
from moe_lab.errors import ConfigError
from moe_lab.hf.configuration import router_sizes
from moe_lab.routing import RouterConfig


@pytest.fixture
def cases(data_dir: Path) -> Path:
    return data_dir / "cases"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("switch_sparse_step", 74_784),  # encoder_sparse_step and decoder_sparse_step decide
        ("deepseek_ocr", 2_934_734_080),  # use_mla: false
        ("ernie_vl_lists", 28_624_635_776),  # lists are [text, vision]
        ("longcat_saved_by_transformers", 696_576),  # num_layers, not num_hidden_layers
        ("deepseek_ref_model_type", 284_332_230_231),  # by architectures
        ("minimax_as_mixtral", 228_689_304_576),  # by model_type, with a note
        ("config_671B_native", 671_026_404_352),  # DeepSeek's own field names
        ("config_bom", 5_288),
    ],
)
def test_the_count_is_right(cases: Path, name: str, total: int) -> None:
    assert count(cases / f"{name}.json").total == total


SMALL = {
    "model_type": "mixtral",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
LAYER = (
    (8 * 8 + 2 * 8 * 4 + 8 * 8) + 2 * 8 + 3 * 8 + 3 * 3 * 8 * 4
)  # attention, norms, router, MLPs
TOTAL = 2 * 10 * 8 + 8 + 2 * LAYER


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, TOTAL),
        ({"hidden_size": 8.0}, TOTAL),
        ({"num_key_value_heads": None}, TOTAL + 2 * 2 * 8 * 4),
        ({"tie_word_embeddings": True}, TOTAL - 80),
    ],
)
def test_a_small_configuration_has_the_count_by_hand(tmp_path, changes, total) -> None:
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + json.dumps(SMALL | changes))
    assert count(path).total == total
    path.write_text(json.dumps({"model_type": "mixtral", "text_config": SMALL | changes}))
    assert count(path).total == total


@pytest.mark.data
def test_active_parameters_of_text_tokens(cases: Path) -> None:
    assert count(cases / "deepseek_ocr.json").active_mean == 574_127_360
    assert count(cases / "ernie_vl_lists.json").active_mean == pytest.approx(3.357e9, rel=1e-3)


@pytest.mark.data
def test_a_configuration_that_says_two_things_has_a_note(cases: Path) -> None:
    by_type, by_class = (
        " ".join(count(cases / f"{name}.json").assumed)
        for name in ("minimax_as_mixtral", "deepseek_ref_model_type")
    )
    assert "minimax_m2" in by_type
    assert "MiniMaxM2ForCausalLM" in by_type
    assert "deepseek_ref" in by_class
    assert "DeepseekV4ForCausalLM" in by_class


def test_a_published_model_has_no_such_note() -> None:
    assert not [e["name"] for e in facts() if "architectures" in str(count(e["config"]).assumed)]


@pytest.mark.data
def test_longcat_without_num_layers_has_a_note(cases: Path) -> None:
    values = json.loads((cases / "longcat_saved_by_transformers.json").read_text())
    assert "num_layers" not in str(count(values).assumed)
    del values["num_layers"]
    counted = count(values)
    assert len(counted.moe_layers) == 4
    assert "twice as many" in str(counted.assumed)


@pytest.mark.data
def test_other_readers_take_the_same_fields(cases: Path) -> None:
    native = RouterConfig.from_hf(cases / "config_671B_native.json")
    assert (native.num_experts, native.top_k, native.num_groups, native.topk_groups) == (
        256,
        8,
        8,
        4,
    )
    assert native.routed_scaling_factor == 2.5
    vision = router_sizes(cases / "ernie_vl_lists.json")
    assert (vision.num_experts, vision.top_k, vision.moe_layers) == (64, 6, tuple(range(1, 28)))


@pytest.mark.data
@pytest.mark.parametrize("name", ["10pow400", "1e308", "architectures_int", "bigint5000"])
def test_hostile_configurations_are_one_line(data_dir: Path, name: str, capsys: Any) -> None:
    assert main(["count", str(data_dir / "hostile" / f"{name}.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"model_type": ["mixtral"]}', "model_type"),
        ('{"model_type": "mixtral", "num_hidden_layers": {}}', "num_hidden_layers"),
        ('{"model_type": "mixtral", "num_hidden_layers": Infinity}', "num_hidden_layers"),
        ('{"model_type": "mixtral", "layer_types": {"len": "x", "rle": []}}', "run-length"),
        ("[1]", "dictionary"),
        ("", "JSON"),
        (
            '{"dim": 1, "n_activated_experts": 1, "kv_lora_rank": 1, "o_groups": 2}',
            "num_hidden_layers",
        ),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        count(tmp_path)


OTHER_TYPES = [
    None, True, -1, 0, 1.5, 1e308, float("nan"), 10**30, "", "x", [], [1], [None], {}, {"a": 1}
]  # fmt: skip


def test_a_field_of_another_type_is_read_or_refused() -> None:
    draw = random.Random(0)
    refused = 0
    for entry in facts():
        for field in entry["config"]:
            for value in draw.sample(OTHER_TYPES, 4):
                changed = {**entry["config"], field: value}
                for read in (lambda v: count(v).to_dict(), router_sizes, RouterConfig.from_hf):
                    try:
                        read(changed)
                    except ConfigError:
                        refused += 1
    assert refused > 1000


def test_decoding_a_batch_says_that_it_assumes_equal_load() -> None:
    config = next(entry["config"] for entry in facts() if entry["name"] == "Qwen/Qwen3-30B-A3B")
    assert "equally" in str(flops(config, 4096, "decode", batch=64).assumed)
    assert "equally" not in str(flops(config, 4096, "decode", batch=1).assumed)
    measured = flops(config, 4096, "decode", batch=64, load=[1] * 128)
    assert "equally" not in str(measured.assumed)
