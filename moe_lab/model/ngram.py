"""N-gram embedding: hashed tables of the last n tokens beside the embedding of the last one
(LongCat-Flash-Lite, arXiv 2601.21204).

``e_i = 1 / ((N-1) K + 1) (E_0(t_i) + sum_{n,k} W_{n,k} E_{n,k}[H_{n,k}(t_{i-n+1} .. t_i)])`` with
the polynomial hash ``H_{n,k} = sum_{j<n} t_{i-j} (V_0^j mod V_{n,k}) mod V_{n,k}`` (section 3.1,
and the release's order of reductions). Tokens before the document count as 0.

Shape letters: B sequences, S positions, D model width, M tables at one place, d = D / M their
width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.model.ngram_config import NgramConfig


def ngram_contexts(ids_BS: Tensor, max_n: int, document_start: int) -> Tensor:
    """[max_n, B, S] int64: ids 0, 1, ...

    ``max_n - 1`` places back; 0 before the sequence and before the document's opening id.
    """
    opened_BS = (ids_BS == document_start).cumsum(dim=1)
    back = [ids_BS]
    for distance in range(1, max_n):
        shifted, opened = (
            F.pad(row[:, :-distance], (min(distance, row.shape[1]), 0))
            for row in (ids_BS, opened_BS)
        )
        back.append(torch.where(opened == opened_BS, shifted, 0))
    return torch.stack(back)


def ngram_ids(
    ids_BS: Tensor, vocab_size: int, rows: Sequence[int], num_splits: int, document_start: int
) -> Tensor:
    """[M, B, S] rows of the tables: order 2 for the first ``num_splits`` tables, order 3 for the
    next, and so on.
    """
    back_NBS = ngram_contexts(ids_BS, len(rows) // num_splits + 1, document_start)
    hashed = []
    for table, size in enumerate(rows):
        order = 2 + table // num_splits
        total, power = back_NBS[0] % size, 1
        for distance in range(1, order):
            power = power * vocab_size % size
            total = (total + back_NBS[distance] * power) % size
        hashed.append(total)
    return torch.stack(hashed)


class NgramTables(nn.Module):
    """The M tables of one place and their projections to full width.

    Args:
        sparse: gradients of the tables are sparse tensors of the rows that were read, for
            ``torch.optim.SparseAdam`` or a sharded optimiser; they equal the dense ones.
    """

    def __init__(
        self, config: NgramConfig, vocab_size: int, d_model: int, *, sparse: bool = False
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.rows = config, vocab_size, config.table_rows(vocab_size)
        self.document_start = (
            vocab_size - 1 if config.document_start is None else config.document_start
        )
        width, self.sparse = d_model // config.num_tables, sparse
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(size, width)) for size in self.rows)
        self.projection = nn.Parameter(torch.empty(d_model, d_model))
        for weight in self.parameters():
            nn.init.normal_(weight, std=d_model**-0.5)

    def ids(self, ids_BS: Tensor) -> Tensor:
        """[M, B, S] rows that the tokens read."""
        return ngram_ids(
            ids_BS, self.vocab_size, self.rows, self.config.num_splits, self.document_start
        )

    def forward(self, ids_BS: Tensor) -> Tensor:
        """[B, S, D] sum of the tables' projected rows."""
        ids_MBS = self.ids(ids_BS)
        return self.project(
            [
                F.embedding(rows, table, sparse=self.sparse)
                for table, rows in zip(self.tables, ids_MBS, strict=True)
            ]
        )

    def project(self, rows_BSd: Sequence[Tensor]) -> Tensor:
        """Rows of each table -> [B, S, D].

        The columns of ``projection`` are the tables' matrices W, side by side.
        """
        return F.linear(torch.cat(list(rows_BSd), dim=2), self.projection)


class GatedMemory(nn.Module):
    """Tables read inside the decoder: ``x + sigmoid(<rms(x), rms(W_key e)> / sqrt(D)) * e``
    (Engram's context-aware gate, 2601.07372).

    Engram's tokenizer compression and short convolution are left out.
    """

    def __init__(self, config: NgramConfig, vocab_size: int, d_model: int, eps: float) -> None:
        super().__init__()
        self.tables = NgramTables(config, vocab_size, d_model)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.query_norm = nn.RMSNorm(d_model, eps=eps)
        self.key_norm = nn.RMSNorm(d_model, eps=eps)

    def forward(self, x: Tensor, ids_BS: Tensor) -> Tensor:
        """[B, S, D] stream -> [B, S, D] stream."""
        memory = self.tables(ids_BS)
        match = (self.query_norm(x) * self.key_norm(self.key(memory))).sum(
            dim=2, keepdim=True
        ) * x.shape[2] ** -0.5
        return x + match.sigmoid() * memory
