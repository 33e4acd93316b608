"""``Part`` and ``Piece``: a model as a flat list of typed pieces, each a matrix, a vector or a
computation without weights.

Everything that accounting reports is a sum over pieces: parameters are ``size * copies``, the
active ones count the copies that a token runs, and the work of a token is two floating point
operations for each multiply-accumulate plus what its ``Kernel`` costs.
"""

from enum import StrEnum
from typing import NamedTuple


class Part(StrEnum):
    """The part of a model that a piece belongs to. Tables of costs have a column or a row for each.

    ``HEAD`` is the output matrix without its bias. ``NORM`` holds every normalisation weight,
    inside attention too. ``NGRAM_TABLE`` holds the lookup tables beside the input embedding (n-gram
    and per-layer embeddings). ``OTHER`` holds hyper-connections, residual scales, latent
    projections around the experts, output biases.
    """

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"
    ROUTER = "router"
    ROUTED = "routed"
    SHARED = "shared"
    DENSE = "dense"
    ZERO_EXPERT = "zero_expert"
    NGRAM_TABLE = "ngram_table"
    NGRAM_PROJECTION = "ngram_projection"
    NORM = "norm"
    OTHER = "other"
    MTP = "mtp"


LOOKUP = frozenset({Part.EMBEDDING, Part.NGRAM_TABLE})
"""Parts that are read row by row and never multiplied."""


class ExpertsRun(NamedTuple):
    """The number of copies (experts) that a token runs."""

    least: float
    mean: float
    most: float


class Attend(NamedTuple):
    """Softmax attention of one query: scores over ``qk`` channels and a mix of values of ``v``
    channels, in each of ``heads`` heads.

    Attributes:
        window: only the last ``window`` positions are visible.
        chunk: only positions of the same aligned chunk are visible.
        stride: keys are summaries of ``stride`` positions; unfinished ones are not visible.
        top: of the visible keys, at most this many are attended to (chosen by an ``Index``).
        absorbed: (qk, v) in decoding, where MLA multiplies the key and value up-projections into
            query and output.
        causal: False for encoders and cross-attention.
        cached: numbers that decoding keeps for each key; 0 where the layer reads the keys of an
            earlier one, and in encoders.
    """

    heads: int
    qk: int
    v: int
    window: int | None = None
    chunk: int | None = None
    stride: int = 1
    top: int | None = None
    absorbed: tuple[int, int] | None = None
    causal: bool = True
    cached: int = 0


class Index(NamedTuple):
    """The lightning indexer of sparse attention (arXiv 2512.02556): every visible key is scored in
    ``heads`` heads of ``dim`` channels. ``cached`` are the numbers that decoding keeps for each.
    """

    heads: int
    dim: int
    stride: int = 1
    cached: int = 0


class Recur(NamedTuple):
    """A linear-attention or state-space recurrence: ``macs`` multiply-accumulates per token,
    whatever the context.
    """

    macs: int


Kernel = Attend | Index | Recur


class Piece(NamedTuple):
    """One matrix, vector or computation.

    Attributes:
        size: parameters of one copy.
        macs: multiply-accumulates that one copy does per token, without its ``kernel``.
        copies: how many are stored (experts); 1 for everything else.
        used: how many of the copies a token runs; None means all.
        phantom: rows that a known implementation allocates beside these and no token ever reads.
        kernel: work that depends on the context.
        state: numbers that decoding keeps for each sequence, whatever its length (a recurrence, the
            last inputs of a convolution).
        passes: how often a token goes through it (layers of a looped model run several times): it
            is stored and active once, and its work is done ``passes`` times.
        decode_only: a token of a prompt does not go through it, though what is generated does (the
            decoder of a causal encoder-decoder).
    """

    part: Part
    name: str
    size: int = 0
    macs: int = 0
    copies: int = 1
    used: ExpertsRun | None = None
    phantom: int = 0
    kernel: Kernel | None = None
    passes: int = 1
    decode_only: bool = False
    state: int = 0

    @property
    def params(self) -> int:
        return self.size * self.copies

    def active(self, at: str = "mean") -> float:
        """Parameters that a token runs: ``at`` is "least", "mean" or "most"."""
        return self.size * (self.copies if self.used is None else getattr(self.used, at))


Pieces = tuple[Piece, ...]


def linear(part: Part, name: str, d_in: int, d_out: int, bias: bool = False) -> Piece:
    """A matrix [d_out, d_in] and its bias."""
    return Piece(part, name, d_in * d_out + (d_out if bias else 0), d_in * d_out)


def vector(part: Part, name: str, size: int) -> Piece:
    """Weights that scale or shift and multiply no matrix."""
    return Piece(part, name, size)


def norm(name: str, size: int, bias: bool = False) -> Piece:
    return Piece(Part.NORM, name, 2 * size if bias else size)


def conv(part: Part, name: str, channels: int, kernel: int, bias: bool = False) -> Piece:
    """A depthwise convolution over time."""
    size, macs = channels * (kernel + bias), channels * kernel
    return Piece(part, name, size, macs, state=channels * (kernel - 1))


def times(pieces: Pieces, copies: int, used: ExpertsRun, part: Part = Part.ROUTED) -> Pieces:
    """The pieces of one expert, stored ``copies`` times of which a token runs ``used``."""
    return tuple(piece._replace(part=part, copies=copies, used=used) for piece in pieces)


def prefixed(prefix: str, pieces: Pieces, part: Part | None = None) -> Pieces:
    """The pieces with ``prefix.`` before their names, assigned to ``part`` if it is given."""
    return tuple(
        piece._replace(name=f"{prefix}.{piece.name}", part=part or piece.part) for piece in pieces
    )
