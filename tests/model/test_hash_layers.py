"""DeepSeek-V4's MoE block with either router, with transformers' weights, and hash layers in a
decoder.

transformers clamps the gate and the up-projection of an expert at ``swiglu_limit`` = 10, which
these small weights never reach; this library has no clamp.
"""

from typing import Any

import pytest
import torch
from hf_copied import copy_moe, largest, randomise
from refusals import refused
from torch import Tensor

from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, RouterConfig, RouterContext, hash_twin

ROUTER = RouterConfig(
    kind="sqrt_softplus_topk",
    num_experts=8,
    top_k=3,
    norm_topk_prob=True,
    norm_eps=1e-20,
    routed_scaling_factor=1.5,
    controller=ControllerConfig(),
)
MOE = MoEConfig(24, 12, ROUTER, num_shared_experts=1)
HASHED = DecoderConfig(
    vocab_size=43,
    num_layers=5,
    num_dense_layers=1,
    num_hash_layers=2,
    d_model=24,
    num_heads=4,
    context_length=16,
    moe=MOE,
)


def v4_block(*, hashed: bool) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    module = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="needs the extra hf"
    )
    config = transformers.DeepseekV4Config(
        vocab_size=43,
        hidden_size=24,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        mlp_layer_types=["hash_moe", "moe"],
        experts_implementation="eager",
    )
    block = module.DeepseekV4SparseMoeBlock(config, 0 if hashed else 1).eval()
    randomise(block, 11)
    if hashed:
        block.gate.tid2eid.copy_(
            torch.rand(43, 8, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :3]
        )
    return block


@pytest.mark.hf
@pytest.mark.parametrize("hashed", [False, True])
def test_the_moe_block_equals_transformers_deepseek_v4(hashed: bool) -> None:
    theirs = v4_block(hashed=hashed)
    ours = (MOE.replace(router=hash_twin(ROUTER, 43)) if hashed else MOE).build().eval()
    copy_moe(ours, theirs)
    x, ids = torch.randn(3, 16, 24), torch.randint(0, 43, (3, 16))
    mine, routing = ours(x, RouterContext(token_ids=ids.flatten()), return_routing=True)
    _, weights, selected = theirs.gate(x, ids) if hashed else theirs.gate(x)
    if hashed:
        assert torch.equal(routing.indices, selected)
        assert largest(routing.weights, weights) < 1e-6
    else:
        assert torch.equal(routing.indices.sort(dim=1).values, selected.sort(dim=1).values)
        assert theirs.gate.e_score_correction_bias.abs().max() > 0
    hidden = torch.einsum("td,efd->tef", x.flatten(0, 1), theirs.experts.gate_up_proj)
    assert hidden.abs().max() < 10, "the clamp would bite"
    assert largest(mine, theirs(x, ids)) < 1e-5


def table(model: Decoder, layer: int) -> Tensor:
    return model.moe_layers()[layer].router.get_buffer("table")


def test_leading_moe_layers_select_by_token_id_and_the_others_do_not() -> None:
    model = Decoder(HASHED).eval()
    randomise(model, 2)
    ids = torch.randint(0, 43, (4, 16))
    routings = model(ids).routings
    flat = ids.flatten()
    for layer, routing in zip(HASHED.moe_layers, routings, strict=True):
        chosen = routing.indices.sort(dim=1).values
        alike = all(
            (chosen[flat == token] == chosen[flat == token][:1]).all() for token in flat.unique()
        )
        assert alike == (layer in (1, 2))
    for layer, routing in zip((1, 2), routings[:2], strict=True):
        assert torch.equal(routing.indices, table(model, layer)[flat])
        same = flat == flat.mode().values
        assert routing.weights[same].std(dim=0).min() > 0, (
            "the weights are learned and depend on the context"
        )
    assert not torch.equal(table(model, 1), table(model, 2))


def test_hash_layers_train_their_router_and_have_no_balance_bias() -> None:
    model = Decoder(HASHED)
    output = model(torch.randint(0, 43, (2, 16)), torch.randint(0, 43, (2, 16)))
    assert output.loss is not None
    output.loss.backward()
    for layer in (1, 2):
        router = model.blocks[layer].moe.router
        assert router.controller is None
        assert router.weight.grad.abs().sum() > 0
    assert model.blocks[3].moe.router.controller is not None


def test_the_tables_are_saved_with_the_model() -> None:
    torch.manual_seed(0)
    first, second = Decoder(HASHED), Decoder(HASHED)
    with torch.no_grad():
        table(first, 1).copy_(table(first, 1).flip(0))
    second.load_state_dict(first.state_dict())
    assert torch.equal(table(first, 1), table(second, 1))


def test_a_number_of_hash_layers_that_does_not_fit_is_refused() -> None:
    with refused("num_hash_layers"):
        HASHED.replace(num_hash_layers=5)
    with refused("num_zero_experts"):
        HASHED.replace(
            moe=MoEConfig(
                24, 12, RouterConfig(kind="longcat", num_experts=4, num_zero_experts=2, top_k=2)
            )
        )
