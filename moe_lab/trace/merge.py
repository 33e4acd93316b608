"""``merge_traces``: the traces that the ranks of one run wrote, as one.

Bounded memory: one part after the other.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.trace.opened_trace import Trace
from moe_lab.trace.reader import open_trace
from moe_lab.trace.rows import rows_of
from moe_lab.trace.writer import TraceWriter

SAME = ("layers", "vocab_size", "tokenizer_hash", "model_hash", "model", "max_tokens")
"""What the metadata of all sources must agree in."""
MAX_DOCUMENT = 2**32 - 1


def merge_traces(
    sources: Sequence[Path | str],
    folder: Path | str,
    *,
    renumber: bool = True,
    tokens: pl.DataFrame | None = None,
    overwrite: bool = False,
) -> Trace:
    """Write all documents of several traces as one trace at ``folder`` and open it.

    Weights, and scores, are kept where all of the traces have them.

    Args:
        sources: folders of complete traces of the same layers.
        renumber: number the documents anew, in the order of the sources: ranks number theirs from
            0. False keeps their numbers, which must then differ.
        tokens: rows of ``TraceWriter.write_tokens`` for all of them, where the sources hold parts
            of one pass over the same documents: decisions alone, each token's in one of the
            sources, its document numbered as in the others.
        overwrite: replace a finished trace at ``folder``.

    Raises:
        TraceExistsError: a finished trace at ``folder`` without ``overwrite``.
        TraceError: no source, traces of other layers, models, vocabularies or columns, document
            numbers above 2^32 - 1, a document (with ``tokens``: a token) twice, or one that is
            missing.
    """
    traces = [open_trace(source) for source in sources]
    require(traces, "at least one trace to merge", "none", error=TraceError)
    first = traces[0].meta
    for trace in traces[1:]:
        for name in SAME:
            if getattr(trace.meta, name) != getattr(first, name):
                what = f"traces of the same {name} as {traces[0].name}"
                raise TraceError(expected(what, f"another in {trace.name}"), name)
        if trace.meta.routing_schema() != first.routing_schema():
            what = f"the routing columns of {traces[0].name}"
            raise TraceError(expected(what, f"others in {trace.name}"))
    notes = tuple(dict.fromkeys(note for trace in traces for note in trace.meta.notes))
    flags = {
        name: all(getattr(trace.meta, name) for trace in traces)
        for name in ("has_weights", "has_scores", "zero_experts_known", "per_token")
    }
    phases = {trace.meta.phase for trace in traces}
    if tokens is None:
        notes = (*notes, f"Merged from {len(traces)} traces.")
    for name, what in (("has_weights", "weights"), ("has_scores", "scores")):
        if not flags[name] and any(getattr(trace.meta, name) for trace in traces):
            notes = (*notes, f"Left out, because not all merged traces have them: {what}.")
    meta = first.replace(
        notes=notes, phase=first.phase if len(phases) == 1 else "generate", **flags
    )
    with TraceWriter(folder, meta, overwrite=overwrite) as writer:
        offset, seen = 0, set()
        for trace in traces:
            documents = {
                number
                for batch in trace.batches(first.layers[0].layer, ["doc"])
                for number in batch["doc"].unique()
            }
            # With ``tokens``, the writer compares the keys of every layer with theirs.
            if not renumber and tokens is None and not seen.isdisjoint(documents):
                raise TraceError(
                    expected("each document in one trace", "a document in two", "renumber=True"),
                    field="doc",
                )
            seen.update(documents)
            last = offset + max(documents, default=0)
            require(
                last <= MAX_DOCUMENT,
                f"document numbers of at most {MAX_DOCUMENT}",
                last,
                "fewer traces",
                error=TraceError,
                field="doc",
            )
            _append(writer, trace, offset)
            offset += max(documents, default=-1) + 1 if renumber else 0
        if tokens is not None:
            writer.write_tokens(tokens)
    return open_trace(folder, verify=False)


def _append(writer: TraceWriter, trace: Trace, offset: int) -> None:
    absent = writer.meta.not_recorded()
    if trace.has_tokens:
        for batch in trace.batches(None, trace.tokens.collect_schema().names()):
            writer.write_tokens(batch.with_columns(pl.col("doc") + offset))
    for layer in trace.meta.layers:
        for batch in trace.batches(layer.layer, list(trace.meta.routing_schema())):
            if batch.is_empty():  # a rank that had nothing to record
                continue
            rows = rows_of(layer, batch, offset)
            rows = {name: rows[name] for name in rows if name not in absent}
            used = batch["experts"].explode().drop_nulls().to_numpy()
            writer.write_rows(layer.layer, rows, np.bincount(used, minlength=layer.num_choices))
