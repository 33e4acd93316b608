"""The hash layer beside other layers: where its table says what the other router selects, both
weigh alike.
"""

from typing import Any

import pytest
import torch
from refusals import refused

from moe_lab.routing import ControllerConfig, RouterConfig, RouterContext, hash_twin
from moe_lab.routing.config import ScoreFunc, Weighting
from moe_lab.routing.hash_twin import with_hash_twin

ROUTED: dict[str, dict[str, Any]] = {
    "mixtral": {"kind": "softmax_topk", "norm_topk_prob": True},
    "olmoe": {"kind": "softmax_topk", "routed_scaling_factor": 1.7},
    "dbrx": {"kind": "pnorm_topk"},
    "dbrx, said": {"kind": "pnorm_topk", "norm_p": 1.0},
    "gpt_oss without bias": {"kind": "topk_softmax", "routed_scaling_factor": 0.5},
    "deepseek_v2": {"kind": "deepseek_v2", "routed_scaling_factor": 16.0},
    "deepseek_v3": {
        "kind": "deepseek_v3",
        "norm_topk_prob": True,
        "num_groups": 4,
        "topk_groups": 2,
        "controller": ControllerConfig(),
    },
    "deepseek_v4": {
        "kind": "sqrt_softplus_topk",
        "norm_topk_prob": True,
        "norm_eps": 1e-20,
        "routed_scaling_factor": 1.5,
    },
    "kimi_k3": {"kind": "quantile_balanced", "norm_topk_prob": True},
    "a wide eps": {"kind": "sigmoid_topk", "norm_topk_prob": True, "norm_eps": 0.5},
    "no normalisation": {"kind": "sigmoid_topk", "norm_eps": 0.5},
    "longcat without zeros": {"kind": "longcat", "routed_scaling_factor": 6.0},
    "token_choice": {"kind": "token_choice"},
    "token_choice, sigmoid": {
        "kind": "token_choice",
        "score_func": ScoreFunc.SIGMOID,
        "norm_topk_prob": True,
    },
    "token_choice, selected": {
        "kind": "token_choice",
        "weighting": Weighting.SELECTED_SOFTMAX,
        "norm_eps": 0.5,
    },
}


@pytest.mark.parametrize("name", ROUTED)
def test_a_twin_weighs_as_its_router_where_its_table_has_the_routers_selection(name: str) -> None:
    config = RouterConfig(num_experts=8, top_k=3, **ROUTED[name])
    router, twin = config.build(6).double(), hash_twin(config, 50).build(6).double()
    x, ids = torch.randn(50, 6, dtype=torch.float64), torch.randperm(50)
    wanted = router(x)
    with torch.no_grad():
        twin.weight.copy_(router.weight)
        twin.get_buffer("table")[ids] = wanted.indices
    found = twin(x, RouterContext(token_ids=ids))
    assert torch.equal(found.indices, wanted.indices)
    torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-12, atol=1e-12)


def test_every_kind_that_has_a_twin_is_above() -> None:
    assert {str(options["kind"]) for options in ROUTED.values()} == set(with_hash_twin())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (
            {"kind": "longcat", "num_zero_experts": 2},
            "num_zero_experts",
        ),
        (
            {"kind": "expert_choice"},
            "kind",
        ),
        ({"kind": "gemma"}, "kind"),
        ({"kind": "llama4", "top_k": 1}, "kind"),
        ({"kind": "inkling", "num_shared_gates": 1}, "kind"),
        ({"kind": "switch", "top_k": 1}, "kind"),
        (
            {"kind": "pnorm_topk", "norm_p": 2.0},
            "norm_p",
        ),
        (
            {"kind": "topk_softmax", "router_bias": True},
            "router_bias",
        ),
        (
            {"kind": "softmax_topk", "norm_topk_prob": True, "norm_min": 0.6},
            "norm_min",
        ),
        (
            {"kind": "softmax_topk", "logit_softcap": 0.8},
            "logit_softcap",
        ),
        (
            {"kind": "sigmoid_topk", "logit_scale": 0.2},
            "logit_scale",
        ),
        (
            {"kind": "pnorm_topk", "jitter_eps": 0.1},
            "jitter_eps",
        ),
    ],
)
def test_a_router_without_a_twin_is_refused(options: dict[str, Any], field: str) -> None:
    values: dict[str, Any] = {"num_experts": 8, "top_k": 3} | options
    with refused(field):
        hash_twin(RouterConfig(**values), 50)


def test_seeds_draw_different_tables_of_different_experts() -> None:
    config = RouterConfig(kind="sqrt_softplus_topk", num_experts=8, top_k=3)
    tables = [hash_twin(config, 300, seed).build(4).get_buffer("table") for seed in (0, 1)]
    assert not torch.equal(*tables)
    for table in tables:
        assert table.shape == (300, 3)
        assert all(len(set(row)) == 3 for row in table.tolist())
        assert table.unique().tolist() == list(range(8))
