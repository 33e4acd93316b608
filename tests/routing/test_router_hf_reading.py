"""``RouterConfig.from_hf`` and ``Router.load_hf``: what they accept, what they refuse by name."""

import importlib
import json
import random

import pytest
import torch
from hf_routers import CLASSES, NOT_REPRODUCED, PAIRS, hf_config, randomise_parameters, randomised
from refusals import refused
from torch import nn

from moe_lab.errors import CheckpointError, ConfigError
from moe_lab.routing import ControllerConfig, RouterConfig, build_router

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.hf


@pytest.mark.parametrize(
    ("folder", "block"),
    [("minimax_m2", "MiniMaxM2SparseMoeBlock"), ("deepseek_v3", "DeepseekV3MoE")],
)
def test_weights_are_found_in_a_router_and_in_the_block_around_it(folder, block):
    name = CLASSES[folder]
    config = hf_config(folder, name)
    for field, value in (
        ("hidden_size", 12),
        ("num_local_experts", 8),
        ("num_experts_per_tok", 2),
        ("moe_intermediate_size", 4),
    ):
        setattr(config, field, value)
    config.intermediate_size = 4
    if folder == "deepseek_v3":
        config.n_group = config.topk_group = 1
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    theirs = getattr(module, block)(config)
    randomise_parameters(theirs)
    router = build_router(RouterConfig.from_hf(config), 12).load_hf(theirs)
    gate = theirs.gate
    held = getattr(gate, "e_score_correction_bias", None)
    assert torch.equal(router.weight, gate.weight)
    assert router.controller is not None
    assert torch.equal(
        router.controller.bias, theirs.e_score_correction_bias if held is None else held
    )


@pytest.mark.parametrize(
    ("folder", "name"), [pair for pair in PAIRS if pair[1] not in NOT_REPRODUCED]
)
def test_the_dictionary_of_a_config_json_says_the_same_as_the_object(folder, name):
    config = hf_config(folder, name)
    randomised(config, folder, random.Random(name))
    values = config.to_dict()
    if folder == "dbrx":
        values = {"model_type": "dbrx", "ffn_config": values}
    assert RouterConfig.from_hf(
        json.loads(json.dumps(values, default=str))
    ) == RouterConfig.from_hf(config)


def test_a_multimodal_configuration_leads_to_its_text_model():
    config = transformers.AutoConfig.for_model("glm4v_moe")
    assert RouterConfig.from_hf(config) == RouterConfig.from_hf(config.text_config)


def test_an_unknown_model_type_is_refused_by_name():
    with pytest.raises(
        ConfigError,
        match=r"expected a model_type .* got 'bert'",
    ):
        RouterConfig.from_hf({"model_type": "bert"})


def test_a_missing_value_is_named():
    with refused("num_experts"):
        RouterConfig.from_hf({"model_type": "mixtral", "num_experts_per_tok": 2})


def test_lists_per_layer_need_a_layer():
    values = {"model_type": "hunyuan_v1_moe", "num_experts": [8, 16], "moe_topk": [1, 2]}
    assert RouterConfig.from_hf(values, layer=1).num_experts == 16
    with refused("num_experts"):
        RouterConfig.from_hf(values)


def test_weights_of_another_shape_are_refused():
    with refused("weight", CheckpointError):
        build_router(RouterConfig(num_experts=4, top_k=1), 6).load_hf(nn.Linear(6, 5, bias=False))


def test_a_correction_bias_without_a_place_is_refused_not_dropped():
    router = build_router(RouterConfig(num_experts=4, top_k=1), 6)
    with refused("controller.bias", CheckpointError):
        router.load_hf(nn.Linear(6, 4, bias=False), selection_bias=torch.ones(4))
    held = build_router(RouterConfig(num_experts=4, top_k=1, controller=ControllerConfig()), 6)
    held.load_hf(nn.Linear(6, 4, bias=False), selection_bias=torch.ones(4))
    assert held.controller is not None
    assert held.controller.bias.tolist() == [1.0] * 4
