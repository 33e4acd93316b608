"""What a reading of a layer says, against the routings and weights themselves."""

import math

import pytest
import torch

from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, RouterConfig
from moe_lab.training.readings import ffn_target, read_layers

LONGCAT = RouterConfig(
    kind="longcat",
    num_experts=8,
    num_zero_experts=4,
    top_k=3,
    controller=ControllerConfig(kind="proportional", rate=0.1, target_ffn_count=2.0),
)


def decoder(router: RouterConfig) -> Decoder:
    torch.manual_seed(0)
    moe = MoEConfig(d_model=32, d_expert=16, router=router)
    return Decoder(
        DecoderConfig(
            vocab_size=64, num_layers=2, d_model=32, num_heads=2, context_length=16, moe=moe
        )
    )


def test_a_reading_is_over_all_micro_batches_and_without_padding():
    model = decoder(LONGCAT)
    ids = torch.randint(0, 64, (6, 16))
    valid = torch.ones(6, 16, dtype=torch.bool)
    valid[:, 12:] = False
    outputs = [model(ids[part], valid_BS=valid[part]) for part in (slice(0, 4), slice(4, 6))]
    routings = list(zip(*(output.routings for output in outputs), strict=True))
    readings = read_layers(7, model.moe_layers(), routings)
    assert [(reading.step, reading.layer) for reading in readings] == [(7, 0), (7, 1)]
    for reading, seen in zip(readings, routings, strict=True):
        kept = torch.cat([routing.valid_mask() for routing in seen])
        ids_TK = torch.cat([routing.indices for routing in seen])[kept]
        scores = torch.cat([routing.scores for routing in seen])[kept].double()
        assert reading.tokens == 72
        assert reading.counts.tolist() == [int((ids_TK == expert).sum()) for expert in range(8)]
        real = ((ids_TK >= 0) & (ids_TK < 8)).sum(dim=1).double().mean()
        assert reading.mean_ffn_count == pytest.approx(float(real))
        assert reading.entropy == pytest.approx(
            float(-(scores * scores.log()).sum(dim=1).mean().detach()), rel=1e-5
        )
        assert reading.entropy_max == math.log(12)
        spread = (scores.amax(dim=1) - scores.amin(dim=1)).mean().detach()
        assert reading.score_spread == pytest.approx(float(spread))
        assert (reading.ffn_target, reading.num_zero_experts) == (2.0, 4)


@pytest.mark.parametrize(("kind", "sparse"), [("remoe", True), ("softmax_topk", False)])
def test_a_reading_says_whether_the_scores_are_sparse(kind, sparse):
    slots = 8 if kind == "remoe" else None
    model = decoder(RouterConfig(kind=kind, num_experts=8, top_k=2, max_slots=slots))
    routings = [[routing] for routing in model(torch.randint(0, 64, (2, 16))).routings]
    readings = read_layers(1, model.moe_layers(), routings)
    assert [reading.sparse_scores for reading in readings] == [sparse] * 2
    assert all(bool((seen[0].scores == 0).any()) == sparse for seen in routings)


def test_an_expert_with_a_zero_matrix_has_norm_zero_and_a_trained_router_another_norm():
    model = decoder(LONGCAT)
    layers = model.moe_layers()
    with torch.no_grad():
        layers[0].experts.down[3] = 0
        layers[1].experts.gate_up[5] = 0
    routings = [[routing] for routing in model(torch.randint(0, 64, (4, 16))).routings]
    before = read_layers(1, layers, routings)
    zero = [(reading.expert_norms == 0).nonzero().flatten().tolist() for reading in before]
    assert zero == [[3], [5]]
    with torch.no_grad():
        layers[1].router.weight[0, 0] += 1e-3
        layers[1].router.controller.bias += 1
    after = read_layers(2, layers, routings)
    assert after[0].router_norm == before[0].router_norm
    assert after[1].router_norm != before[1].router_norm
    assert before[1].bias.eq(0).all()
    assert after[1].bias.eq(1).all()


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (LONGCAT, 2.0),
        (RouterConfig(kind="softmax_topk", num_experts=8, top_k=2), None),
        (RouterConfig(kind="dtop_p", num_experts=8, top_k=2), 2.0),
        (RouterConfig(kind="top_p", num_experts=8, top_k=8, top_p=0.4), None),
        (RouterConfig(kind="adamoe", num_experts=8, num_zero_experts=8, top_k=4), 2.0),
    ],
)
def test_a_target_is_named_where_tokens_differ_and_a_mean_is_aimed_at(config, target):
    assert ffn_target(config) == target
