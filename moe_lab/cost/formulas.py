"""Closed forms: sizes in, pieces out. Nothing here knows a configuration; ``blocks.py`` reads the
sizes and calls these.

Sources: grouped-query attention arXiv 2305.13245; multi-head latent attention arXiv 2405.04434
section 2.1; sparse attention with a lightning indexer arXiv 2512.02556; gated feed-forwards arXiv
2002.05202; Mamba arXiv 2312.00752; Mamba-2 arXiv 2405.21060; gated delta rule arXiv 2412.06464;
Kimi Delta Attention arXiv 2510.26692; lightning attention arXiv 2501.08313. The
multiply-accumulates of a
recurrence are those of its recurrent form: one for each state entry that is written, read or
corrected.
"""

from collections.abc import Sequence
from typing import Literal

from moe_lab.cost.parts import (
    Attend,
    Index,
    Part,
    Piece,
    Pieces,
    Recur,
    conv,
    linear,
    norm,
    prefixed,
    vector,
)

A = Part.ATTENTION


def gated_ffn(part: Part, d: int, width: int, bias: bool = False) -> Pieces:
    """Three matrices: ``(act(x W_gate) * x W_up) W_down``."""
    return (
        linear(part, "gate_proj", d, width, bias),
        linear(part, "up_proj", d, width, bias),
        linear(part, "down_proj", width, d, bias),
    )


def plain_ffn(part: Part, d: int, width: int, bias: bool = False) -> Pieces:
    """Two matrices: ``act(x W_up) W_down``."""
    return (linear(part, "up_proj", d, width, bias), linear(part, "down_proj", width, d, bias))


def qk_norms(kind: Literal["none", "head", "width"], heads: int, kv_heads: int, dim: int) -> Pieces:
    """RMSNorm of queries and keys: over each head, over all heads together, or none."""
    if kind == "none":
        return ()
    return (
        norm("q_norm", dim if kind == "head" else heads * dim),
        norm("k_norm", dim if kind == "head" else kv_heads * dim),
    )


def gqa(
    d: int,
    heads: int,
    kv_heads: int,
    dim: int,
    kernel: Attend | None = None,
    *,
    v_dim: int | None = None,
    bias: bool = False,
    out_bias: bool = False,
    query_width: int = 1,
    values: bool = True,
) -> Pieces:
    """Grouped-query attention: ``d*h*hd + 2*d*kv*hd + h*hd*d`` and biases.

    ``query_width`` 2 is a query projection that also yields an output gate; without ``values`` the
    keys serve as values.
    """
    v = dim if v_dim is None else v_dim
    projections = [
        linear(A, "q_proj", d, heads * dim * query_width, bias),
        linear(A, "k_proj", d, kv_heads * dim, bias),
        *([linear(A, "v_proj", d, kv_heads * v, bias)] if values else []),
        linear(A, "o_proj", heads * v, d, out_bias),
    ]
    return (*projections, scores(kernel or Attend(heads, dim, v)))


def scores(kernel: Attend) -> Piece:
    return Piece(A, "scores", kernel=kernel)


def sparse(piece: Piece, top: int) -> Piece:
    """The same piece; if it is softmax attention, over the ``top`` keys that an indexer selects."""
    return (
        piece._replace(kernel=piece.kernel._replace(top=top))
        if isinstance(piece.kernel, Attend)
        else piece
    )


def mla(
    d: int,
    heads: int,
    rank_q: int | None,
    rank_kv: int,
    nope: int,
    rope: int,
    v: int,
    *,
    bias: bool = False,
    window: int | None = None,
    top: int | None = None,
) -> Pieces:
    """Multi-head latent attention: ``d*rq + rq + rq*h*(nope+rope) + d*(rkv+rope) + rkv +
    rkv*h*(nope+v) + h*v*d``; without q-LoRA the first three are ``d*h*(nope+rope)``.
    """
    query = mla_query(d, heads, rank_q, nope + rope, bias)
    return (
        *query,
        *mla_kv(d, heads, rank_kv, nope, rope, v, bias=bias),
        mla_scores(heads, rank_kv, nope, rope, v, window, top),
    )


def mla_query(d: int, heads: int, rank_q: int | None, qk: int, bias: bool = False) -> Pieces:
    if rank_q is None:
        return (linear(A, "q_proj", d, heads * qk),)
    return (
        linear(A, "q_a_proj", d, rank_q, bias),
        norm("q_a_norm", rank_q),
        linear(A, "q_b_proj", rank_q, heads * qk),
    )


def mla_kv(
    d: int,
    heads: int,
    rank_kv: int,
    nope: int,
    rope: int,
    v: int,
    *,
    bias: bool = False,
    latent: bool = True,
) -> Pieces:
    """Everything after the query; without ``latent`` the layer reads that of an earlier one."""
    down = (
        (linear(A, "kv_a_proj", d, rank_kv + rope, bias), norm("kv_a_norm", rank_kv))
        if latent
        else ()
    )
    return (
        *down,
        linear(A, "kv_b_proj", rank_kv, heads * (nope + v)),
        linear(A, "o_proj", heads * v, d, bias),
    )


def mla_scores(
    heads: int,
    rank_kv: int,
    nope: int,
    rope: int,
    v: int,
    window: int | None = None,
    top: int | None = None,
) -> Piece:
    return scores(
        Attend(heads, nope + rope, v, window=window, top=top, absorbed=(rank_kv + rope, rank_kv))
    )


def indexer(d: int, rank_q: int, heads: int, dim: int, stride: int = 1) -> Pieces:
    """DeepSeek sparse attention: queries from the latent (``rank_q``) or the stream, one key per
    token, one weight per head.
    """
    return (
        linear(A, "indexer.wq_b", rank_q, heads * dim),
        linear(A, "indexer.wk", d, dim),
        norm("indexer.k_norm", dim, bias=True),
        linear(A, "indexer.weights_proj", d, heads),
        Piece(A, "indexer.scores", kernel=Index(heads, dim, stride)),
    )


def mamba1(
    d: int, expand: int, state: int, rank: int, kernel: int, conv_bias: bool, bias: bool
) -> Pieces:
    """Selective state space of Mamba as Jamba uses it: with norms on dt, B and C."""
    inner = expand * d
    return (
        linear(A, "in_proj", d, 2 * inner, bias),
        conv(A, "conv1d", inner, kernel, conv_bias),
        linear(A, "x_proj", inner, rank + 2 * state),
        linear(A, "dt_proj", rank, inner, True),
        vector(A, "A_log", inner * state),
        vector(A, "D", inner),
        linear(A, "out_proj", inner, d, bias),
        norm("dt_norm", rank),
        norm("b_norm", state),
        norm("c_norm", state),
        Piece(A, "recurrence", kernel=Recur(2 * inner * state)),
    )


def mamba2(
    d: int,
    inner: int,
    heads: int,
    groups: int,
    state: int,
    kernel: int,
    conv_bias: bool,
    bias: bool,
) -> Pieces:
    """Mamba-2: one decay per head, B and C shared by the heads of a group."""
    channels = inner + 2 * groups * state
    return (
        linear(A, "in_proj", d, inner + channels + heads, bias),
        conv(A, "conv1d", channels, kernel, conv_bias),
        vector(A, "dt_bias", heads),
        vector(A, "A_log", heads),
        vector(A, "D", heads),
        norm("gated_norm", inner),
        linear(A, "out_proj", inner, d, bias),
        Piece(A, "recurrence", kernel=Recur(2 * inner * state)),
    )


def delta_net(
    d: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, kernel: int
) -> Pieces:
    """Gated DeltaNet of Qwen3-Next: convolved queries, keys and values, an output gate, a write
    strength and a decay per value head.
    """
    keys, values = key_heads * key_dim, value_heads * value_dim
    return (
        linear(A, "in_proj_qkv", d, 2 * keys + values),
        linear(A, "in_proj_z", d, values),
        linear(A, "in_proj_ba", d, 2 * value_heads),
        conv(A, "conv1d", 2 * keys + values, kernel),
        vector(A, "dt_bias", value_heads),
        vector(A, "A_log", value_heads),
        norm("gated_norm", value_dim),
        linear(A, "out_proj", values, d),
        Piece(A, "recurrence", kernel=Recur(3 * value_heads * key_dim * value_dim)),
    )


def kda(
    d: int,
    heads: int,
    dim: int,
    kernel: int,
    *,
    low_rank_decay: bool = True,
    low_rank_gate: bool = True,
) -> Pieces:
    """Kimi Delta Attention: a decay for each channel of each head; decay and output gate through a
    bottleneck of one head, or in full.
    """
    width = heads * dim

    def projection(name: str, low_rank: bool) -> Pieces:
        if low_rank:
            return (linear(A, f"{name}_a_proj", d, dim), linear(A, f"{name}_b_proj", dim, width))
        return (linear(A, f"{name}_proj", d, width),)

    return (
        *(linear(A, f"{name}_proj", d, width) for name in "qkv"),
        conv(A, "conv1d", 3 * width, kernel),
        *projection("decay", low_rank_decay),
        vector(A, "dt_bias", width),
        vector(A, "A_log", heads),
        linear(A, "beta_proj", d, heads),
        *projection("gate", low_rank_gate),
        norm("o_norm", dim),
        linear(A, "o_proj", width, d),
        Piece(A, "recurrence", kernel=Recur(3 * heads * dim * dim)),
    )


def lightning(d: int, heads: int, dim: int) -> Pieces:
    """Lightning attention of MiniMax-01: linear attention with a fixed decay per head, an output
    norm and an output gate.
    """
    width = heads * dim
    return (
        norm("norm", width),
        linear(A, "qkv_proj", d, 3 * width),
        linear(A, "output_gate", d, width),
        linear(A, "out_proj", width, d),
        Piece(A, "recurrence", kernel=Recur(2 * heads * dim * dim)),
    )


def short_conv(d: int, kernel: int, bias: bool) -> Pieces:
    """The gated short convolution of LFM2."""
    return (
        linear(A, "in_proj", d, 3 * d, bias),
        conv(A, "conv", d, kernel, bias),
        linear(A, "out_proj", d, d, bias),
    )


def hyper_connection(streams: int, d: int, outputs: int, scales: int, name: str) -> Pieces:
    """Manifold-constrained hyper-connections (arXiv 2512.24880): ``outputs`` mixing weights read
    from all streams at once.
    """
    return (
        linear(Part.OTHER, f"{name}.fn", streams * d, outputs),
        vector(Part.OTHER, f"{name}.base", outputs),
        vector(Part.OTHER, f"{name}.scale", scales),
    )


def norms(d: int, count: int, bias: bool = False) -> Pieces:
    """``count`` normalisations of the residual stream in a layer."""
    return tuple(norm(f"norm_{index}", d, bias) for index in range(count))


def embedding_and_head(vocab: int, d: int, tied: bool) -> Pieces:
    """Input embedding, final norm and output head; a tied head is the embedding, multiplied."""
    return (
        Piece(Part.EMBEDDING, "embed_tokens", vocab * d),
        norm("norm", d),
        Piece(
            Part.HEAD, "lm_head (tied)" if tied else "lm_head", 0 if tied else vocab * d, vocab * d
        ),
    )


def ngram_tables(rows: Sequence[int], d: int) -> Pieces:
    """Hashed tables of these numbers of rows that share ``d`` channels, each with a projection to
    full width (arXiv 2601.21204, section 3).
    """
    width = d // len(rows)
    tables = (
        Piece(Part.NGRAM_TABLE, f"ngram_table_{table}", size * width)
        for table, size in enumerate(rows)
    )
    projections = (
        linear(Part.NGRAM_PROJECTION, f"ngram_projection_{table}", width, d)
        for table in range(len(rows))
    )
    return (*tables, *projections)


def mtp_module(d: int, block: Pieces) -> Pieces:
    """A multi-token-prediction module around ``block`` (DeepSeek-V3, arXiv 2412.19437, section
    2.2): three norms and a projection from the normed hidden state and the embedding of the next
    token. Embedding and head are the main model's.
    """
    joint = (
        norm("enorm", d),
        norm("hnorm", d),
        linear(Part.OTHER, "eh_proj", 2 * d, d),
        norm("final_norm", d),
    )
    return prefixed("mtp", (*joint, *block), Part.MTP)
