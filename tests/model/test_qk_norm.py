"""RMSNorm of queries and keys: over each head as Qwen3 has it, over all heads as OLMoE has it, with
transformers' whole models.
"""

from typing import Any

import pytest
import torch
from hf_copied import copy_decoder, largest, randomise
from refusals import refused

from moe_lab.model import Decoder, DecoderConfig, LatentAttentionConfig, MoEConfig, QKNorm
from moe_lab.routing import RouterConfig

MOE = MoEConfig(24, 10, RouterConfig(num_experts=6, top_k=3, norm_topk_prob=True))
QWEN3 = DecoderConfig(
    vocab_size=37,
    num_layers=2,
    d_model=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=16,
    moe=MOE,
    qk_norm=QKNorm.HEAD,
    tie_embeddings=False,
    rope_theta=1e6,
)
OLMOE = DecoderConfig(
    vocab_size=37,
    num_layers=2,
    d_model=24,
    num_heads=4,
    num_kv_heads=2,
    context_length=16,
    qk_norm=QKNorm.WIDTH,
    tie_embeddings=False,
    moe=MOE.replace(router=RouterConfig(num_experts=6, top_k=3)),
    norm_eps=1e-5,
)


def values_of(config: DecoderConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_experts": 6,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.norm_topk_prob,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }


def qwen3(transformers: Any) -> Any:
    config = transformers.Qwen3MoeConfig(
        **values_of(QWEN3), head_dim=8, moe_intermediate_size=10, intermediate_size=7
    )
    return transformers.Qwen3MoeForCausalLM(config)


def olmoe(transformers: Any) -> Any:
    return transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**values_of(OLMOE), intermediate_size=10, eos_token_id=2)
    )


@pytest.mark.hf
@pytest.mark.parametrize(
    ("config", "build"), [(QWEN3, qwen3), (OLMOE, olmoe)], ids=["qwen3_moe", "olmoe"]
)
def test_the_whole_model_has_the_logits_of_transformers(config: DecoderConfig, build: Any) -> None:
    theirs, ours = (
        build(pytest.importorskip("transformers", reason="needs the extra hf")).eval(),
        Decoder(config).eval(),
    )
    randomise(theirs, 3)
    copy_decoder(ours, theirs)
    ids = torch.randint(0, 37, (3, 16), generator=torch.Generator().manual_seed(0))
    wanted = theirs(ids).logits
    assert wanted.std() > 0.1
    assert largest(ours(ids).logits, wanted) < 1e-5 * wanted.abs().max().clamp_min(1)


@pytest.mark.parametrize("norm", [QKNorm.HEAD, QKNorm.WIDTH])
def test_the_length_of_queries_and_keys_has_no_influence(norm: QKNorm) -> None:
    """Queries and keys ten times as long mix the same; values ten times as long do not."""
    model = Decoder(OLMOE.replace(qk_norm=norm, norm_eps=1e-12)).double().eval()
    randomise(model, 4)
    ids = torch.randint(0, 37, (1, 16))
    before = model(ids).logits
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[:36] *= 10
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[36:] *= 10
    assert largest(model(ids).logits, before) > 1e-3


def test_norms_of_queries_and_keys_stand_in_grouped_attention_only() -> None:
    with refused("latent_attention"):
        OLMOE.replace(num_kv_heads=None, latent_attention=LatentAttentionConfig(8))
