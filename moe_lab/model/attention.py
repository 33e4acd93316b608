"""Causal attention with rotary positions (arXiv 2104.09864): grouped-query (2305.13245) and
multi-head latent (2405.04434).

Both project to queries, keys and values; how positions are mixed is the same for both: all of them
through torch's fused kernel, or those that a lightning indexer chose (``sparse_attention.py``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.model.attention_config import LatentAttentionConfig, QKNorm
from moe_lab.model.config import DecoderConfig
from moe_lab.model.rotary import Rotary, rotate
from moe_lab.model.sparse_attention import Indexer, Selection, attend, indexer_loss


class CausalAttention(nn.Module):
    """Causal grouped-query attention with rotary positions. Shape letters: B sequences, S
    positions, H heads, G key-value heads.

    Args:
        number: of this block among the decoder's attention blocks, which decides whether it has an
            indexer of its own; None: it attends to all positions, whatever the configuration says
            (MTP modules).
    """

    def __init__(
        self, config: DecoderConfig, number: int | None, query_width: int, out_width: int
    ) -> None:
        super().__init__()
        self.sparse = None if number is None else config.sparse_attention
        self.out = nn.Linear(out_width, config.d_model, bias=False)
        owns = self.sparse is not None and number is not None and number % self.sparse.share == 0
        self.indexer = (
            Indexer(self.sparse, config.d_model, query_width) if owns and self.sparse else None
        )

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, S, D] -> query [B, H, S, .], key and value [B, G, S, .], and what an indexer makes
        its queries of [B, S, .].
        """
        raise NotImplementedError

    def forward(
        self, x: Tensor, rotary: Rotary, selection: Selection | None = None
    ) -> tuple[Tensor, Selection | None]:
        """[B, S, D] -> [B, S, D], each position from itself and those before it; and the selection
        that the next block may share.
        """
        query, key, value, source = self.project(x, rotary)
        if self.sparse is None:
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
            )
        else:
            owner = self.indexer is not None
            if self.indexer is not None:
                selection = self.indexer(x, source, rotary, selection)
            assert selection is not None, "the first attention block has an indexer"
            mixed, attention_BHSK = attend(query, key, value, selection)
            if owner and self.training:
                selection = selection.with_loss(indexer_loss(selection, attention_BHSK))
        return self.out(mixed.transpose(1, 2).flatten(2)), selection


class GroupedQueryAttention(CausalAttention):
    def __init__(self, config: DecoderConfig, number: int | None) -> None:
        heads, kv_heads, dim = config.num_heads, config.kv_heads, config.dim_per_head
        super().__init__(config, number, config.d_model, heads * dim)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.qkv = nn.Linear(config.d_model, (heads + 2 * kv_heads) * dim, bias=False)
        self.norm_over = config.qk_norm
        widths = {
            QKNorm.NONE: None,
            QKNorm.HEAD: (dim, dim),
            QKNorm.WIDTH: (heads * dim, kv_heads * dim),
        }[config.qk_norm]
        self.query_norm = nn.RMSNorm(widths[0], eps=config.norm_eps) if widths else None
        self.key_norm = nn.RMSNorm(widths[1], eps=config.norm_eps) if widths else None

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        projected = self.qkv(x).view(batch, length, self.heads + 2 * self.kv_heads, self.dim)
        query, key, value = projected.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        query, key = self._normed(self.query_norm, query), self._normed(self.key_norm, key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return rotate(query, rotary), rotate(key, rotary), value, x

    def _normed(self, norm: nn.RMSNorm | None, heads_BSHd: Tensor) -> Tensor:
        if norm is None:
            return heads_BSHd
        return (
            norm(heads_BSHd)
            if self.norm_over is QKNorm.HEAD
            else norm(heads_BSHd.flatten(2)).view_as(heads_BSHd)
        )


class LatentAttention(CausalAttention):
    """Queries from a latent c_q, keys and values from a latent c_kv, and one rotary key for all
    heads (arXiv 2405.04434, eq. 9 to 19).
    """

    def __init__(
        self, config: DecoderConfig, latent: LatentAttentionConfig, number: int | None
    ) -> None:
        d, heads, rank = config.d_model, config.num_heads, latent.q_rank
        super().__init__(config, number, d if rank is None else rank, heads * latent.value_dim)
        self.heads, self.config = heads, latent
        eps = config.norm_eps if latent.norm_eps is None else latent.norm_eps
        self.query_down = None if rank is None else nn.Linear(d, rank, bias=False)
        self.query_norm = None if rank is None else nn.RMSNorm(rank, eps=eps)
        self.query = nn.Linear(
            d if rank is None else rank, heads * (latent.nope_dim + latent.rope_dim), bias=False
        )
        self.kv_down = nn.Linear(d, latent.kv_rank + latent.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(latent.kv_rank, eps=eps)
        self.kv = nn.Linear(
            latent.kv_rank, heads * (latent.nope_dim + latent.value_dim), bias=False
        )
        self.query_scale = (d / rank) ** 0.5 if latent.scale_latents and rank is not None else 1.0
        self.kv_scale = (d / latent.kv_rank) ** 0.5 if latent.scale_latents else 1.0

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c, (batch, length, _) = self.config, x.shape
        source = (
            x
            if self.query_down is None or self.query_norm is None
            else self.query_norm(self.query_down(x))
        )
        query = (
            (self.query(source) * self.query_scale)
            .view(batch, length, self.heads, -1)
            .transpose(1, 2)
        )
        query_nope, query_rope = query.split((c.nope_dim, c.rope_dim), dim=3)
        latent, key_rope = self.kv_down(x).split((c.kv_rank, c.rope_dim), dim=2)
        expanded = (
            self.kv(self.kv_norm(latent) * self.kv_scale)
            .view(batch, length, self.heads, -1)
            .transpose(1, 2)
        )
        key_nope, value = expanded.split((c.nope_dim, c.value_dim), dim=3)
        key_rope = rotate(key_rope.unsqueeze(1), rotary).expand(-1, self.heads, -1, -1)
        return (
            torch.cat((query_nope, rotate(query_rope, rotary)), dim=3),
            torch.cat((key_nope, key_rope), dim=3),
            value,
            source,
        )


def build_attention(config: DecoderConfig, number: int | None) -> CausalAttention:
    """The attention block ``number`` of a decoder."""
    if config.latent_attention is not None:
        return LatentAttention(config, config.latent_attention, number)
    return GroupedQueryAttention(config, number)
