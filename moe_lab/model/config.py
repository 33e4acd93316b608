"""``MoEConfig`` (one layer) and ``DecoderConfig`` (the small decoder around it), with what they
cost: ``pieces()`` is the sum that ``moe_lab.accounting`` counts. Nothing here imports torch.

The parts that some architectures add have files of their own: ``attention_config.py`` and
``ngram_config.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from moe_lab.config import Config, above, at_least, require
from moe_lab.cost import attention_cost, layer_cost
from moe_lab.cost.parts import (
    ExpertsRun,
    Part,
    Piece,
    Pieces,
    linear,
    norm,
    prefixed,
    times,
    vector,
)
from moe_lab.lazy import load_name
from moe_lab.model.attention_config import LatentAttentionConfig, QKNorm, SparseAttentionConfig
from moe_lab.model.ngram_config import NgramConfig
from moe_lab.routing.choices import ZeroExpertKind
from moe_lab.routing.config import RouterConfig
from moe_lab.routing.hash_twin import hash_twin


class Unstated(int):
    """The default of a width, which a decoder replaces by its own."""


@dataclass(frozen=True)
class MoEConfig(Config):
    """One Mixture-of-Experts feed-forward layer.

    Attributes:
        d_model: width of the residual stream; a decoder gives its own where it is not stated.
        d_expert: hidden width of one SwiGLU expert.
        router: which experts run, with which weights.
        num_shared_experts: experts that every token runs, fused into one feed-forward of
            ``num_shared_experts * d_expert``.
        d_latent: routed experts work on a projection of the stream to this width (latent experts:
            Nemotron 3, Kimi K3), None on the stream itself; router, zero-compute and shared experts
            see the stream.
        dispatch: a name in ``dispatch.BACKENDS``, or "auto".
        swiglu_limit, swiglu_alpha, swiglu_offset: hidden units of routed and shared experts are ``g
            sigmoid(alpha g) (u + offset)`` of gate and up that are cut at the limit
            (``dispatch.bank.Gating``): 7, 1.702 and 1 in gpt-oss, a limit in DeepSeek-V4.
        expert_bias: routed experts add learned biases to gate, up and output (gpt-oss).
    """

    d_model: Annotated[int, at_least(1)] = Unstated(256)
    d_expert: Annotated[int, at_least(1)] = 128
    router: RouterConfig = field(default_factory=RouterConfig)
    num_shared_experts: Annotated[int, at_least(0)] = 0
    d_latent: Annotated[int | None, at_least(1)] = None
    dispatch: str = "auto"
    swiglu_limit: Annotated[float | None, at_least(0)] = None
    swiglu_alpha: float = 1.0
    swiglu_offset: float = 0.0
    expert_bias: bool = False

    def written(self) -> tuple[str, ...]:
        """As ``Config.written``; the fields of a plain SwiGLU without biases are left out, so that
        its configurations keep their hash.
        """
        plain = (self.swiglu_limit, self.swiglu_alpha, self.swiglu_offset) == (None, 1.0, 0.0)
        names = super().written()
        return tuple(
            name
            for name in names
            if not (plain and name.startswith("swiglu_"))
            and (self.expert_bias or name != "expert_bias")
        )

    @property
    def expert_input_width(self) -> int:
        """Channels that a routed expert reads and writes."""
        return self.d_model if self.d_latent is None else self.d_latent

    def build(self) -> Any:
        """The ``MoELayer``."""
        return load_name("moe_lab.model.layer:MoELayer")(self)

    def pieces(self) -> Pieces:
        """Router, real experts and the projections around them, zero-compute experts, shared
        experts.
        """
        d, latent, shared = self.d_model, self.d_latent, self.num_shared_experts * self.d_expert
        width, bias = self.expert_input_width, self.expert_bias
        expert = layer_cost.gated_ffn(Part.ROUTED, width, self.d_expert, bias)
        around: Pieces = ()
        if latent is not None:
            around = (
                linear(Part.OTHER, "latent_down", d, latent),
                norm("latent_norm", latent),
                linear(Part.OTHER, "latent_up", latent, d),
            )
        return (
            *self.router.pieces(d),
            *times(expert, self.router.num_experts, self.router.experts_run),
            *around,
            *self._zero_expert_pieces(),
            *(layer_cost.gated_ffn(Part.SHARED, d, shared) if shared else ()),
        )

    def _zero_expert_pieces(self) -> Pieces:
        """MoE++'s constant experts learn a mixture [2, D] and a vector [D]; the other zero-compute
        experts nothing.
        """
        router, run = self.router, self.router.experts_run
        if not router.num_zero_experts:
            return ()
        left = [max(router.top_k - real, 0) for real in (run.most, run.mean, run.least)]
        idle = Piece(
            Part.ZERO_EXPERT, "idle", copies=router.num_zero_experts, used=ExpertsRun(*left)
        )
        constants = router.zero_kinds.count(ZeroExpertKind.CONSTANT)
        if not constants:
            return (idle,)
        d = self.d_model
        learned = (linear(Part.ROUTER, "mixture", d, 2), vector(Part.ROUTER, "vector", d))
        used = ExpertsRun(*(slots * constants / router.num_zero_experts for slots in left))
        return (idle, *times(learned, constants, used, Part.ZERO_EXPERT))


class Wiring(StrEnum):
    """The connection of a layer's parts.

    ``PLAIN``: attention, then one feed-forward. ``SHORTCUT``: LongCat-Flash's shortcut-connected
    MoE, two attentions and two dense feed-forwards, with the MoE beside the second half of them.
    ``SEQUENTIAL``: the shortcut's twin, the same parts in which the output of the MoE joins the
    stream at once.
    """

    PLAIN = "plain"
    SHORTCUT = "shortcut"
    SEQUENTIAL = "sequential"


class Amplification(StrEnum):
    """The operation on the embedding before it enters the stream: none, a factor sqrt(d_model), or
    a LayerNorm (arXiv 2601.21204).
    """

    NONE = "none"
    SQRT = "sqrt"
    NORM = "norm"


@dataclass(frozen=True)
class MTPConfig(Config):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 section 2.2) with a dense feed-forward
    in each module, as LongCat-Flash has it.

    Attributes:
        num_modules: depth D; module k predicts the token k places after the next one.
        d_hidden: width of the modules' feed-forward; None takes the decoder's dense width.
        loss_coef: of the mean loss over modules.
    """

    num_modules: Annotated[int, at_least(1)] = 1
    d_hidden: Annotated[int | None, at_least(1)] = None
    loss_coef: Annotated[float, at_least(0)] = 0.3


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
            num_shared_experts)``, the active width, and ``4 * d_model`` in a decoder without MoE.
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

    vocab_size: Annotated[int, at_least(1)] = 2048
    num_layers: Annotated[int, at_least(1)] = 4
    d_model: Annotated[int, at_least(1)] = 128
    num_heads: Annotated[int, at_least(1)] = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    context_length: Annotated[int, at_least(1)] = 256
    moe: MoEConfig | None = None
    num_dense_layers: int = 0
    d_dense: Annotated[int | None, at_least(1)] = None
    wiring: Wiring = Wiring.PLAIN
    num_hash_layers: int = 0
    qk_norm: QKNorm = QKNorm.NONE
    latent_attention: LatentAttentionConfig | None = None
    sparse_attention: SparseAttentionConfig | None = None
    ngram: NgramConfig | None = None
    mtp: MTPConfig | None = None
    amplification: Amplification = Amplification.NONE
    hidden_z_loss_coef: Annotated[float, at_least(0)] = 0.0
    tie_embeddings: bool = True
    rope_theta: Annotated[float, above(0)] = 10000.0
    norm_eps: Annotated[float, above(0)] = 1e-6
    init_std: Annotated[float | None, above(0)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None and self.latent_attention is None:
            require(
                self.d_model % self.num_heads == 0,
                f"d_model divisible by num_heads {self.num_heads}",
                self.d_model,
                "head_dim=",
                field="d_model",
            )
        require(
            self.rotary_dim % 2 == 0 and self.rotary_dim > 0,
            "an even head_dim (rotary pairs)",
            self.rotary_dim,
            field="head_dim",
        )
        require(
            self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0,
            f"num_kv_heads dividing num_heads {self.num_heads}",
            self.kv_heads,
            field="num_kv_heads",
        )
        require(
            0 <= self.num_dense_layers <= self.num_layers,
            f"num_dense_layers of 0 to {self.num_layers}",
            self.num_dense_layers,
            field="num_dense_layers",
        )
        if self.moe is not None:
            if isinstance(self.moe.d_model, Unstated):
                object.__setattr__(self, "moe", self.moe.replace(d_model=Unstated(self.d_model)))
            require(
                self.moe.d_model == self.d_model,
                f"moe.d_model equal to d_model {self.d_model}",
                self.moe.d_model,
                field="moe.d_model",
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
                field="mtp.num_modules",
            )

    def _check_hash_layers(self) -> None:
        sparse = 0 if self.moe is None else self.num_layers - self.num_dense_layers
        require(
            0 <= self.num_hash_layers <= sparse,
            f"num_hash_layers of 0 to {sparse}",
            self.num_hash_layers,
            field="num_hash_layers",
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
                field="latent_attention",
            )
        if self.sparse_attention is not None:
            dim = self.sparse_attention.head_dim
            require(
                dim >= self.rotary_dim,
                f"sparse_attention.head_dim of at least the {self.rotary_dim} rotary channels",
                dim,
                field="sparse_attention.head_dim",
            )

    def _check_ngram(self) -> None:
        if self.ngram is None:
            return
        tables, layers, start = self.ngram.num_tables, self.ngram.layers, self.ngram.document_start
        require(
            self.d_model % tables == 0,
            f"d_model divisible by the {tables} n-gram tables of a place",
            self.d_model,
            field="d_model",
        )
        require(
            all(0 <= layer < self.num_layers for layer in layers),
            f"ngram.layers below {self.num_layers}",
            layers,
            field="ngram.layers",
        )
        require(
            start is None or 0 <= start < self.vocab_size,
            f"ngram.document_start below vocab_size {self.vocab_size}",
            start,
            field="ngram.document_start",
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
        if self.moe is None:
            return 4 * self.d_model
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

    def build(self) -> Any:
        """The ``Decoder``."""
        return load_name("moe_lab.model.decoder:Decoder")(self)

    # --------------------------------------------------------------------------------------------
    # what it costs

    def layers_of_pieces(self) -> Iterator[tuple[int | None, Pieces]]:
        """(layer, its pieces) of the whole decoder: None for what stands outside the layers, MTP
        modules after the last layer. Equal layers share one tuple.
        """
        kinds: dict[tuple[object, ...], Pieces] = {}
        yield None, self.outer_pieces()
        for layer in range(self.num_layers):
            key = self._layer_kind(layer)
            if key not in kinds:
                kinds[key] = self._layer_pieces(*key)
            yield layer, kinds[key]
        if self.mtp is not None:
            module = self.mtp_pieces(self.mtp)
            for number in range(self.mtp.num_modules):
                yield self.num_layers + number, module

    def outer_pieces(self) -> Pieces:
        """Embedding and the tables added to it, final norm and head."""
        d, beside = self.d_model, []
        if self.amplification is Amplification.NORM:
            beside.append(norm("embedding_norm", d, bias=True))
        if self.ngram is not None and not self.ngram.layers:
            beside.extend(self.ngram.pieces(self.vocab_size, d))
        return (*layer_cost.embedding_and_head(self.vocab_size, d, self.tie_embeddings), *beside)

    def attention_pieces(self) -> Pieces:
        """One attention block over all positions."""
        if self.latent_attention is not None:
            return self.latent_attention.pieces(self.d_model, self.num_heads)
        heads = (self.num_heads, self.kv_heads, self.dim_per_head)
        return (
            *attention_cost.gqa(self.d_model, *heads),
            *attention_cost.qk_norms(self.qk_norm.value, *heads),
        )

    def mtp_pieces(self, mtp: MTPConfig) -> Pieces:
        """One multi-token-prediction module: one attention over all positions, one dense
        feed-forward.
        """
        d = self.d_model
        hidden = self.dense_width if mtp.d_hidden is None else mtp.d_hidden
        dense = layer_cost.gated_ffn(Part.DENSE, d, hidden)
        return layer_cost.mtp_module(d, (*self.attention_pieces(), *dense, *layer_cost.norms(d, 2)))

    def _layer_kind(self, layer: int) -> tuple[MoEConfig | None, tuple[bool, ...], bool]:
        """What a layer's cost depends on: its MoE, which of its attention blocks have an indexer,
        whether it reads n-gram tables.
        """
        blocks = self.num_attentions // self.num_layers
        share = 1 if self.sparse_attention is None else self.sparse_attention.share
        owners = tuple((blocks * layer + half) % share == 0 for half in range(blocks))
        reads = self.ngram is not None and layer in self.ngram.layers
        hashed = layer < self.num_dense_layers + self.num_hash_layers
        # The seed of a hash table costs nothing: all hash layers are those of the first.
        first = self.num_dense_layers if hashed and layer >= self.num_dense_layers else layer
        return self.moe_of(first), owners, reads

    def _layer_pieces(self, moe: MoEConfig | None, owners: tuple[bool, ...], reads: bool) -> Pieces:
        d, double = self.d_model, self.wiring is not Wiring.PLAIN
        dense = (
            layer_cost.gated_ffn(Part.DENSE, d, self.dense_width) if moe is None or double else ()
        )
        if double:
            dense = (*prefixed("0", dense), *prefixed("1", dense))
        return (
            *(
                piece
                for number, owner in enumerate(owners)
                for piece in prefixed(f"attention.{number}", self._block_pieces(owner))
            ),
            *dense,
            *(() if moe is None else moe.pieces()),
            *layer_cost.norms(d, 4 if double else 2),
            *(self._memory_pieces() if reads else ()),
        )

    def _block_pieces(self, owner: bool) -> Pieces:
        """One attention block; where attention is sparse over the positions that its indexer chose,
        if it has one, or that of a block before.
        """
        pieces, sparse = self.attention_pieces(), self.sparse_attention
        if sparse is None:
            return pieces
        pieces = tuple(attention_cost.sparse(piece, sparse.top_k) for piece in pieces)
        rank = None if self.latent_attention is None else self.latent_attention.q_rank
        indexer = sparse.pieces(self.d_model, self.d_model if rank is None else rank)
        return (*pieces, *(indexer if owner else ()))

    def _memory_pieces(self) -> Pieces:
        assert self.ngram is not None
        tables = self.ngram.pieces(self.vocab_size, self.d_model)
        return (*tables, *self.ngram.gate_pieces(self.d_model))
