"""The cost of the other parts of a decoder in closed form: feed-forwards (arXiv 2002.05202), norms,
embedding and head, n-gram tables, multi-token prediction, hyper-connections.
"""

from collections.abc import Sequence

from moe_lab.cost.parts import Part, Piece, Pieces, linear, norm, prefixed, vector


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
    """Input embedding, final norm and output head; a tied head multiplies by the embedding's
    matrix.
    """
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
