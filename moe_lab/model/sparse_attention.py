"""Sparse attention: a lightning indexer scores every earlier position, each query attends to the
best of them.

``I_ts = sum_h w_th relu(q_th . k_s / sqrt(d_I)) / sqrt(H_I)`` with one key per position and one
weight per head and query (DeepSeek-V3.2, arXiv 2512.02556, eq. 1; transformers ``deepseek_v32``).
LongCat-2.0 adds the first and the latest positions to every choice, and lets blocks in a row share
one. A choice has no gradient: the indexer reads detached inputs and learns from ``indexer_loss``
alone.

Shape letters: B sequences, S positions, K chosen positions, H heads, G key-value heads, I indexer
heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe_lab.model.attention_config import SparseAttentionConfig
from moe_lab.model.rotary import Rotary, rotate


@dataclass(frozen=True)
class Selection:
    """The positions that each query attends to.

    Attributes:
        indices: [B, S, K] int64 positions, all different.
        seen: [B, S, K] bool, False where a query has fewer than K positions to see.
        scores: [B, S, K] index scores of the chosen.
        losses: [B, S] indexer losses of the blocks so far.
    """

    indices: Tensor
    seen: Tensor
    scores: Tensor
    losses: tuple[Tensor, ...] = ()

    def with_loss(self, loss: Tensor) -> "Selection":
        return replace(self, losses=(*self.losses, loss))


class Indexer(nn.Module):
    """
    Args:
        query_width: channels that the queries are made of (MLA's query latent, or the stream).
    """

    def __init__(self, config: SparseAttentionConfig, d_model: int, query_width: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(query_width, config.num_heads * config.head_dim, bias=False)
        self.key = nn.Linear(d_model, config.head_dim, bias=False)
        self.key_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.weigh = nn.Linear(d_model, config.num_heads, bias=False)

    def forward(
        self, x: Tensor, source: Tensor, rotary: Rotary, before: Selection | None = None
    ) -> Selection:
        """[B, S, D] stream and [B, S, query_width] -> the positions of each query; the losses of
        ``before`` are carried on.
        """
        scores_BSS = self.scores(x.detach(), source.detach(), rotary)
        length = x.shape[1]
        indices_BSK = choose(
            scores_BSS.detach(),
            min(self.config.top_k, length),
            self.config.initial,
            self.config.local,
        )
        seen_BSK = indices_BSK <= torch.arange(length, device=x.device)[:, None]
        return Selection(
            indices_BSK,
            seen_BSK,
            scores_BSS.gather(2, indices_BSK),
            before.losses if before else (),
        )

    def scores(self, x: Tensor, source: Tensor, rotary: Rotary) -> Tensor:
        """[B, S, S] index scores of every pair, later positions included, in float32 or wider."""
        batch, length, _ = x.shape
        heads, dim = self.config.num_heads, self.config.head_dim
        query_BISd = self._rotated(
            self.query(source).view(batch, length, heads, dim).transpose(1, 2), rotary
        )
        key_BSd = self._rotated(self.key_norm(self.key(x)).unsqueeze(1), rotary).squeeze(1)
        wide = torch.promote_types(x.dtype, torch.float32)
        hits_BISS = (query_BISd.to(wide) @ key_BSd.to(wide).unsqueeze(1).mT * dim**-0.5).relu()
        weights_BSI = self.weigh(x).to(wide) * heads**-0.5
        return torch.einsum("bsi,bist->bst", weights_BSI, hits_BISS)

    def _rotated(self, heads: Tensor, rotary: Rotary) -> Tensor:
        rope = 2 * rotary.cos.shape[1]
        return torch.cat((rotate(heads[..., :rope], rotary), heads[..., rope:]), dim=-1)


def choose(scores_BSS: Tensor, top_k: int, initial: int, local: int) -> Tensor:
    """[B, S, K] positions: the first ``initial``, the latest ``local`` and then those of the
    largest score, none later than the query.

    Scores of 0 are frequent, since no head may fire; of equal ones the later position is chosen, so
    that a choice does not depend on the length of the sequence around it. Scores are compared in
    float32. A query with fewer than K positions to see gets later ones too, for the shape's sake;
    ``Selection.seen`` tells them apart.
    """
    position = torch.arange(scores_BSS.shape[1], device=scores_BSS.device)
    distance_SS = position[:, None] - position
    forced_SS = (position < initial) | (distance_SS < local)
    ranked_BSS = scores_BSS.masked_fill(forced_SS, torch.inf).masked_fill(
        distance_SS < 0, -torch.inf
    )
    return _ordered(ranked_BSS).topk(top_k, dim=2).indices


def _ordered(values: Tensor) -> Tensor:
    """int64 numbers in the order of the values along the last axis, all different: equal values by
    their position.
    """
    bits = (values.float() + 0.0).view(torch.int32).long()  # the sum makes -0 a 0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ascending * values.shape[-1] + torch.arange(values.shape[-1], device=values.device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Softmax attention of [B, H, S, d] queries over the chosen of [B, G, S, d] keys: [B, H, S,
    d_v], and the attention [B, H, S, K].
    """
    batch, heads, length, dim = query.shape
    groups, chosen = key.shape[1], selection.indices.shape[2]
    flat_B1n1 = selection.indices.reshape(batch, 1, length * chosen, 1)
    key_BGSKd, value_BGSKd = (
        rows.gather(2, flat_B1n1.expand(-1, groups, -1, rows.shape[3])).view(
            batch, groups, length, chosen, rows.shape[3]
        )
        for rows in (key, value)
    )
    grouped_BGSrd = query.view(batch, groups, heads // groups, length, dim).transpose(2, 3)
    logits_BGSrK = grouped_BGSrd @ key_BGSKd.mT * dim**-0.5
    attention_BGSrK = logits_BGSrK.masked_fill(
        ~selection.seen[:, None, :, None], -torch.inf
    ).softmax(dim=4)
    mixed_BGSrd = attention_BGSrK @ value_BGSKd
    return mixed_BGSrd.transpose(2, 3).flatten(1, 2), attention_BGSrK.transpose(2, 3).flatten(1, 2)


def indexer_loss(selection: Selection, attention_BHSK: Tensor) -> Tensor:
    """[B, S] ``KL(p || softmax(I))`` of each query over the chosen positions, p the heads' mean
    attention (arXiv 2512.02556, eq. 4).
    """
    target_BSK = attention_BHSK.detach().mean(dim=1).to(selection.scores.dtype)
    log_q_BSK = (
        selection.scores.masked_fill(~selection.seen, -torch.inf)
        .log_softmax(dim=2)
        .masked_fill(~selection.seen, 0.0)
    )
    return (torch.special.xlogy(target_BSK, target_BSK) - target_BSK * log_q_BSK).sum(dim=2)
