"""The decoder: causal, equal to a Llama with the same weights where it is dense, and counted per
MoE layer.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from moe_lab.model import IGNORE, Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig

MOE = MoEConfig(
    d_model=16, d_expert=8, router=RouterConfig(num_experts=4, top_k=2, norm_topk_prob=True)
)
SMALL = DecoderConfig(
    vocab_size=31,
    num_layers=3,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    context_length=12,
    moe=MOE,
    num_dense_layers=1,
)


def test_a_later_token_changes_no_earlier_logit() -> None:
    torch.manual_seed(0)
    model = Decoder(SMALL).double().eval()
    ids = torch.randint(0, 31, (2, 12))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 31
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-6


def test_leading_layers_are_dense_and_the_rest_report_their_routing() -> None:
    model = Decoder(SMALL)
    output = model(torch.randint(0, 31, (2, 5)))
    assert SMALL.moe_layers == (1, 2) == tuple(model.moe_layers())
    assert [routing.counts().sum().item() for routing in output.routings] == [20, 20]


def test_padding_is_routed_but_never_counted() -> None:
    valid = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    output = Decoder(SMALL)(torch.randint(0, 31, (2, 5)), valid_BS=valid)
    assert [routing.counts().sum().item() for routing in output.routings] == [14, 14]


def test_the_loss_is_the_mean_over_targets_alone() -> None:
    model = Decoder(SMALL).double()
    ids = torch.randint(0, 31, (1, 6))
    targets = torch.tensor([[3, IGNORE, 5, IGNORE, IGNORE, 7]])
    output = model(ids, targets)
    log_probabilities = output.logits.float().log_softmax(dim=-1)[0]
    wanted = -(log_probabilities[0, 3] + log_probabilities[2, 5] + log_probabilities[5, 7]) / 3
    assert output.loss is not None
    torch.testing.assert_close(output.loss, wanted)


@pytest.mark.hf
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_dense_decoder_equals_transformers_llama_with_the_same_weights(kv_heads: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = DecoderConfig(
        vocab_size=29,
        num_layers=2,
        d_model=16,
        num_heads=4,
        num_kv_heads=kv_heads,
        context_length=16,
        d_dense=24,
        tie_embeddings=False,
    )
    ours = Decoder(config).eval()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=29,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=16,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
        theirs.model.embed_tokens.weight.copy_(ours.embedding.weight)
        theirs.model.norm.weight.copy_(ours.norm.weight)
        assert ours.head is not None
        theirs.lm_head.weight.copy_(ours.head.weight)
        for mine, their in zip(ours.blocks, theirs.model.layers, strict=True):
            their.input_layernorm.weight.copy_(mine.attention_norm.weight)
            their.post_attention_layernorm.weight.copy_(mine.ffn_norm.weight)
            q, k, v = mine.attention.qkv.weight.split((16, 4 * kv_heads, 4 * kv_heads))
            for projection, weight in (
                (their.self_attn.q_proj, q),
                (their.self_attn.k_proj, k),
                (their.self_attn.v_proj, v),
            ):
                projection.weight.copy_(weight)
            their.self_attn.o_proj.weight.copy_(mine.attention.out.weight)
            gate, up = mine.ffn.gate_up.chunk(2)
            their.mlp.gate_proj.weight.copy_(gate)
            their.mlp.up_proj.weight.copy_(up)
            their.mlp.down_proj.weight.copy_(mine.ffn.down)
    ids = torch.randint(0, 29, (3, 16))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    experts=st.integers(1, 6),
    zero=st.integers(0, 3),
    shared=st.integers(0, 2),
    dense=st.integers(0, 2),
    tied=st.booleans(),
    data=st.data(),
)
def test_a_config_of_any_shape_builds_runs_and_survives_json(
    experts: int, zero: int, shared: int, dense: int, tied: bool, data: st.DataObject
) -> None:
    router = RouterConfig(
        kind="longcat" if zero else "softmax_topk",
        num_experts=experts,
        num_zero_experts=zero,
        top_k=data.draw(st.integers(1, experts + zero)),
    )
    moe = MoEConfig(d_model=8, d_expert=4, router=router, num_shared_experts=shared)
    config = DecoderConfig(
        vocab_size=11,
        num_layers=2,
        d_model=8,
        num_heads=2,
        context_length=4,
        moe=moe,
        num_dense_layers=dense,
        tie_embeddings=tied,
    )
    assert DecoderConfig.from_dict(config.to_dict()) == config
    output = Decoder(config)(torch.randint(0, 11, (2, 4)), torch.randint(0, 11, (2, 4)))
    assert output.loss is not None
    assert torch.isfinite(output.loss)
    assert len(output.routings) == 2 - dense


def test_contradictory_configs_say_what_was_expected() -> None:
    with refused("moe.d_model"):
        SMALL.replace(d_model=32)
    with refused("d_model"):
        SMALL.replace(num_heads=3)
    with refused("context_length"):
        Decoder(SMALL)(torch.zeros(1, 13, dtype=torch.int64))
    with refused("num_dense_layers"):
        DecoderConfig(num_dense_layers=5)
