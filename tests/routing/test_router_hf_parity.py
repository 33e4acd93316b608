"""Our routers against transformers' own modules: same selected experts and weights, over random
shapes, flags and biases.
"""

import importlib
import json
import random

import pytest
import torch
from hf_routers import (
    NOT_REPRODUCED,
    PAIRS,
    SINCE_5_24,
    ask_hf,
    build_hf,
    hf_config,
    randomise_parameters,
    randomised,
)

from moe_lab.routing import RouterConfig, RouterContext, build_router

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.hf


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *(pair for pair in PAIRS if pair[1] not in NOT_REPRODUCED and pair[1] != "ZayaRouter"),
        *SINCE_5_24,
    ],
)
def test_selected_experts_and_weights_are_those_of_the_transformers_module(folder, name):
    if (folder, name) in SINCE_5_24:
        pytest.importorskip(f"transformers.models.{folder}", reason="needs transformers 5.24")
    for seed in range(6):
        draw = random.Random(f"{name}{seed}")
        torch.manual_seed(seed)
        config = randomised(hf_config(folder, name), folder, draw)
        if name == "Qwen3OmniMoeTextTopKRouter":
            # Never instantiated by its model, and without the flag that the class in use reads: it
            # always renormalises.
            config.norm_topk_prob = True
        ours = RouterConfig.from_hf(config)
        theirs = build_hf(folder, name, config).eval()
        randomise_parameters(theirs)
        bias = torch.randn(ours.num_choices) * 0.5
        holds_bias = folder not in ("afmoe", "minimax_m2", "hy_v3", "lfm2_moe")
        x = torch.randn(2, 17, config.hidden_size)
        router = build_router(ours, config.hidden_size).eval()
        if folder == "ernie4_5_vl_moe":
            router.load_hf(theirs.get_submodule("text_moe"))
        else:
            router.load_hf(
                theirs, selection_bias=None if holds_bias or not ours.controller else bias
            )
        with torch.no_grad():
            answer = ask_hf(folder, theirs, x, bias, ours.num_choices)
            routing = router(
                x.reshape(-1, config.hidden_size), RouterContext(sequence_length=17)
            ).check()
        used = routing.indices >= 0
        weights = torch.zeros_like(answer.weights).scatter_add(
            1, routing.indices.clamp_min(0), routing.weights
        )
        selected = (
            torch.zeros_like(answer.weights).scatter_add(
                1, routing.indices.clamp_min(0), used.float()
            )
            > 0
        )
        assert torch.equal(selected, answer.selected), f"{name} seed {seed}: {ours}"
        torch.testing.assert_close(
            weights, answer.weights, rtol=1e-6, atol=1e-6, msg=lambda m, ours=ours: f"{ours}\n{m}"
        )
        if folder == "inkling":
            torch.testing.assert_close(routing.shared_weights, answer.shared, rtol=1e-6, atol=1e-6)
        if folder == "llama4":
            assert routing.weights_on_input


def test_every_class_is_reproduced_or_has_a_reason():
    assert len(PAIRS) == 73
    assert len(PAIRS) - len(NOT_REPRODUCED) >= 65
    assert set(NOT_REPRODUCED) <= {name for _, name in PAIRS}


@pytest.mark.data
def test_the_list_is_that_of_the_published_survey(data_dir):
    survey = json.loads(
        (data_dir / "traces" / "hf_transformers_5_23" / "router_classes.json").read_text()
    )
    assert {(row["model_type_dir"], row["router_class"]) for row in survey} == set(PAIRS)


@pytest.mark.parametrize("seed", range(6))
def test_zaya_continues_the_state_of_the_layer_below(seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    config = randomised(hf_config("zaya", "ZayaRouter"), "zaya", draw)
    module = importlib.import_module("transformers.models.zaya.modeling_zaya")
    theirs = [module.ZayaRouter(config, layer).eval() for layer in range(2)]
    ours = [build_router(RouterConfig.from_hf(config), config.hidden_size).eval() for _ in range(2)]
    for mine, hf in zip(ours, theirs, strict=True):
        randomise_parameters(hf)
        mine.load_hf(hf)
    x = torch.randn(2, 9, config.hidden_size)
    state, previous = None, None
    with torch.no_grad():
        for mine, hf in zip(ours, theirs, strict=True):
            _, weights, indices, state = hf(x, state)
            previous = mine(x.reshape(18, -1), RouterContext(previous=previous)).check()
            # The module aliases the skip expert to expert 0 with weight 0; ours keeps its own id.
            skipped = previous.indices == config.num_experts
            assert torch.equal(previous.indices.masked_fill(skipped, 0), indices)
            torch.testing.assert_close(previous.weights, weights, rtol=1e-6, atol=1e-6)
            assert (previous.weights[skipped] == 0).all()


def test_jetmoe_records_no_logits_and_is_reproduced_all_the_same():
    torch.manual_seed(0)
    module = importlib.import_module("transformers.models.jetmoe.modeling_jetmoe")
    config = transformers.AutoConfig.for_model(
        "jetmoe", num_local_experts=12, num_experts_per_tok=3
    )
    theirs = module.JetMoeTopKGating(20, 12, 3)
    randomise_parameters(theirs)
    x = torch.randn(31, 20)
    routing = build_router(RouterConfig.from_hf(config), 20).load_hf(theirs)(x)
    with torch.no_grad():
        _, tokens, gates, sizes, _ = theirs(x)
    experts = torch.repeat_interleave(torch.arange(12), torch.tensor(sizes))
    weights = torch.zeros(31, 12).index_put((tokens, experts), gates)
    torch.testing.assert_close(
        torch.zeros(31, 12).scatter(1, routing.indices, routing.weights),
        weights,
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("seed", range(3))
def test_deepseek_v4_hash_layers_look_up_and_weigh(seed):
    torch.manual_seed(seed)
    module = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = randomised(
        hf_config("deepseek_v4", "DeepseekV4TopKRouter"), "deepseek_v4", random.Random(seed)
    )
    config.vocab_size = 50
    theirs = module.DeepseekV4HashRouter(config).eval()
    randomise_parameters(theirs)
    theirs.tid2eid.copy_(
        torch.rand(50, config.n_routed_experts).argsort(dim=1)[:, : config.num_experts_per_tok]
    )
    ours = RouterConfig.from_hf(config, layer=0)
    assert ours.kind == "scored_hash"
    router = build_router(ours, config.hidden_size).load_hf(theirs)
    x, ids = torch.randn(21, config.hidden_size), torch.randint(50, (21,))
    with torch.no_grad():
        _, weights, indices = theirs(x, ids)
        routing = router(x, RouterContext(token_ids=ids)).check()
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(routing.weights, weights, rtol=1e-6, atol=1e-6)
    assert (
        RouterConfig.from_hf(config, layer=len(config.mlp_layer_types) - 1).kind == "token_choice"
    )
