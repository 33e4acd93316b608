"""Multi-head latent attention and DeepSeek-V3 around it, with weights of transformers' modules."""

from typing import Any

import pytest
import torch
from hf_copied import causal, copy_decoder, copy_latent, copy_moe, doubled, largest, randomise

from moe_lab.model import Decoder, DecoderConfig, LatentAttentionConfig, MoEConfig
from moe_lab.model.attention import LatentAttention
from moe_lab.model.rotary import rotary_tables
from moe_lab.routing import ControllerConfig, RouterConfig

ROUTER = RouterConfig(
    kind="deepseek_v3",
    num_experts=8,
    top_k=3,
    num_groups=4,
    topk_groups=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    controller=ControllerConfig(),
)
LATENT = LatentAttentionConfig(kv_rank=10, q_rank=12, nope_dim=6, rope_dim=4, value_dim=5)
DEEPSEEK = DecoderConfig(
    vocab_size=41,
    num_layers=3,
    num_dense_layers=1,
    d_model=24,
    num_heads=4,
    context_length=16,
    d_dense=30,
    tie_embeddings=False,
    moe=MoEConfig(24, 9, ROUTER, num_shared_experts=2),
    latent_attention=LATENT,
)


def deepseek_of(config: DecoderConfig) -> Any:
    """The transformers configuration of one of ours."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    latent, moe = config.latent_attention, config.moe
    assert latent is not None
    assert moe is not None
    return transformers.DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        intermediate_size=config.dense_width,
        moe_intermediate_size=moe.d_expert,
        n_shared_experts=moe.num_shared_experts,
        n_routed_experts=moe.router.num_experts,
        num_experts_per_tok=moe.router.top_k,
        n_group=moe.router.num_groups,
        topk_group=moe.router.topk_groups,
        norm_topk_prob=True,
        routed_scaling_factor=moe.router.routed_scaling_factor,
        first_k_dense_replace=config.num_dense_layers,
        q_lora_rank=latent.q_rank,
        kv_lora_rank=latent.kv_rank,
        qk_nope_head_dim=latent.nope_dim,
        qk_rope_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
        experts_implementation="eager",
    )


@pytest.mark.hf
@pytest.mark.parametrize("value_dim", [3, 5, 12])
@pytest.mark.parametrize("q_rank", [None, 12])
def test_latent_attention_equals_transformers_deepseek_v3_forward_and_backward(
    q_rank: int | None, value_dim: int
) -> None:
    module = pytest.importorskip(
        "transformers.models.deepseek_v3.modeling_deepseek_v3", reason="needs the extra hf"
    )
    latent = LATENT.replace(q_rank=q_rank, value_dim=value_dim)
    config = DEEPSEEK.replace(latent_attention=latent)
    theirs, ours = (
        module.DeepseekV3Attention(deepseek_of(config), 0).eval(),
        LatentAttention(config, latent, 0).eval(),
    )
    randomise(theirs, value_dim)
    copy_latent(ours, theirs)
    rotary = rotary_tables(11, 4, 1e4)
    x = torch.randn(2, 11, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    mine, _ = ours(inputs[0], rotary)
    wanted, _ = theirs(inputs[1], position_embeddings=doubled(rotary), attention_mask=causal(11))
    assert wanted.std() > 0.1
    assert largest(mine, wanted) < 1e-5
    weight = torch.randn_like(wanted)
    for value in (mine, wanted):
        (value * weight).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert largest(inputs[0].grad, inputs[1].grad) < 1e-5 * inputs[1].grad.abs().max().clamp_min(1)


@pytest.mark.hf
def test_the_moe_module_equals_transformers_deepseek_v3_with_groups_bias_and_shared_experts() -> (
    None
):
    module = pytest.importorskip(
        "transformers.models.deepseek_v3.modeling_deepseek_v3", reason="needs the extra hf"
    )
    assert DEEPSEEK.moe is not None
    theirs, ours = module.DeepseekV3MoE(deepseek_of(DEEPSEEK)).eval(), DEEPSEEK.moe.build().eval()
    randomise(theirs, 1)
    copy_moe(ours, theirs)
    x = torch.randn(2, 20, 24)
    mine, routing = ours(x, return_routing=True)
    assert torch.equal(routing.indices.sort(dim=1).values, theirs.gate(x)[2].sort(dim=1).values)
    assert largest(mine, theirs(x)) < 1e-5


@pytest.mark.hf
@pytest.mark.parametrize("q_rank", [None, 12])
def test_the_whole_model_has_the_logits_of_transformers_deepseek_v3(q_rank: int | None) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = DEEPSEEK.replace(latent_attention=LATENT.replace(q_rank=q_rank))
    theirs, ours = (
        transformers.DeepseekV3ForCausalLM(deepseek_of(config)).eval(),
        Decoder(config).eval(),
    )
    randomise(theirs, 2, std=0.2)
    copy_decoder(ours, theirs)
    ids = torch.randint(0, 41, (3, 16), generator=torch.Generator().manual_seed(0))
    assert theirs(ids).logits.std() > 0.1
    assert largest(ours(ids).logits, theirs(ids).logits) < 1e-5


def test_variance_alignment_multiplies_queries_and_the_key_value_latent() -> None:
    """sqrt(24 / 12) on queries and sqrt(24 / 6) on the latent, which is the plain attention with
    those two matrices scaled.
    """
    latent = LATENT.replace(kv_rank=6)
    config = DEEPSEEK.replace(latent_attention=latent)
    plain, scaled = (
        LatentAttention(config, latent, 0),
        LatentAttention(config, latent.replace(scale_latents=True), 0),
    )
    randomise(scaled, 4)
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        plain.query.weight.mul_(2**0.5)
        plain.kv.weight.mul_(2)
    x, rotary = torch.randn(1, 8, 24), rotary_tables(8, 4, 1e4)
    torch.testing.assert_close(plain(x, rotary)[0], scaled(x, rotary)[0], rtol=1e-5, atol=1e-5)
