"""``PassRows``: forward passes as they wait in a queue, and their conversion to rows of the trace.

Runs in a second thread, so that the model waits only where it is faster than the conversion. Shape
letters: T tokens, K slots, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from moe_lab.errors import TraceError, expected
from moe_lab.trace.capturing.class_columns import Described
from moe_lab.trace.capturing.router_output import Reading, joined
from moe_lab.trace.capturing.token_text import TokenText
from moe_lab.trace.capturing.traced_router import TracedRouter, Visit
from moe_lab.trace.rows import slot_rows
from moe_lab.trace.schema import OUTPUT_RATIO
from moe_lab.trace.writer import TraceWriter


@dataclass(frozen=True)
class RecordedPass:
    """One pass as it waits to be converted.

    Attributes:
        doc, pos: [n] labels of the tokens that count.
        keep: their places among the tokens of the pass; None: all.
        readings: one for each visit of a router, of all tokens.
        ratios: [T] output over input norm for each visit, or empty.
        ids: token ids of the pass, or None.
        phase: train, prefill or decode.
        losses: [B, S] or None.
        further: further columns [B, S] of the token table.
        finished: documents of earlier passes that this one does not continue.
    """

    doc: np.ndarray
    pos: np.ndarray
    keep: np.ndarray | None
    readings: Sequence[Reading]
    ratios: Sequence[Tensor]
    ids: Tensor | None
    phase: str
    losses: np.ndarray | None
    further: dict[str, np.ndarray]
    finished: Sequence[int]

    @property
    def num_bytes(self) -> int:
        return sum(reading.num_bytes for reading in self.readings)

    def kept(self, values: Any) -> Any:
        """The entries of [B, S] or [T] numbers that belong to counted tokens."""
        flat = values.reshape(-1)
        return flat if self.keep is None else flat[self.keep]

    def places(self) -> Tensor | None:
        return None if self.keep is None else torch.from_numpy(self.keep)


class PassRows:
    """Writes recorded passes through a ``TraceWriter``.

    Args:
        visits: runs of the routers, in the order of the readings of a pass.
        pieces: the text of token ids, or None.
        described: the class columns of documents, or None.
    """

    def __init__(
        self,
        writer: TraceWriter,
        visits: Sequence[Visit],
        pieces: TokenText | None,
        described: Described | None = None,
    ) -> None:
        self.writer, self.visits, self.pieces, self.described = writer, visits, pieces, described

    def write(self, passes: Sequence[RecordedPass], event: Any) -> None:
        """Convert and write passes; ``event`` is a CUDA event to wait for, or None."""
        if event is not None:
            event.synchronize()
        doc, pos = (
            _numbers(np.concatenate([getattr(record, name) for record in passes]))
            for name in ("doc", "pos")
        )
        for place, (site, _, visit) in enumerate(self.visits):
            reading = joined([record.readings[place].rows(record.places()) for record in passes])
            ratios = [record.kept(record.ratios[place]) for record in passes if record.ratios]
            try:
                self._write_router(site, visit, doc, pos, reading, ratios)
            except TraceError as error:
                raise TraceError(f"{site}: {error}") from error
        for record in passes:
            self._write_tokens(record)
        self.writer.finish_documents([number for record in passes for number in record.finished])

    def _write_router(
        self,
        site: TracedRouter,
        visit: int,
        doc: np.ndarray,
        pos: np.ndarray,
        reading: Reading,
        ratios: Sequence[Tensor],
    ) -> None:
        meta = self.writer.meta
        layer = meta.layer(visit)
        assert layer is not None
        ids, weights, dropped = reading.indices.cpu().numpy(), None, None
        if meta.has_weights and reading.weights is not None:
            weights = reading.weights.detach().float().cpu().numpy()
        if reading.selected is not None:
            lost = (reading.selected >= 0) & (reading.indices < 0)
            dropped = lost.sum(dim=1).cpu().numpy()
        spread = (lambda: reading.spread_under(site.score_func)) if meta.has_scores else None
        rows = slot_rows(layer, doc, pos, ids, weights, dropped, spread)
        if ratios:
            rows[OUTPUT_RATIO] = torch.cat([ratio.cpu() for ratio in ratios]).numpy()
        counts = np.bincount(ids[ids >= 0], minlength=layer.num_choices)
        self.writer.write_rows(visit, rows, counts)

    def _write_tokens(self, record: RecordedPass) -> None:
        if record.ids is None:
            return
        token_id = record.kept(record.ids.cpu().numpy())
        numbers = {"doc": record.doc, "pos": record.pos, "token_id": token_id}
        loss: Any = pl.lit(None, pl.Float32)
        if record.losses is not None:
            loss = pl.Series(record.kept(record.losses), dtype=pl.Float32).fill_nan(None)
        text: dict[str, pl.Series] = {}
        if self.pieces is not None and "text" not in record.further:
            text["text"] = self.pieces.of(token_id)
        if self.described is not None:
            text |= self.described.of_rows(record.doc, record.pos, token_id)
        further = {name: pl.Series(record.kept(values)) for name, values in record.further.items()}
        self.writer.write_tokens(
            pl.DataFrame(numbers).with_columns(
                phase=pl.lit(record.phase), loss=loss, **text, **further
            )
        )


def _numbers(values: np.ndarray) -> np.ndarray:
    """[T] u32."""
    if len(values) and (values.min() < 0 or values.max() >= 2**32):
        what = f"documents and positions between 0 and {2**32 - 1}"
        raise TraceError(expected(what, f"{values.min()}..{values.max()}"))
    return values.astype(np.uint32)
