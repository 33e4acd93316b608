"""LongCat-Flash's wiring: its layer and whole model with the same weights, and the sequential twin
by hand.
"""

from typing import Any

import pytest
import torch
from hf_copied import causal, copy_decoder, copy_double_block, doubled, largest, randomise
from torch import Tensor

from moe_lab.model import Decoder, DecoderConfig, LatentAttentionConfig, MoEConfig, MoELayer, Wiring
from moe_lab.model.blocks import DoubleBlock
from moe_lab.model.rotary import Rotary, rotary_tables
from moe_lab.routing import ControllerConfig, RouterConfig, RouterContext

ROUTER = RouterConfig(
    kind="longcat",
    num_experts=6,
    num_zero_experts=3,
    top_k=4,
    routed_scaling_factor=6.0,
    controller=ControllerConfig(),
)
LONGCAT = DecoderConfig(
    vocab_size=37,
    num_layers=2,
    d_model=24,
    num_heads=4,
    context_length=16,
    moe=MoEConfig(24, 10, ROUTER),
    d_dense=20,
    wiring=Wiring.SHORTCUT,
    tie_embeddings=False,
    rope_theta=1e4,
    norm_eps=1e-5,
    latent_attention=LatentAttentionConfig(
        kv_rank=10,
        q_rank=12,
        nope_dim=6,
        rope_dim=4,
        value_dim=5,
        scale_latents=True,
        norm_eps=1e-6,
    ),
)


def longcat_of(config: DecoderConfig) -> Any:
    """The transformers configuration of one of ours."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    latent, moe = config.latent_attention, config.moe
    assert latent is not None
    assert moe is not None
    return transformers.LongcatFlashConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        ffn_hidden_size=config.dense_width,
        q_lora_rank=latent.q_rank,
        kv_lora_rank=latent.kv_rank,
        qk_nope_head_dim=latent.nope_dim,
        qk_rope_head_dim=latent.rope_dim,
        head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        moe_topk=moe.router.top_k,
        n_routed_experts=moe.router.num_experts,
        zero_expert_num=moe.router.num_zero_experts,
        expert_ffn_hidden_size=moe.d_expert,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        routed_scaling_factor=moe.router.routed_scaling_factor,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
    )


@pytest.mark.hf
@pytest.mark.parametrize("zero", [3, 1])
@pytest.mark.parametrize("seed", range(5))
def test_a_layer_equals_transformers_longcat_flash_forward_and_backward(
    seed: int, zero: int
) -> None:
    config = LONGCAT.replace(moe=MoEConfig(24, 10, ROUTER.replace(num_zero_experts=zero)))
    module = pytest.importorskip(
        "transformers.models.longcat_flash.modeling_longcat_flash", reason="needs the extra hf"
    )
    theirs, ours = (
        module.LongcatFlashDecoderLayer(longcat_of(config), 0).eval(),
        DoubleBlock(config, 0).eval(),
    )
    randomise(theirs, seed, std=0.2)
    copy_double_block(ours, theirs)
    assert theirs.mlp.router.e_score_correction_bias.abs().min() > 0
    x = torch.randn(2, 9, 24)
    rotary = rotary_tables(9, 4, 1e4)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    mine, routing, _ = ours(inputs[0], rotary, RouterContext(sequence_length=9), None)
    wanted = theirs(inputs[1], attention_mask=causal(9), position_embeddings=doubled(rotary))
    assert routing is not None
    assert routing.zero_count().sum() > 0
    assert torch.equal(
        routing.indices.sort(dim=1).values,
        theirs.mlp.router(_read_by_moe(theirs, x, rotary))[2].sort(dim=1).values,
    )
    assert wanted.std() > 0.5
    assert largest(mine, wanted) < 1e-5
    weight = torch.randn_like(wanted)
    for value in (mine, wanted):
        (value * weight).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert largest(inputs[0].grad, inputs[1].grad) < 1e-5 * inputs[1].grad.abs().max().clamp_min(1)


def _read_by_moe(theirs: Any, x: Tensor, rotary: Rotary) -> Tensor:
    seen: list[Tensor] = []
    handle = theirs.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    theirs(x, attention_mask=causal(x.shape[1]), position_embeddings=doubled(rotary))
    handle.remove()
    return seen[0]


@pytest.mark.hf
def test_the_whole_model_has_the_logits_of_transformers_longcat_flash() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    theirs, ours = (
        transformers.LongcatFlashForCausalLM(longcat_of(LONGCAT)).eval(),
        Decoder(LONGCAT).eval(),
    )
    randomise(theirs, 5, std=0.2)
    copy_decoder(ours, theirs)
    ids = torch.randint(0, 37, (3, 16), generator=torch.Generator().manual_seed(0))
    mine, wanted = ours(ids).logits, theirs(ids).logits
    assert wanted.std() > 0.1
    assert largest(mine, wanted) < 1e-5


@pytest.mark.hf
def test_the_norm_of_the_latents_has_an_eps_of_its_own() -> None:
    """The release norms latents with 1e-6 whatever ``rms_norm_eps``; one eps for both would be seen
    at small latents.
    """
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    assert LONGCAT.latent_attention is not None
    config = LONGCAT.replace(norm_eps=1e-2)
    theirs, ours = (
        transformers.LongcatFlashForCausalLM(longcat_of(config)).eval(),
        Decoder(config).eval(),
    )
    one_eps = Decoder(
        config.replace(latent_attention=LONGCAT.latent_attention.replace(norm_eps=None))
    ).eval()
    randomise(theirs, 6, std=0.2)
    copy_decoder(ours, theirs)
    copy_decoder(one_eps, theirs)
    ids = torch.arange(16)[None]
    assert largest(ours(ids).logits, theirs(ids).logits) < 1e-5
    assert largest(one_eps(ids).logits, theirs(ids).logits) > 1e-4


def _parts(config: DecoderConfig) -> tuple[DoubleBlock, Tensor]:
    torch.manual_seed(3)
    block = DoubleBlock(config, 0).double().eval()
    randomise(block, 3)
    return block, torch.randn(2, 7, config.d_model, dtype=torch.float64)


def _ln(norm: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * norm.weight


@pytest.mark.parametrize("wiring", [Wiring.SHORTCUT, Wiring.SEQUENTIAL])
def test_where_the_moe_joins_the_stream_is_all_that_differs_between_the_twins(
    wiring: Wiring,
) -> None:
    """The layer as a plain sum: the shortcut's MoE arrives at the end, its twin's before the second
    attention.
    """
    block, x = _parts(LONGCAT.replace(wiring=wiring))
    rotary, context = rotary_tables(7, 4, 1e4), RouterContext(sequence_length=7)
    assert isinstance(block.moe, MoELayer)
    h1 = x + block.attentions[0](_ln(block.attention_norms[0], x), rotary)[0]
    u = _ln(block.ffn_norms[0], h1)
    s = block.moe(u, context)
    h2 = h1 + block.ffns[0](u) + (s if wiring is Wiring.SEQUENTIAL else 0)
    h3 = h2 + block.attentions[1](_ln(block.attention_norms[1], h2), rotary)[0]
    wanted = (
        h3 + block.ffns[1](_ln(block.ffn_norms[1], h3)) + (s if wiring is Wiring.SHORTCUT else 0)
    )
    torch.testing.assert_close(block(x, rotary, context, None)[0], wanted, rtol=1e-9, atol=1e-9)


def test_the_twins_have_the_same_parameters_by_name_and_different_outputs() -> None:
    shortcut, sequential = (
        Decoder(LONGCAT.replace(wiring=wiring)).eval()
        for wiring in (Wiring.SHORTCUT, Wiring.SEQUENTIAL)
    )
    shapes = [
        {name: tuple(value.shape) for name, value in model.named_parameters()}
        for model in (shortcut, sequential)
    ]
    assert shapes[0] == shapes[1]
    sequential.load_state_dict(shortcut.state_dict())
    ids = torch.randint(0, 37, (1, 9))
    assert largest(shortcut(ids).logits, sequential(ids).logits) > 1e-4


def test_leading_dense_layers_of_a_shortcut_decoder_have_two_feed_forwards_and_no_moe() -> None:
    model = Decoder(LONGCAT.replace(num_dense_layers=1))
    output = model(torch.randint(0, 37, (2, 5)))
    assert tuple(model.moe_layers()) == (1,)
    assert len(output.routings) == 1
    assert model.blocks[0].moe is None


def test_a_later_token_changes_no_earlier_logit_of_a_shortcut_decoder() -> None:
    model = Decoder(LONGCAT).double().eval()
    randomise(model, 9)
    ids = torch.randint(0, 37, (1, 12))
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 37
    before, after = model(ids).logits, model(changed).logits
    assert largest(before[:, :6], after[:, :6]) < 1e-12
    assert largest(before[:, 6:], after[:, 6:]) > 1e-6
