"""Models of which a prompt runs fewer parameters than what is generated, and tables that are read
by row.
"""

import copy
from typing import Any

import pytest

from moe_lab.accounting import count, find_model, flops
from moe_lab.errors import ConfigError


def release(**changes: Any) -> dict[str, Any]:
    entry = find_model("DeepSeek-V4.1-Flash")
    assert entry is not None
    config = copy.deepcopy(entry["config"])
    config["text_config"] |= changes
    return config


def test_deepseek_v41_is_552b_with_197b_in_tables_16b_in_decode_and_8b_in_prefill() -> None:
    counted = count(release())
    tables = counted.by_part["ngram_table"]
    assert tables == (384_006_168 + 384_016_682) * 256
    assert round(tables / 1e9) == 197
    assert round((counted.total - tables) / 1e9) == 552
    assert round(counted.active("B") / 1e9) == 16
    assert round(counted.active("B", phase="prefill") / 1e9) == 8
    # the ports' shapes of one n-gram memory: wkv [25600, 6144], two weights [4, 5120]
    assert counted.by_part["ngram_projection"] == 2 * (25_600 * 6_144 + 2 * 4 * 5_120)


def test_a_prompt_runs_the_layers_before_the_last_source_of_keys() -> None:
    counted = count(release())
    skipped = {layer for layer, piece in counted.pieces() if piece.decode_only}
    assert skipped == {None, *range(20, 40)}
    names = [
        piece.name for layer, piece in counted.pieces() if layer == 20 and not piece.decode_only
    ]
    assert names[0] == "compressor.kv_proj"
    assert all(name.startswith(("compressor", "indexer.k")) for name in names)
    earlier = count(release(kv_source_layer_ids=[2, 8], index_source_layer_ids=[2, 8]))
    assert earlier.active(phase="prefill") < counted.active(phase="prefill")


def test_work_and_bytes_of_the_two_phases_differ() -> None:
    counted = count(release())
    train, prefill, decode = (
        flops(counted, 4096, phase) for phase in ("train", "prefill", "decode")
    )
    assert prefill.forward < 0.55 * train.forward
    assert "head" not in prefill.by_part
    assert decode.by_part["routed"] == 2 * prefill.by_part["routed"]
    assert train.weight_bytes is None
    assert prefill.weight_bytes is not None
    assert decode.weight_bytes is not None
    # 4,096 tokens read nearly every expert of the 20 layers, one token six in each of 40
    assert prefill.weight_bytes / 2 == pytest.approx(
        20 * 384 * 3 * 5120 * 2304 + counted.active("B", phase="prefill"), rel=0.02
    )
    assert decode.weight_bytes / 2 == pytest.approx(counted.active("B"), rel=0.001)


def test_other_models_have_one_activity() -> None:
    entry = find_model("DeepSeek-V3")
    assert entry is not None
    counted = count(entry["config"])
    assert not counted.has_phases
    assert counted.active(phase="prefill") == counted.active()
    assert "active_prefill" not in counted.to_dict()
    with pytest.raises(ConfigError, match="a phase among prefill, decode, got 'train'"):
        counted.active(phase="train")  # type: ignore[arg-type]


def test_json_has_both_activities_and_the_tables_apart() -> None:
    found = count(release()).to_dict()
    assert round(found["active_prefill"]["B"] / 1e9) == 8
    assert found["read_by_row"]["parameters"] + found["read_by_row"]["without"] == found["total"]


def test_wrong_lists_are_named() -> None:
    with pytest.raises(ConfigError, match="compress_ratios with num_hidden_layers = 40"):
        count(release(compress_ratios=[0, 2]))
    with pytest.raises(ConfigError, match="kv_source_layer_ids with a layer, got none"):
        count(release(kv_source_layer_ids=[]))
