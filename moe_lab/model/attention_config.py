"""What a decoder's attention is made of, and what each part costs: ``LatentAttentionConfig``,
``SparseAttentionConfig``, ``QKNorm``. The modules are in ``attention.py`` and
``sparse_attention.py``.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from moe_lab.config import Config, above, at_least, require
from moe_lab.cost import attention_cost
from moe_lab.cost.parts import Pieces


class QKNorm(StrEnum):
    """RMSNorm of queries and keys before the rotation: none, over each head (Qwen3), or over all
    heads together (OLMoE).
    """

    NONE = "none"
    HEAD = "head"
    WIDTH = "width"


@dataclass(frozen=True)
class LatentAttentionConfig(Config):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).

    Attributes:
        q_rank, kv_rank: widths of the query and key-value latents; q_rank None projects queries
            from the stream.
        nope_dim, rope_dim, value_dim: channels of a head without and with rotary positions, and of
            a value.
        scale_latents: multiply queries by sqrt(d_model / q_rank) and the key-value latent by
            sqrt(d_model / kv_rank) (LongCat-Flash's variance alignment, arXiv 2509.01322).
        norm_eps: of the latents' norms; None takes the decoder's. The releases have 1e-6 here
            whatever the model has (LongCat-Flash: 1e-5).
    """

    kv_rank: Annotated[int, at_least(1)]
    q_rank: Annotated[int | None, at_least(1)] = None
    nope_dim: Annotated[int, at_least(1)] = 16
    rope_dim: Annotated[int, at_least(1)] = 8
    value_dim: Annotated[int, at_least(1)] = 16
    scale_latents: bool = False
    norm_eps: Annotated[float | None, above(0)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.rope_dim % 2 == 0,
            "an even rope_dim (rotary pairs)",
            self.rope_dim,
            field="rope_dim",
        )

    def pieces(self, d_model: int, num_heads: int) -> Pieces:
        """One attention block over all positions (``cost.attention_cost.mla``)."""
        sizes = (self.q_rank, self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim)
        return attention_cost.mla(d_model, num_heads, *sizes)


@dataclass(frozen=True)
class SparseAttentionConfig(Config):
    """A lightning indexer chooses the positions that each query attends to (DeepSeek-V3.2, arXiv
    2512.02556; LongCat-2.0's LSA).

    Attributes:
        top_k: positions per query, the forced ones included; as many as there are where the query
            sees fewer.
        num_heads, head_dim: of the indexer.
        initial, local: the first and the latest positions, which are always chosen (the query's own
            is the last of the local ones).
        share: attention blocks in a row that use one selection, which the first of them makes.
        loss_coef: of the indexer's loss, KL from the heads' mean attention over the chosen
            positions; nothing else trains the indexer.
    """

    top_k: Annotated[int, at_least(1)] = 32
    num_heads: Annotated[int, at_least(1)] = 2
    head_dim: Annotated[int, at_least(1)] = 16
    initial: Annotated[int, at_least(0)] = 0
    local: Annotated[int, at_least(0)] = 1
    share: Annotated[int, at_least(1)] = 1
    loss_coef: Annotated[float, at_least(0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.initial + self.local <= self.top_k,
            f"initial + local of at most top_k {self.top_k}",
            self.initial + self.local,
            field="top_k",
        )

    def pieces(self, d_model: int, query_width: int) -> Pieces:
        """One lightning indexer, whose queries are made of ``query_width`` channels."""
        return attention_cost.indexer(d_model, query_width, self.num_heads, self.head_dim)
