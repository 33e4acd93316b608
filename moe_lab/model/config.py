"""What a model is made of: ``MoEConfig`` (one layer), ``DecoderConfig`` (the small decoder around
it), and the parts that some
architectures add: ``LatentAttentionConfig``, ``SparseAttentionConfig``, ``NgramConfig``,
``MTPConfig``.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from moe_lab.config import Config, choice, require
from moe_lab.routing import RouterConfig, hash_twin

if TYPE_CHECKING:
    from moe_lab.model.decoder import Decoder
    from moe_lab.model.layer import MoELayer


@dataclass(frozen=True)
class MoEConfig(Config):
    """One Mixture-of-Experts feed-forward layer.

    Attributes:
        d_model: width of the residual stream.
        d_expert: hidden width of one SwiGLU expert.
        router: which experts run, with which weights.
        num_shared_experts: experts that every token runs, fused into one feed-forward of
            ``num_shared_experts * d_expert``.
        d_latent: routed experts work on a projection of the stream to this width (latent experts:
            Nemotron 3, Kimi K3), None on the stream itself; router, zero-compute and shared experts
            see the stream.
        dispatch: a name in ``dispatch.BACKENDS``, or "auto".
    """

    d_model: int = 256
    d_expert: int = 128
    router: RouterConfig = field(default_factory=RouterConfig)
    num_shared_experts: int = 0
    d_latent: int | None = None
    dispatch: str = "auto"

    def __post_init__(self) -> None:
        require(self.d_model >= 1, "d_model of at least 1", self.d_model)
        require(self.d_expert >= 1, "d_expert of at least 1", self.d_expert)
        require(
            self.num_shared_experts >= 0,
            "num_shared_experts of at least 0",
            self.num_shared_experts,
        )
        require(
            self.d_latent is None or self.d_latent >= 1, "d_latent of at least 1", self.d_latent
        )

    @property
    def expert_input_width(self) -> int:
        """Channels that a routed expert reads and writes."""
        return self.d_model if self.d_latent is None else self.d_latent

    def build(self) -> "MoELayer":
        from moe_lab.model.layer import MoELayer

        return MoELayer(self)


class Wiring(StrEnum):
    """How a layer's parts are connected.

    ``PLAIN``: attention, then one feed-forward. ``SHORTCUT``: LongCat-Flash's shortcut-connected
    MoE, two attentions and two dense feed-forwards, with the MoE beside the second half of them.
    ``SEQUENTIAL``: the shortcut's twin, the same parts in which the output of the MoE joins the
    stream at once.
    """

    PLAIN = "plain"
    SHORTCUT = "shortcut"
    SEQUENTIAL = "sequential"


class QKNorm(StrEnum):
    """RMSNorm of queries and keys before the rotation: none, over each head (Qwen3), or over all
    heads together (OLMoE).
    """

    NONE = "none"
    HEAD = "head"
    WIDTH = "width"


class Amplification(StrEnum):
    """What the embedding passes before it enters the stream: nothing, a factor sqrt(d_model), or a
    LayerNorm (arXiv 2601.21204).
    """

    NONE = "none"
    SQRT = "sqrt"
    NORM = "norm"


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

    kv_rank: int
    q_rank: int | None = None
    nope_dim: int = 16
    rope_dim: int = 8
    value_dim: int = 16
    scale_latents: bool = False
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim"):
            require(getattr(self, name) >= 1, f"{name} of at least 1", getattr(self, name))
        require(self.q_rank is None or self.q_rank >= 1, "q_rank of at least 1", self.q_rank)
        require(self.rope_dim % 2 == 0, "an even rope_dim (rotary pairs)", self.rope_dim)
        require(self.norm_eps is None or self.norm_eps > 0, "norm_eps above 0", self.norm_eps)


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

    top_k: int = 32
    num_heads: int = 2
    head_dim: int = 16
    initial: int = 0
    local: int = 1
    share: int = 1
    loss_coef: float = 1.0

    def __post_init__(self) -> None:
        for name in ("top_k", "num_heads", "head_dim", "share"):
            require(getattr(self, name) >= 1, f"{name} of at least 1", getattr(self, name))
        require(
            self.initial >= 0 and self.local >= 0,
            "initial and local of at least 0",
            f"{self.initial} and {self.local}",
        )
        require(
            self.initial + self.local <= self.top_k,
            f"initial + local of at most top_k {self.top_k}",
            self.initial + self.local,
        )
        require(self.loss_coef >= 0, "loss_coef of at least 0", self.loss_coef)


@dataclass(frozen=True)
class NgramConfig(Config):
    """N-gram embedding tables (LongCat-Flash-Lite, arXiv 2601.21204): (max_n - 1) * num_splits
    hashed tables that share d_model channels.

    Attributes:
        max_n: longest n-gram, N; orders 2 to N have tables.
        num_splits: tables per order, K, each with a modulus of its own.
        table_ratio: rows of a table over the vocabulary. Tables near a whole multiple of the
            vocabulary hash many frequent bigrams alike, so the ratio must keep away from whole
            numbers; halves are no good choice either (docs/decoder.md has the measurement).
        layers: where the tables are read, each with tables of its own and a gate that the stream
            controls (Engram, arXiv 2601.07372); none: once, beside the input embedding, as their
            mean.
        document_start: the token id that opens a document; n-grams do not reach before it. None
            takes the vocabulary's last id, as `moe_lab.text` has it.
    """

    max_n: int = 3
    num_splits: int = 2
    table_ratio: float = 4.37
    layers: tuple[int, ...] = ()
    document_start: int | None = None

    def __post_init__(self) -> None:
        require(self.max_n >= 2, "max_n of at least 2", self.max_n)
        require(self.num_splits >= 1, "num_splits of at least 1", self.num_splits)
        require(self.table_ratio > 0, "table_ratio above 0", self.table_ratio)
        distance = abs(self.table_ratio - round(self.table_ratio))
        hint = f"{int(self.table_ratio) + 0.37:.2f}"
        require(
            self.table_ratio < 1 or distance >= 0.05,
            "a table_ratio .05 or more from a whole number",
            self.table_ratio,
            hint,
        )
        require(list(self.layers) == sorted(set(self.layers)), "ascending layers", self.layers)

    @property
    def num_tables(self) -> int:
        """At one place."""
        return (self.max_n - 1) * self.num_splits

    def table_rows(self, vocab_size: int) -> tuple[int, ...]:
        """Rows of each table, by order and then split: ``int(table_ratio * V + 2 i + 1)``, all
        different, as the release has them.
        """
        return tuple(
            int(self.table_ratio * vocab_size + 2 * table + 1) for table in range(self.num_tables)
        )


@dataclass(frozen=True)
class MTPConfig(Config):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 section 2.2) with a dense feed-forward
    in each module, as LongCat-Flash has it.

    Attributes:
        num_modules: depth D; module k predicts the token k places after the next one.
        d_hidden: width of the modules' feed-forward; None takes the decoder's dense width.
        loss_coef: of the mean loss over modules.
    """

    num_modules: int = 1
    d_hidden: int | None = None
    loss_coef: float = 0.3

    def __post_init__(self) -> None:
        require(self.num_modules >= 1, "num_modules of at least 1", self.num_modules)
        require(
            self.d_hidden is None or self.d_hidden >= 1, "d_hidden of at least 1", self.d_hidden
        )
        require(self.loss_coef >= 0, "loss_coef of at least 0", self.loss_coef)


@dataclass(frozen=True)
class DecoderConfig(Config):
    """A decoder with RMSNorm, RoPE, grouped-query attention and SwiGLU, whose feed-forwards are MoE
    layers.

    Attributes:
        vocab_size: token ids ``0..vocab_size-1``.
        context_length: longest sequence (RoPE tables).
        num_heads, num_kv_heads, head_dim: None takes num_heads and ``d_model / num_heads``.
        moe: the MoE layer of each sparse layer; None makes every layer dense.
        num_dense_layers: leading layers with a dense feed-forward.
        d_dense: hidden width of a dense feed-forward; None takes ``d_expert * (top_k +
            num_shared_experts)``, the active width.
        wiring: how a layer's parts are connected.
        num_hash_layers: leading MoE layers in which a table of token ids selects the experts and
            the learned router weighs them (V4).
        qk_norm: of grouped-query attention.
        latent_attention: multi-head latent attention instead of grouped-query attention.
        sparse_attention: attention to the positions that a lightning indexer chooses; None attends
            to all.
        ngram: n-gram embedding tables. mtp: multi-token-prediction modules.
        amplification: of the embedding before it enters the stream.
        hidden_z_loss_coef: of the z-loss on the last hidden states (LongCat-Flash, arXiv 2509.01322
            section 3).
        tie_embeddings: the head is the transposed embedding.
        init_std: standard deviation of every matrix at the start (those that write to the residual
            stream are divided by sqrt(2 L)); None takes ``0.5 / sqrt(d_model)``, which is
            DeepSeek-V3's 0.006 at its width of 7168.
    """

    vocab_size: int = 2048
    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    context_length: int = 256
    moe: MoEConfig | None = None
    num_dense_layers: int = 0
    d_dense: int | None = None
    wiring: Wiring = Wiring.PLAIN
    num_hash_layers: int = 0
    qk_norm: QKNorm = QKNorm.NONE
    latent_attention: LatentAttentionConfig | None = None
    sparse_attention: SparseAttentionConfig | None = None
    ngram: NgramConfig | None = None
    mtp: MTPConfig | None = None
    amplification: Amplification = Amplification.NONE
    hidden_z_loss_coef: float = 0.0
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float | None = None

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            object.__setattr__(self, name, choice(options, getattr(self, name), f"{name} among"))
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "context_length"):
            require(getattr(self, name) >= 1, f"{name} of at least 1", getattr(self, name))
        if self.head_dim is None and self.latent_attention is None:
            require(
                self.d_model % self.num_heads == 0,
                f"d_model divisible by num_heads {self.num_heads}",
                self.d_model,
                "head_dim=",
            )
        require(
            self.rotary_dim % 2 == 0 and self.rotary_dim > 0,
            "an even head_dim (rotary pairs)",
            self.rotary_dim,
        )
        require(
            self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0,
            f"num_kv_heads dividing num_heads {self.num_heads}",
            self.kv_heads,
        )
        require(
            0 <= self.num_dense_layers <= self.num_layers,
            f"num_dense_layers of 0 to {self.num_layers}",
            self.num_dense_layers,
        )
        if self.moe is not None:
            require(
                self.moe.d_model == self.d_model,
                f"moe.d_model equal to d_model {self.d_model}",
                self.moe.d_model,
            )
        elif self.d_dense is None:
            require(False, "d_dense in a decoder without moe", "None")
        require(self.d_dense is None or self.d_dense >= 1, "d_dense of at least 1", self.d_dense)
        require(
            self.hidden_z_loss_coef >= 0,
            "hidden_z_loss_coef of at least 0",
            self.hidden_z_loss_coef,
        )
        for name in ("rope_theta", "norm_eps", "init_std"):
            value = getattr(self, name)
            require(
                value > 0 if value is not None else name == "init_std", f"{name} above 0", value
            )
        self._check_hash_layers()
        self._check_attention()
        self._check_ngram()
        if self.mtp is not None:
            most = self.context_length - 2
            require(
                self.mtp.num_modules <= most,
                f"mtp.num_modules of at most context_length - 2 = {most}",
                self.mtp.num_modules,
            )

    def _check_hash_layers(self) -> None:
        require(
            0 <= self.num_hash_layers <= len(self.moe_layers),
            f"num_hash_layers of 0 to {len(self.moe_layers)}",
            self.num_hash_layers,
        )
        if self.num_hash_layers and self.moe is not None:
            hash_twin(self.moe.router, self.vocab_size)

    def _check_attention(self) -> None:
        if self.latent_attention is not None:
            given = (
                self.num_kv_heads is not None
                or self.head_dim is not None
                or self.qk_norm is not QKNorm.NONE
            )
            require(
                not given,
                "no num_kv_heads, head_dim or qk_norm beside latent_attention",
                "one of them",
            )
        if self.sparse_attention is not None:
            dim = self.sparse_attention.head_dim
            require(
                dim >= self.rotary_dim,
                f"sparse_attention.head_dim of at least the {self.rotary_dim} rotary channels",
                dim,
            )

    def _check_ngram(self) -> None:
        if self.ngram is None:
            return
        tables, layers, start = self.ngram.num_tables, self.ngram.layers, self.ngram.document_start
        require(
            self.d_model % tables == 0,
            f"d_model divisible by the {tables} n-gram tables of a place",
            self.d_model,
        )
        require(
            all(0 <= layer < self.num_layers for layer in layers),
            f"ngram.layers below {self.num_layers}",
            layers,
        )
        require(
            start is None or 0 <= start < self.vocab_size,
            f"ngram.document_start below vocab_size {self.vocab_size}",
            start,
        )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def dim_per_head(self) -> int:
        if self.latent_attention is not None:
            return self.latent_attention.nope_dim + self.latent_attention.rope_dim
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that carry rotary positions."""
        return (
            self.dim_per_head if self.latent_attention is None else self.latent_attention.rope_dim
        )

    @property
    def num_attentions(self) -> int:
        """Attention blocks of all layers, MTP modules left out."""
        return self.num_layers * (1 if self.wiring is Wiring.PLAIN else 2)

    @property
    def initial_std(self) -> float:
        return 0.5 * self.d_model**-0.5 if self.init_std is None else self.init_std

    @property
    def dense_width(self) -> int:
        if self.d_dense is not None:
            return self.d_dense
        assert self.moe is not None
        return self.moe.d_expert * (self.moe.router.top_k + self.moe.num_shared_experts)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose feed-forward is sparse."""
        return () if self.moe is None else tuple(range(self.num_dense_layers, self.num_layers))

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The MoE layer at ``layer``; None where its feed-forward is dense."""
        if self.moe is None or layer < self.num_dense_layers:
            return None
        if layer < self.num_dense_layers + self.num_hash_layers:
            return self.moe.replace(router=hash_twin(self.moe.router, self.vocab_size, seed=layer))
        return self.moe

    def attention_sparsity(self, context: int) -> float:
        """Share of the visible (query, key) pairs of a causal sequence of ``context`` tokens that
        no query attends to; 0 if dense.
        """
        if self.sparse_attention is None:
            return 0.0
        k = min(self.sparse_attention.top_k, context)
        attended = k * (k + 1) / 2 + (context - k) * k
        return 1 - attended / (context * (context + 1) / 2)

    def build(self) -> "Decoder":
        from moe_lab.model.decoder import Decoder

        return Decoder(self)


_CHOICES = {"wiring": Wiring, "qk_norm": QKNorm, "amplification": Amplification}
"""Fields of ``DecoderConfig`` that take one of a few values, which a plain string may name."""
