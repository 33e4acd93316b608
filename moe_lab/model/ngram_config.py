"""``NgramConfig``: n-gram embedding tables and what they cost. The module is in ``ngram.py``."""

from dataclasses import dataclass
from typing import Annotated

from moe_lab.config import Config, above, at_least, require
from moe_lab.cost import layer_cost
from moe_lab.cost.parts import Part, Pieces, linear, norm


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

    max_n: Annotated[int, at_least(2)] = 3
    num_splits: Annotated[int, at_least(1)] = 2
    table_ratio: Annotated[float, above(0)] = 4.37
    layers: tuple[int, ...] = ()
    document_start: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.table_ratio < 1 or abs(self.table_ratio - round(self.table_ratio)) >= 0.05,
            "a table_ratio .05 or more from a whole number",
            self.table_ratio,
            f"{int(self.table_ratio) + 0.37:.2f}",
            field="table_ratio",
        )
        ascending = list(self.layers) == sorted(set(self.layers))
        require(ascending, "ascending layers", self.layers, field="layers")

    @property
    def num_tables(self) -> int:
        """Number of tables in one position of the decoder."""
        return (self.max_n - 1) * self.num_splits

    def table_rows(self, vocab_size: int) -> tuple[int, ...]:
        """Rows of each table, by order and then split: ``int(table_ratio * V + 2 i + 1)``, all
        different, as the release has them.
        """
        return tuple(
            int(self.table_ratio * vocab_size + 2 * table + 1) for table in range(self.num_tables)
        )

    def pieces(self, vocab_size: int, d_model: int) -> Pieces:
        """The tables of one place and their projections."""
        return layer_cost.ngram_tables(self.table_rows(vocab_size), d_model)

    def gate_pieces(self, d_model: int) -> Pieces:
        """The pieces that read the tables inside the decoder: a key projection and two norms."""
        return (
            linear(Part.NGRAM_PROJECTION, "ngram_key", d_model, d_model),
            norm("ngram_query_norm", d_model),
            norm("ngram_key_norm", d_model),
        )
