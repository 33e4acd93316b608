"""The cost of linear attention and state spaces in closed form: sizes in, pieces out.

Mamba arXiv 2312.00752; Mamba-2 arXiv 2405.21060; gated delta rule arXiv 2412.06464; Kimi Delta
Attention arXiv 2510.26692; lightning attention arXiv 2501.08313. The multiply-accumulates of a
recurrence are those of its recurrent form: one for each state entry that is written, read or
corrected. Decoding keeps the state, and the last inputs of a convolution.
"""

from moe_lab.cost.parts import Part, Piece, Pieces, Recur, conv, linear, norm, vector

A = Part.ATTENTION


def _recurrence(macs: int, state: int) -> Piece:
    """``macs`` multiply-accumulates for each of ``state`` entries."""
    return Piece(A, "recurrence", kernel=Recur(macs * state), state=state)


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
        _recurrence(2, inner * state),
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
        _recurrence(2, inner * state),
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
        _recurrence(3, value_heads * key_dim * value_dim),
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
        _recurrence(3, heads * dim * dim),
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
        _recurrence(2, heads * dim * dim),
    )


def short_conv(d: int, kernel: int, bias: bool) -> Pieces:
    """The gated short convolution of LFM2."""
    return (
        linear(A, "in_proj", d, 3 * d, bias),
        conv(A, "conv", d, kernel, bias),
        linear(A, "out_proj", d, d, bias),
    )
