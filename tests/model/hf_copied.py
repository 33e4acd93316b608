"""Weights of transformers' modules copied into ours, whatever the model: attention, feed-forward,
MoE, and whole decoders.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.model import Decoder, MoELayer, SwiGLU
from moe_lab.model.attention import GroupedQueryAttention, LatentAttention
from moe_lab.model.rotary import Rotary


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Weights that are far from their usual start, norms included, so that nothing is 1 or 0 by
    luck; tables of expert ids stay.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        *module.named_parameters(),
        *((name, buffer) for name, buffer in module.named_buffers() if "bias" in name),
    ]
    for name, tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator)
        scale = 0.1 if "bias" in name else std
        tensor.copy_(noise * scale + ("norm" in name and tensor.dim() == 1))


def halves(rows: Tensor) -> Tensor:
    """[rope, .] rows in interleaved pairs -> the same pairs as (first half, second half)."""
    return torch.cat((rows[0::2], rows[1::2]))


@torch.no_grad()
def copy_latent(ours: LatentAttention, theirs: Any) -> None:
    """Multi-head latent attention; theirs rotates interleaved pairs, ours halves."""
    c = ours.config
    if ours.query_down is not None and ours.query_norm is not None:
        ours.query_down.weight.copy_(theirs.q_a_proj.weight)
        ours.query_norm.weight.copy_(theirs.q_a_layernorm.weight)
    query = (theirs.q_proj if ours.query_down is None else theirs.q_b_proj).weight
    heads = query.unflatten(0, (ours.heads, c.nope_dim + c.rope_dim))
    ours.query.weight.copy_(
        torch.cat([torch.cat((head[: c.nope_dim], halves(head[c.nope_dim :]))) for head in heads])
    )
    down = theirs.kv_a_proj_with_mqa.weight
    ours.kv_down.weight.copy_(torch.cat((down[: c.kv_rank], halves(down[c.kv_rank :]))))
    ours.kv_norm.weight.copy_(theirs.kv_a_layernorm.weight)
    ours.kv.weight.copy_(theirs.kv_b_proj.weight)
    ours.out.weight.copy_(theirs.o_proj.weight)
    if ours.indexer is not None:  # rotates halves in both
        for mine, their in (
            ("query", "wq_b"),
            ("key", "wk"),
            ("key_norm", "k_norm"),
            ("weigh", "weights_proj"),
        ):
            getattr(ours.indexer, mine).load_state_dict(getattr(theirs.indexer, their).state_dict())


@torch.no_grad()
def copy_grouped(ours: GroupedQueryAttention, theirs: Any) -> None:
    ours.qkv.weight.copy_(
        torch.cat((theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight))
    )
    ours.out.weight.copy_(theirs.o_proj.weight)
    if ours.query_norm is not None and ours.key_norm is not None:
        ours.query_norm.weight.copy_(theirs.q_norm.weight)
        ours.key_norm.weight.copy_(theirs.k_norm.weight)


@torch.no_grad()
def copy_dense(ours: SwiGLU, theirs: Any) -> None:
    ours.gate_up.copy_(torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight)))
    ours.down.copy_(theirs.down_proj.weight)


@torch.no_grad()
def copy_moe(ours: MoELayer, theirs: Any) -> None:
    """Router with its correction bias or table, experts without phantom rows, shared experts."""
    router = theirs.router if hasattr(theirs, "router") else theirs.gate
    ours.router.load_hf(router)
    if hasattr(router, "tid2eid"):
        ours.router.get_buffer("table").copy_(router.tid2eid)
    ours.experts.gate_up.copy_(theirs.experts.gate_up_proj[: ours.experts.num_experts])
    ours.experts.down.copy_(theirs.experts.down_proj)
    if ours.shared is not None:
        copy_dense(ours.shared, theirs.shared_experts)


@torch.no_grad()
def copy_plain_block(ours: Any, theirs: Any) -> None:
    """Attention and one feed-forward."""
    ours.attention_norm.weight.copy_(theirs.input_layernorm.weight)
    ours.ffn_norm.weight.copy_(theirs.post_attention_layernorm.weight)
    attention: Any = copy_latent if isinstance(ours.attention, LatentAttention) else copy_grouped
    feed_forward: Any = copy_dense if ours.moe is None else copy_moe
    attention(ours.attention, theirs.self_attn)
    feed_forward(ours.ffn, theirs.mlp)


@torch.no_grad()
def copy_double_block(ours: Any, theirs: Any) -> None:
    """LongCat-Flash's two halves and the MoE between them."""
    for half in range(2):
        ours.attention_norms[half].weight.copy_(theirs.input_layernorm[half].weight)
        ours.ffn_norms[half].weight.copy_(theirs.post_attention_layernorm[half].weight)
        copy_latent(ours.attentions[half], theirs.self_attn[half])
        copy_dense(ours.ffns[half], theirs.mlps[half])
    copy_moe(ours.moe, theirs.mlp)


@torch.no_grad()
def copy_decoder(ours: Decoder, theirs: Any) -> None:
    """A whole causal language model with a head of its own."""
    assert ours.head is not None
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    ours.norm.weight.copy_(theirs.model.norm.weight)
    ours.head.weight.copy_(theirs.lm_head.weight)
    for mine, their in zip(ours.blocks, theirs.model.layers, strict=True):
        (copy_double_block if hasattr(mine, "attentions") else copy_plain_block)(mine, their)


def doubled(rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Our angles as transformers passes them: cos and sin [1, S, rope], each half the same."""
    return torch.cat((rotary.cos, rotary.cos), dim=1)[None], torch.cat(
        (rotary.sin, rotary.sin), dim=1
    )[None]


def causal(length: int) -> Tensor:
    """[1, 1, S, S] additive mask."""
    return torch.full((length, length), -torch.inf).triu(1)[None, None]


def largest(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference."""
    return (first - second).abs().max().item()
