"""The document and the position of each token of a forward pass: padding, batches, prefill and
decode.

Each row of a batch is a document, unless the caller numbers them; a pass that continues a cache
continues the documents of the pass before. Shape letters: B batch, S sequence, T = B * S tokens.
"""

from dataclasses import dataclass, field

import numpy as np

from moe_lab.errors import TraceError, require
from moe_lab.trace.capturing.model_inputs import Inputs


@dataclass
class Rows:
    """The documents that the rows of the last pass belong to, and how far they are: [B] each."""

    doc: np.ndarray
    next_pos: np.ndarray
    finished: np.ndarray
    fed: int
    ids: np.ndarray | None = None


@dataclass
class Labels:
    """[T] doc and pos, [T] bool of the tokens that count (None: all), the phase, and whether the
    rows go on from the last pass.
    """

    doc: np.ndarray
    pos: np.ndarray
    keep: np.ndarray | None
    phase: str
    continues: bool


@dataclass
class Numbering:
    """Gives each token its document and position, pass after pass.

    Attributes:
        next_doc: number of the next document.
        ends: token ids after which a row of ``generate`` is only padding; None outside
            ``generate``.
    """

    next_doc: int = 0
    ends: frozenset[int] | None = None
    rows: Rows | None = None
    given: tuple[np.ndarray, np.ndarray | None] | None = field(default=None)

    def label(self, inputs: Inputs, training: bool) -> Labels:
        """Number the tokens of one pass.

        Raises:
            TraceError: a cache shorter than what was fed, as after beam search or a rejected draft.
        """
        assert inputs.shape is not None
        length = inputs.shape[1]
        ids = None if inputs.ids is None else inputs.ids.cpu().numpy()
        real = inputs.real()
        real_BS = np.ones(inputs.shape, bool) if real is None else real.reshape(inputs.shape)
        rows = self._going_on(inputs)
        replay = rows is not None and not inputs.past and self._is_replay(rows, ids, length)
        if not inputs.past and not replay:
            rows = None
        continues = rows is not None
        if replay:
            real_BS[:, :-1] = False
        rows = rows or self._begin(inputs, real_BS)
        decode = replay or (bool(inputs.past) and length == 1)
        if decode and self.ends is not None and ids is not None:
            rows.finished |= np.isin(ids[:, -1], list(self.ends))
            real_BS[rows.finished] = False
        doc_BS, pos_BS = self._numbers(rows, real_BS)
        rows.fed, rows.ids = length + (0 if replay else rows.fed), ids
        self.rows, self.given = rows, None
        keep = None if real_BS.all() else real_BS.reshape(-1)
        phase = "train" if training else "decode" if decode else "prefill"
        return Labels(doc_BS.reshape(-1), pos_BS.reshape(-1), keep, phase, continues)

    def _going_on(self, inputs: Inputs) -> Rows | None:
        """The rows of the pass before, where this one may continue them."""
        rows = self.rows
        if rows is None or inputs.shape is None or len(rows.doc) != inputs.shape[0]:
            return None
        if self.given is not None:  # numbered by the caller, perhaps the next part of the same
            same = np.array_equal(self.given[0], rows.doc) and inputs.past == rows.fed
            return rows if same else None
        require(
            not inputs.past or inputs.past >= rows.fed,
            f"a cache of the {rows.fed} tokens that were fed",
            f"one cut back to {inputs.past}",
            "num_beams=1 and no assistant model: otherwise rows change places",
            error=TraceError,
        )
        return rows

    def _is_replay(self, rows: Rows, ids: np.ndarray | None, length: int) -> bool:
        """Without a cache ``generate`` runs the whole text again for each token: all but the last
        were counted before.
        """
        if self.ends is None or ids is None or rows.ids is None:
            return False
        return length == rows.ids.shape[1] + 1 and np.array_equal(ids[:, :-1], rows.ids)

    def _begin(self, inputs: Inputs, real_BS: np.ndarray) -> Rows:
        batch, length = real_BS.shape
        before = np.full(batch, inputs.past or 0)
        mask = inputs.mask
        if inputs.past and mask is not None and mask.shape[1] == inputs.past + length:
            # a cache that was filled before the capture began
            before = mask[:, : inputs.past].sum(dim=1).cpu().numpy()
        doc = self.next_doc + np.arange(batch)
        if self.given is None:
            self.next_doc += batch
        return Rows(doc, before, np.zeros(batch, bool), inputs.past or 0)

    def _numbers(self, rows: Rows, real_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, S] document and position; padding gets the next position without taking it."""
        taken = np.cumsum(real_BS, axis=1)
        pos_BS = rows.next_pos[:, None] + taken - real_BS
        doc_BS = np.broadcast_to(rows.doc[:, None], real_BS.shape)
        rows.next_pos = rows.next_pos + taken[:, -1]
        if self.given is None:
            return doc_BS, pos_BS
        doc, pos = self.given
        doc_BS = np.broadcast_to(doc[:, None] if doc.ndim == 1 else doc, real_BS.shape)
        if pos is not None:
            pos_BS = pos[:, None] + taken - real_BS if pos.ndim == 1 else pos
            pos_BS = np.broadcast_to(pos_BS, real_BS.shape)
            rows.next_pos = pos_BS[:, -1] + real_BS[:, -1]
        rows.doc = doc_BS[:, -1].copy()
        self.next_doc = max(self.next_doc, int(doc_BS.max()) + 1)
        return doc_BS, pos_BS
