"""Counts against ``num_parameters()`` of tiny random transformers models, for every MoE directory
of the library.
"""

import dataclasses
import importlib
import random
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from hf_tiny_families import DENSE, FAMILIES, RAW, SINCE_5_24, WRAPPERS  # noqa: E402
from hf_tiny_models import draw, fields_of, parameters, raw, wrapper_of  # noqa: E402

from moe_lab.accounting import cache_size, count  # noqa: E402
from moe_lab.accounting.families import ARCHITECTURES  # noqa: E402
from moe_lab.hf.architectures import SAME_AS  # noqa: E402

pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]


@pytest.mark.parametrize("name", FAMILIES | DENSE)
def test_count_equals_num_parameters_less_phantom_rows(name: str) -> None:
    for seed in range(4):
        config, model = draw(name, seed)
        counted = count(config)
        assert counted.total + counted.phantom == parameters(name, config, model), (seed, config)


@pytest.mark.parametrize("name", FAMILIES | DENSE)
def test_a_saved_configuration_counts_the_same(name: str, tmp_path: Path) -> None:
    config, _ = draw(name, 1)
    config.save_pretrained(tmp_path)
    assert (
        count(tmp_path).total
        == count(config).total
        == count(tmp_path / "config.json").total
        == count(config.to_dict()).total
    )


@pytest.mark.parametrize("name", RAW)
def test_layer_patterns_are_read_as_releases_write_them(name: str) -> None:
    values, config, model = raw(name)
    counted = count(values)
    assert counted.total == parameters(name, config, model)
    assert counted.total == count(config).total


def test_longcat_has_phantom_rows_and_no_other_family_does() -> None:
    config, _ = draw("longcat_flash", 2)
    expected = (
        config.num_layers
        * config.zero_expert_num
        * 2
        * config.expert_ffn_hidden_size
        * config.hidden_size
    )
    assert count(config).phantom == expected
    assert all(count(draw(name, 0)[0]).phantom == 0 for name in ("zaya", "deepseek_v3", "mixtral"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_multimodal_model_is_counted_by_its_text_part(name: str, tied: bool) -> None:
    config, model = wrapper_of(name, tied)
    language = sum(
        size.numel()
        for key, size in model.named_parameters()
        if "language_model" in key or "lm_head" in key
    )
    assert count(config).total == language
    assert count(config.to_dict()).total == language


def test_a_speech_model_is_counted_by_its_nemotron_h_text_part() -> None:
    import torch

    package = "transformers.models.nemotron3_5_transcribe"
    config = importlib.import_module(
        f"{package}.configuration_nemotron3_5_transcribe"
    ).Nemotron3_5TranscribeConfig()
    with torch.device("meta"):
        classes = importlib.import_module(f"{package}.modeling_nemotron3_5_transcribe")
        model = classes.Nemotron3_5TranscribeForConditionalGeneration(config)
    language = sum(
        size.numel()
        for key, size in model.named_parameters()
        if "language_model" in key or "lm_head" in key
    )
    assert count(config).total == language == 31_577_937_344


def test_nested_wrappers_are_unwrapped_to_the_language_model() -> None:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeConfig

    text = draw("qwen3_omni_moe", 0)[0].to_dict()
    config = Qwen3OmniMoeConfig(thinker_config={"text_config": text})
    assert count(config).total == count(config.thinker_config).total == count(text).total
    assert count({"model_type": "internvl_chat", "llm_config": text}).total == count(text).total


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "mellum", "bailing_hybrid"])
def test_mtp_modules_are_those_that_transformers_builds(name: str) -> None:
    import torch
    from transformers.modeling_layers import MtpModel

    config, model = draw(name, 3)
    config.num_mtp_layers = 2
    if name in ("mellum", "bailing_hybrid"):
        config.mtp_layer_types, config.mtp_mlp_layer_types = ["full_attention"] * 2, ["sparse"] * 2
    with torch.device("meta"):
        modules = MtpModel(model, 2).layers
    counted = count(config)
    assert counted.mtp == sum(parameter.numel() for parameter in modules.parameters())
    assert counted.total == parameters(name, config, model)


def test_switches_change_the_count_by_what_they_add() -> None:
    """Biases, tied embeddings and shared experts, one at a time, on a family that has them all."""
    base = FAMILIES["deepseek_v2"]
    module = importlib.import_module("transformers.models.deepseek_v2.configuration_deepseek_v2")
    fields = fields_of(
        module.DeepseekV2Config, dataclasses.replace(base, choices={}), random.Random(0)
    )
    plain: dict[str, Any] = {
        **fields,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "n_shared_experts": 0,
    }
    before = count(module.DeepseekV2Config(**plain))
    d, layers, sparse = plain["hidden_size"], plain["num_hidden_layers"], len(before.moe_layers)
    assert (
        before.total
        - count(module.DeepseekV2Config(**{**plain, "tie_word_embeddings": True})).total
        == plain["vocab_size"] * d
    )
    biased = (
        count(module.DeepseekV2Config(**{**plain, "attention_bias": True})).total - before.total
    )
    assert biased == layers * (
        plain["q_lora_rank"] + plain["kv_lora_rank"] + plain["qk_rope_head_dim"] + d
    )
    shared = count(module.DeepseekV2Config(**{**plain, "n_shared_experts": 2}))
    assert (
        shared.total - before.total
        == shared.by_part["shared"]
        == sparse * 3 * d * 2 * plain["moe_intermediate_size"]
    )


def test_every_architecture_is_met_by_a_test_model_or_is_not_of_transformers() -> None:
    met = {count(draw(name, 0)[0]).model_type for name in FAMILIES | DENSE}
    elsewhere = {
        "longcat_flash_ngram",
        "longcat2",
        "bailing_moe",
        "bailing_moe_linear",
        "deepseek_v41_text",
        "grok1",
        "hunyuan",
        "klear",
        "nomic_bert",
    }
    newer = {*SINCE_5_24} - {*FAMILIES}  # without transformers 5.24
    elsewhere |= {SAME_AS.get(name, name) for name in newer} - {"hy_v4"}
    assert set(ARCHITECTURES) - {SAME_AS.get(name, name) for name in met} == elsewhere


@pytest.mark.parametrize(
    ("name", "seed"),
    [("llama", 0), ("qwen3_next", 1), ("jamba", 0), ("lfm2_moe", 0)],
)
def test_a_cache_is_as_large_as_that_of_transformers(name: str, seed: int) -> None:
    """transformers keeps all inputs of a convolution, of which the next token needs one less."""
    import torch

    config, model = draw(name, seed)
    counted, length = count(config), 20
    with torch.no_grad():
        output = type(model)(config).eval()(torch.ones(1, length, dtype=torch.long), use_cache=True)
    kept = sum(
        tensor.numel()
        for layer in output.past_key_values.layers
        for tensor in tensors(list(vars(layer).values()))
        if tensor.dim() > 1
    )
    convolutions = [piece for _, piece in counted.pieces() if piece.state and not piece.kernel]
    more = sum(piece.macs - piece.state for piece in convolutions)
    assert kept == cache_size(counted, length).at_context + more
    assert bool(more) == (name != "llama")


def tensors(value: Any) -> list[Any]:
    """All tensors in nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return [value] if hasattr(value, "numel") else []
