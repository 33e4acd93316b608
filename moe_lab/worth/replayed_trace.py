"""``ReplayedTrace``: what a trace recorded for the tokens of a running forward pass.

Shape letters: T tokens, K slots.
"""

import numpy as np
import polars as pl
import torch
from torch import Tensor

from moe_lab.errors import TraceError, expected, require
from moe_lab.routing import Router
from moe_lab.trace import Trace
from moe_lab.trace.capturing.hooks import Pass
from moe_lab.trace.capturing.model_inputs import Inputs
from moe_lab.trace.capturing.numbering import Numbering
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.trace.rows import EMPTY_SLOT, rows_of
from moe_lab.worth.selection import Replayed


class ReplayedTrace:
    """The recorded selection of one router.

    Args:
        trace: the recording; its documents are numbered in the order in which the passes run.
        site: the router.
        recorded_weights: whether ``weights_of_call`` gives the recorded gate weights.
        first_document: number in the trace of the first document that runs.

    Raises:
        TraceError: the trace lacks the router's layer or its weights, or has other sizes.
    """

    def __init__(
        self, trace: Trace, site: TracedRouter, recorded_weights: bool, first_document: int
    ) -> None:
        self.site = site
        self._numbering = Numbering(next_doc=first_document)
        later = pl.col("doc") >= first_document
        self._pass: Pass | None = None
        keys, ids, weights = [], [], []
        for visit in site.visits:
            layer = trace.meta.layer(visit)
            if layer is None:
                raise self._error(f"layer {visit} in the trace", "none")
            sizes = (layer.num_experts, layer.num_zero_experts)
            own = (site.num_experts, site.num_zero_experts)
            require(
                sizes == own,
                f"real and zero-compute experts {own} in the trace",
                sizes,
                error=TraceError,
                where=site,
                field="trace",
            )
            frame = (
                trace.routing.filter(later & (pl.col("layer") == visit))
                .collect()
                .sort("doc", "pos")
            )
            rows = rows_of(layer, frame.drop("layer"))
            if recorded_weights and "weights" not in rows:
                raise self._error("recorded gate weights", "none")
            keys.append(_key(rows["doc"], rows["pos"]))
            slots = rows["experts"].astype(np.int64)
            ids.append(torch.from_numpy(np.where(slots == EMPTY_SLOT, -1, slots)))
            weights.append(torch.from_numpy(rows["weights"]) if recorded_weights else None)
        self._keys, self._ids, self._weights = keys, ids, weights
        tokens = trace.tokens.filter(later).select("doc", "pos", "token_id").collect()
        tokens = tokens.sort("doc", "pos")
        self._token_keys = _key(tokens["doc"].to_numpy(), tokens["pos"].to_numpy())
        self._token_ids = tokens["token_id"].fill_null(-1).to_numpy()

    def of_call(self, running: Pass | None, number: int) -> Replayed:
        """The selection for call ``number`` of a pass."""
        if running is None or running.inputs.shape is None:
            raise self._error("a call within a forward pass of the model", "another")
        if number >= len(self.site.visits):
            raise self._error(f"{len(self.site.visits)} calls in a pass", number + 1)
        if running is not self._pass:
            self._pass = running
            self._label(running.inputs)
        place = self._find(self._keys[number])
        known_T = torch.from_numpy(self._real)
        ids_TK = self._ids[number][place]
        if not isinstance(self.site.module, Router) and bool((ids_TK[known_T] < 0).any()):
            raise self._error("an expert in every slot of the trace", "unused slots")
        self._rows = self._weights[number], torch.from_numpy(place), known_T
        return Replayed(ids_TK, known_T)

    def weights_of_call(self, weights_TK: Tensor) -> Tensor:
        """Gate weights [T, K] of the last call: those given, or the recorded ones."""
        recorded, place, known_T = self._rows
        if recorded is None:
            return weights_TK
        values = recorded[place].to(weights_TK)
        return torch.where(known_T.to(values.device)[:, None], values, weights_TK)

    def _label(self, inputs: Inputs) -> None:
        labels = self._numbering.label(inputs, training=False)
        self._doc, self._pos = labels.doc, labels.pos
        self._real = np.ones(len(labels.doc), bool) if labels.keep is None else labels.keep
        if inputs.ids is None or not len(self._token_keys):
            return
        recorded = self._token_ids[self._find(self._token_keys)]
        differs = (recorded >= 0) & (recorded != inputs.ids.cpu().numpy().reshape(-1)) & self._real
        if differs.any():
            raise self._error("the token ids of the trace", self._named(differs))

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """[T] rows of the tokens of the pass; 0 for padding."""
        wanted = _key(self._doc, self._pos)
        place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        missing = (keys[place] != wanted) & self._real
        if missing.any():
            raise self._error("tokens that the trace holds", self._named(missing))
        return np.where(self._real, place, 0)

    def _named(self, which: np.ndarray) -> str:
        first = int(which.argmax())
        return f"others at document {self._doc[first]}, position {self._pos[first]}"

    def _error(self, what: str, got: object) -> TraceError:
        return TraceError(f"{self.site}: {expected(what, got)}", field="trace")


def _key(doc: np.ndarray, pos: np.ndarray) -> np.ndarray:
    return doc.astype(np.int64) << 32 | pos.astype(np.int64)
