"""The result of a reader of another program's records: ``Source``, made of ``Document``s; and
``Sizes``, what is known beforehand.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model, from the caller or a configuration; None where neither has them.

    Attributes:
        num_experts, num_zero_experts, top_k: of each layer.
        layers: numbers of the MoE layers.
        num_layers: all layers, dense ones too: some engines record a row for each.
        visits: the MoE layers in the order of their runs, where some run several times.
        tokens: how many tokens counts were taken over.
        model: which of several models a source holds, and its name in the metadata.
    """

    num_experts: int | None = None
    num_zero_experts: int = 0
    top_k: int | None = None
    layers: tuple[int, ...] | None = None
    num_layers: int | None = None
    visits: tuple[int, ...] = ()
    tokens: int | None = None
    model: str = ""

    def places(self, rows: int) -> list[int] | None:
        """Positions of the MoE layers among ``rows`` layers if dense layers have rows too, else
        None.
        """
        all_layers = rows == self.num_layers or (self.num_layers is None and bool(self.layers))
        if not self.layers or not all_layers or max(self.layers) >= rows:
            return None
        return list(self.layers)


@dataclass(frozen=True)
class Document:
    """Consecutive tokens of one document, in every layer.

    Attributes:
        doc, pos: its number, and the position of the first token.
        ids: [T, L, K] expert ids, -1 where a slot was not used.
        weights: [T, L, K], or None.
        token_ids: [T] or more, or None; those beyond T were not routed.
        columns: name -> [len(token_ids)] ([T] without token_ids) further token columns, the same in
            every document.
        where: file and record, for messages.
    """

    doc: int
    pos: int
    ids: np.ndarray
    weights: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Source:
    """An opened source: its documents, and what it says of itself.

    ``expert_bytes`` of each layer, or nothing; ``has_token_ids`` is False where documents have
    columns and no token ids.
    """

    documents: Iterable[Document]
    num_experts: int | None = None
    top_k: int | None = None
    layers: tuple[int, ...] | None = None
    model: str = ""
    model_hash: str = ""
    tokenizer_hash: str = ""
    corpus_hash: str = ""
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    has_weights: bool = False
    aliases_zero_experts: bool = False
    per_token: bool = True
    has_token_ids: bool = True
    expert_bytes: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
