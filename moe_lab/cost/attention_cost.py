"""The cost of attention in closed form: sizes in, pieces out.

Grouped-query attention arXiv 2305.13245; multi-head latent attention arXiv 2405.04434 section 2.1;
sparse attention with a lightning indexer arXiv 2512.02556. The work of the scores depends on the
context: a piece has it as its ``kernel``, which ``accounting.flop_count`` evaluates.
"""

from typing import Literal

from moe_lab.cost.parts import Attend, Index, Part, Piece, Pieces, linear, norm

A = Part.ATTENTION


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
    keys serve as values. Decoding keeps ``kv*(hd+v)`` numbers for each key.
    """
    v = dim if v_dim is None else v_dim
    projections = [
        linear(A, "q_proj", d, heads * dim * query_width, bias),
        linear(A, "k_proj", d, kv_heads * dim, bias),
        *([linear(A, "v_proj", d, kv_heads * v, bias)] if values else []),
        linear(A, "o_proj", heads * v, d, out_bias),
    ]
    kernel = kernel or Attend(heads, dim, v)
    kept = kernel._replace(cached=kv_heads * (dim + v)) if kernel.causal else kernel
    return (*projections, scores(kept))


def scores(kernel: Attend) -> Piece:
    return Piece(A, "scores", kernel=kernel)


def sparse(piece: Piece, top: int) -> Piece:
    """Softmax attention over the ``top`` keys that an indexer selects; other pieces are returned
    unchanged.
    """
    return (
        piece._replace(kernel=piece.kernel._replace(top=top))
        if isinstance(piece.kernel, Attend)
        else piece
    )


def borrowed(pieces: Pieces) -> Pieces:
    """Grouped-query attention that reads the keys and values of an earlier layer."""
    own = (piece for piece in pieces if piece.name not in ("k_proj", "v_proj"))
    return tuple(
        piece._replace(kernel=piece.kernel._replace(cached=0))
        if isinstance(piece.kernel, Attend)
        else piece
        for piece in own
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
    """Keys, values and output of latent attention; without ``latent`` the layer reads the latent of
    an earlier layer.
    """
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
    *,
    latent: bool = True,
) -> Piece:
    """Decoding keeps the latent and the rotary key of each position (``rkv + rope`` numbers);
    without ``latent`` the layer reads those of an earlier one.
    """
    wide = rank_kv + rope
    absorbed, cached = (wide, rank_kv), wide if latent else 0
    return scores(
        Attend(heads, nope + rope, v, window=window, top=top, absorbed=absorbed, cached=cached)
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
        Piece(A, "indexer.scores", kernel=Index(heads, dim, stride, cached=dim)),
    )
