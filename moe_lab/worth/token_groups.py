"""``TokenGroups``: predicted tokens by class or domain, and sums over them by document."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.errors import AnalysisError, require
from moe_lab.worth.batches import Batch, Document

Classes: TypeAlias = Mapping[str, Sequence[Sequence[str | None] | np.ndarray | pl.Series]]
"""Column -> for each document [n] the class of each of its tokens; None: in no class."""


class TokenGroups:
    """All tokens, then the classes of each column.

    Args:
        documents: [n] token ids each.
        classes: as ``Classes``; a domain is one class for all tokens of a document.
        align: a loss counts for the class of the token that is predicted ("target"), or of the
            token at whose place it is predicted, which the routers see ("input").

    Attributes:
        names: (column, class) of each group; the first is (None, None), all tokens.

    Raises:
        AnalysisError: a column without one class for each token.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        classes: Classes | None = None,
        align: Align = Align.TARGET,
    ) -> None:
        self.classes, self.align = classes or {}, Align(align)
        part = slice(1, None) if self.align is Align.TARGET else slice(None, -1)
        self.names: list[tuple[str | None, str | None]] = [(None, None)]
        lengths = [len(ids) for ids in documents]
        self._codes: list[list[NDArray[np.int64]]] = [[] for _ in documents]
        for column, labels in self.classes.items():
            given = [pl.Series(values, dtype=pl.String, strict=False) for values in labels]
            require(
                [len(values) for values in given] == lengths,
                f"a class of {column!r} for each token of each document",
                "other lengths",
                error=AnalysisError,
                field="classes",
            )
            values = pl.concat([pl.Series(dtype=pl.String), *given]).drop_nulls().unique().sort()
            code = {value: len(self.names) + place for place, value in enumerate(values)}
            self.names += [(column, value) for value in values]
            for codes, series in zip(self._codes, given, strict=True):
                codes.append(np.array([code.get(value, -1) for value in series[part]], np.int64))

    @property
    def labels(self) -> pl.DataFrame:
        """[by, class] of each group."""
        schema = {"by": pl.String, "class": pl.String}
        return pl.DataFrame(self.names, schema=schema, orient="row")

    def codes(self, documents: Sequence[Document]) -> list[NDArray[np.int64]]:
        """For each column [N] the place in ``names`` of the class of each token predicted in these
        documents or windows, one after the other; -1: in no class.
        """
        return [
            np.concatenate(
                [
                    self._codes[item.number][column][item.start : item.start + len(item.ids) - 1]
                    for item in documents
                ]
            )
            for column in range(len(self.classes))
        ]

    def places(self, batch: Batch, group: int) -> Tensor:
        """[B, S] where a token is predicted that counts for a group."""
        named_BS = torch.zeros_like(batch.predicts)
        inside = np.any([codes == group for codes in self.codes(batch.documents)], axis=0)
        named_BS[batch.predicts] = torch.from_numpy(inside)
        return named_BS

    def matrix(self, documents: Sequence[Document]) -> csr_array:
        """[documents x groups, N]: a column for each predicted token of these documents or windows,
        1 in the rows of its groups.
        """
        lengths = [len(document.ids) - 1 for document in documents]
        row, places = np.repeat(np.arange(len(documents)), lengths), np.arange(sum(lengths))
        rows, columns = [row * len(self.names)], [places]
        for codes in self.codes(documents):
            known = codes >= 0
            rows.append((row * len(self.names) + codes)[known])
            columns.append(places[known])
        where = np.concatenate(rows), np.concatenate(columns)
        shape = (len(documents) * len(self.names), len(places))
        return csr_array((np.ones(len(where[0])), where), shape=shape)

    def frame(self, sums: Floats, names: Sequence[str]) -> pl.DataFrame:
        """[set, by, class, doc, *names] from sums [sets, documents, groups, len(names)], the first
        of which are tokens; without the rows of no token.
        """
        sets, docs, places = np.nonzero(sums[..., 0])
        values = sums[sets, docs, places]
        return self.labels[places].with_columns(
            pl.Series("set", sets),
            pl.Series("doc", docs),
            *(pl.Series(name, values[:, place]) for place, name in enumerate(names)),
        )
