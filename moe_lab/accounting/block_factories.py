"""From fields to pieces: blocks that several architectures share, each a small factory of functions
``Fields -> Pieces``.

A block sees the configuration of one layer. Its factory's arguments say which field carries which
size, so that a row of ``families`` is a list of blocks. Blocks of a single architecture stand
beside its row.
"""

from collections.abc import Callable, Mapping

from moe_lab.cost import attention_cost, layer_cost, recurrence_cost
from moe_lab.cost.parts import Attend, ExpertsRun, Part, Piece, Pieces, linear, norm, times, vector
from moe_lab.errors import require
from moe_lab.hf import architectures
from moe_lab.hf.fields import Fields

Block = Callable[[Fields], Pieces]


def width(f: Fields) -> int:
    return f.size("hidden_size")


def flag(f: Fields, field: str | bool) -> bool:
    """A block argument that is either fixed or the name of a boolean field."""
    return f.flag(field) if isinstance(field, str) else field


def head_dim(f: Fields, heads: int) -> int:
    """``head_dim``, or ``hidden_size / num_attention_heads`` where neither the configuration nor
    the architecture has one.
    """
    if f.find("head_dim") is not None or "head_dim" in f.defaults:
        return f.size("head_dim")
    d = width(f)
    require(
        not (d % heads),
        f"hidden_size divisible by num_attention_heads = {heads} where head_dim is absent",
        f"hidden_size = {d}",
        "head_dim=",
    )
    f.assume("head_dim", d // heads, "hidden_size / num_attention_heads")
    return d // heads


def heads_of(f: Fields) -> tuple[int, int, int]:
    """(query heads, key-value heads, channels of a head)."""
    heads, kv = f.size("num_attention_heads"), f.size("num_key_value_heads")
    require(
        not (heads % kv),
        f"num_attention_heads divisible by num_key_value_heads = {kv}",
        f"num_attention_heads = {heads}",
    )
    return heads, kv, head_dim(f, heads)


def layer_type(f: Fields) -> str:
    """This layer's entry of ``layer_types``, under today's names."""
    kind = str(f.mark(_layer_types))
    return _TYPE_NAMES.get(kind, kind)


def _layer_types(f: Fields) -> list[str]:
    return f.per_layer("layer_types")


_TYPE_NAMES = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "hybrid_sliding": "sliding_attention",
    "hybrid": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}


def window(f: Fields) -> int | None:
    """The sliding window of this layer: on layers of that type where there are types, else
    everywhere the field is set.
    """
    size = f.size_or("sliding_window", 0)
    if not size or not f.truth("use_sliding_window", True):
        return None
    if f.find("layer_types") is None and "layer_types" not in f.defaults:
        return size
    return size if layer_type(f) == "sliding_attention" else None


# --------------------------------------------------------------------------------------------------
# mixers


def gqa(
    *,
    bias: str | bool = False,
    out_bias: str | bool | None = None,
    norms: str = "none",
    query_width: int = 1,
    extra: tuple[Block, ...] = (),
    window: Callable[[Fields], int | None] = window,
) -> Block:
    """Grouped-query attention.

    ``out_bias`` None follows ``bias``; ``norms`` is "none", "head", "width" or a boolean field's
    name.
    """

    def block(f: Fields) -> Pieces:
        heads, kv, dim = heads_of(f)
        kind = (
            norms if norms in ("none", "head", "width") else ("head" if f.flag(norms) else "none")
        )
        kernel = Attend(heads, dim, dim, window=window(f))
        pieces = attention_cost.gqa(
            width(f),
            heads,
            kv,
            dim,
            kernel,
            bias=flag(f, bias),
            out_bias=flag(f, bias if out_bias is None else out_bias),
            query_width=query_width,
        )
        return (*pieces, *attention_cost.qk_norms(kind, heads, kv, dim), *join(f, extra))  # type: ignore[arg-type]

    return block


def mla(
    *,
    bias: str | bool = "attention_bias",
    index: Block | None = None,
    extra: tuple[Block, ...] = (),
) -> Block:
    """Multi-head latent attention; with ``index`` it attends to the ``index_topk`` tokens that the
    indexer selects.
    """

    def block(f: Fields) -> Pieces:
        top = (
            f.size("index_topk")
            if index is not None and layer_type(f) == "indexed_attention"
            else None
        )
        rank_q = f.nullable("q_lora_rank")
        pieces = attention_cost.mla(
            width(f),
            f.size("num_attention_heads"),
            None if rank_q is None else f.check_size("q_lora_rank", rank_q),
            f.size("kv_lora_rank"),
            f.size("qk_nope_head_dim", 0),
            f.size("qk_rope_head_dim", 0),
            f.size("v_head_dim"),
            bias=flag(f, bias),
            window=window(f),
            top=top,
        )
        return (
            *pieces,
            *(index(f) if index is not None and top is not None else ()),
            *join(f, extra),
        )

    return block


def indexer(f: Fields) -> Pieces:
    """The lightning indexer of this layer, unless it shares an earlier layer's selection."""
    if shares_selection(f):
        return ()
    return attention_cost.indexer(
        width(f), f.size("q_lora_rank"), f.size("index_n_heads"), f.size("index_head_dim")
    )


def shares_selection(f: Fields) -> bool:
    """Whether this layer uses the tokens that an earlier layer selected."""
    return "indexer_types" in f.defaults and f.mark(_indexer_types) == "shared"


def _indexer_types(f: Fields) -> list[str]:
    return f.per_layer("indexer_types")


def delta_net(f: Fields) -> Pieces:
    return recurrence_cost.delta_net(
        width(f),
        f.size("linear_num_key_heads"),
        f.size("linear_num_value_heads"),
        f.size("linear_key_head_dim"),
        f.size("linear_value_head_dim"),
        f.size("linear_conv_kernel_dim"),
    )


def by_type(kinds: Mapping[str, Block]) -> Block:
    """The block of this layer's entry in ``layer_types``."""

    def block(f: Fields) -> Pieces:
        kind = layer_type(f)
        require(
            kind in kinds,
            f"layer_types of {', '.join(sorted(kinds))} in the {f.family} configuration",
            repr(kind),
        )
        return kinds[kind](f)

    return block


def gate(per: str) -> Block:
    """An output gate of attention: one value for each "head", or for each channel ("width")."""

    def block(f: Fields) -> Pieces:
        heads = f.size("num_attention_heads")
        size = heads if per == "head" else heads * head_dim(f, heads)
        return (linear(Part.ATTENTION, "gate_proj", width(f), size),)

    return block


def sinks(f: Fields) -> Pieces:
    """One learned attention sink per head."""
    return (vector(Part.ATTENTION, "sinks", f.size("num_attention_heads")),)


# --------------------------------------------------------------------------------------------------
# feed-forward


def dense(size: str = "intermediate_size", bias: str | bool = False) -> Block:
    return lambda f: layer_cost.gated_ffn(Part.DENSE, width(f), f.size(size), flag(f, bias))


def shared(
    size: str = "moe_intermediate_size",
    *,
    counted: bool = True,
    gated: bool = True,
    bias: str | bool = False,
    even_none: bool = False,
) -> Block:
    """Shared experts fused into one feed-forward of ``n_shared_experts * size`` (``counted``) or of
    ``size`` channels.

    ``even_none``: transformers builds it for no shared expert too, so that its output bias remains.
    """
    make = layer_cost.gated_ffn if gated else layer_cost.plain_ffn

    def block(f: Fields) -> Pieces:
        if not counted:
            channels = f.size(size, 0)
        else:
            copies = f.nullable("n_shared_experts")
            if copies is None:
                return ()
            channels = f.size(size) * f.check_size(
                "n_shared_experts", f.entry("n_shared_experts", copies), 0
            )
        return make(Part.SHARED, width(f), channels, flag(f, bias)) if channels or even_none else ()

    return block


def shared_gate(f: Fields) -> Pieces:
    """The sigmoid that scales the shared expert of Qwen."""
    return (linear(Part.SHARED, "gate", width(f), 1),)


def used(f: Fields) -> tuple[int, ExpertsRun]:
    """(experts, how many a token runs). Raises where top-k exceeds the experts."""
    experts, k = architectures.experts_and_slots(f)
    return experts, ExpertsRun(k, k, k)


def moe(
    size: str = "moe_intermediate_size",
    *,
    extra: tuple[Block, ...] = (),
    gated: bool = True,
    bias: bool = False,
    router_bias: bool = False,
    score_bias: bool = False,
    d_in: Callable[[Fields], int] = width,
) -> Block:
    """Router and routed experts.

    ``score_bias``: the selection bias is stored as a parameter; ``d_in``: the experts' input width.
    """
    make = layer_cost.gated_ffn if gated else layer_cost.plain_ffn

    def block(f: Fields) -> Pieces:
        experts, run = used(f)
        router = (linear(Part.ROUTER, "router", width(f), experts, router_bias),)
        selection = (vector(Part.ROUTER, "score_bias", experts),) if score_bias else ()
        routed = times(make(Part.ROUTED, d_in(f), f.size(size), bias), experts, run)
        return (*router, *selection, *routed, *join(f, extra))

    return block


def choose(sparse: Block, otherwise: Block) -> Block:
    """``sparse`` in the layers with routed experts (``moe_lab.hf``), else ``otherwise``."""
    return lambda f: (sparse if f.mark(architectures.sparse) else otherwise)(f)


# --------------------------------------------------------------------------------------------------
# rest


def join(f: Fields, blocks: tuple[Block, ...]) -> Pieces:
    return tuple(piece for block in blocks for piece in block(f))


def norms(count: int = 2, bias: bool = False) -> Block:
    """``count`` normalisations of the residual stream's width in each layer."""
    return lambda f: tuple(norm(f"norm_{index}", width(f), bias) for index in range(count))


def top(
    *,
    head_bias: str | bool = False,
    final_norm: bool = True,
    norm_bias: bool = False,
    extra: tuple[Block, ...] = (),
    head: bool = True,
    may_tie: bool = True,
    head_rows: str | None = None,
) -> Block:
    """Input embedding, final norm and output head; a tied head is the embedding multiplied.

    ``may_tie`` False: the published implementation never ties the two, whatever
    ``tie_word_embeddings`` says. ``head_rows``: the field with the rows of an untied head that
    belong to tokens; a checkpoint fills up to ``vocab_size`` with rows that no token reads.
    """

    def block(f: Fields) -> Pieces:
        vocab, d = f.size("vocab_size"), width(f)
        pieces = [Piece(Part.EMBEDDING, "embed_tokens", vocab * d)]
        if final_norm:
            pieces.append(norm("norm", d, norm_bias))
        if head:
            tied = may_tie and f.flag("tie_word_embeddings")
            if not may_tie and f.truth("tie_word_embeddings"):
                f.note(
                    "tie_word_embeddings",
                    f"embedding and head are two matrices (transformers never ties them in "
                    f"{f.family})",
                )
            rows = f.size(head_rows, most=vocab) if head_rows else vocab
            pieces.append(
                Piece(
                    Part.HEAD,
                    "lm_head (tied)" if tied else "lm_head",
                    0 if tied else rows * d,
                    rows * d,
                    phantom=(vocab - rows) * d,
                )
            )
            if flag(f, head_bias):
                pieces.append(vector(Part.OTHER, "lm_head.bias", vocab))
        return (*pieces, *join(f, extra))

    return block
