"""The validation pass: each document separately, with the loss and the experts of every token.

A corpus is sampled in excerpts, evenly spaced over all its tokens: the openings of documents alone
(licences, imports) are another text than the one a model was trained on, and its router would be
judged on that shift.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl
import torch

from moe_lab.document_pass import (
    IGNORE,
    Excerpt,
    WindowBatch,
    evaluating,
    excerpts_of,
    token_losses,
    windows,
)
from moe_lab.errors import CorpusError, require
from moe_lab.model import Decoder
from moe_lab.progress import tracked
from moe_lab.routing import Routing
from moe_lab.text import TokenizedDocument, Tokenizer, token_classes
from moe_lab.trace import TraceMeta, TraceWriter, merge_traces
from moe_lab.trace.existing import refuse_finished
from moe_lab.training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        loss: nats per predicted token (every token but the first of its excerpt).
        bits_per_byte: the same loss over the UTF-8 bytes of those tokens.
        num_tokens, num_documents: what it rests on.
        tokens: one row per token: doc, pos, token_id, loss, text, start, end and the class columns.
    """

    loss: float
    bits_per_byte: float
    num_tokens: int
    num_documents: int
    tokens: pl.DataFrame


def evaluate(
    model: Decoder,
    documents: Sequence[TokenizedDocument],
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    batch_size: int = 16,
    excerpts: Sequence[Excerpt] | None = None,
    reference_counts: np.ndarray | None = None,
    trace: tuple[Path, TraceMeta] | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Score ``documents`` (or ``excerpts`` of them) and, if asked, write the trace.

    A finished trace at its path is replaced with ``overwrite`` and raises ``TraceExistsError``
    otherwise.

    The model is left in the mode it came in. Routing of padding is neither counted nor written.
    """
    evaluation = evaluate_together(
        ALONE,
        model,
        documents,
        tokenizer,
        seq_length=seq_length,
        batch_size=batch_size,
        excerpts=excerpts,
        reference_counts=reference_counts,
        trace=trace,
        overwrite=overwrite,
    )
    assert evaluation is not None
    return evaluation


@torch.no_grad()
def evaluate_together(
    ranks: Ranks,
    model: Decoder,
    documents: Sequence[TokenizedDocument],
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    batch_size: int = 16,
    excerpts: Sequence[Excerpt] | None = None,
    reference_counts: np.ndarray | None = None,
    trace: tuple[Path, TraceMeta] | None = None,
    overwrite: bool = False,
) -> Evaluation | None:
    """``evaluate`` by several ranks, who take runs of its batches, so that each batch is computed
    as one rank would.

    Every rank records its part beside the trace; the first puts the trace together and returns the
    evaluation, the others None.
    """
    excerpts = _some(documents, excerpts)
    numbers = np.array([document.index for document in documents])
    if trace is not None and not overwrite:
        refuse_finished(trace[0], trace[1].to_dict())
    with (
        TraceWriter(_part(trace[0], ranks), trace[1], overwrite=overwrite or ranks.size > 1)
        if trace is not None
        else nullcontext() as writer
    ):

        def write(batch: WindowBatch, routings: Sequence[Routing]) -> None:
            if writer is not None:
                for layer, routing in zip(model.config.moe_layers, routings, strict=True):
                    writer.write_routing(
                        layer, numbers[batch.doc.ravel()], batch.pos.ravel(), routing
                    )

        losses = _losses(ranks, model, documents, excerpts, seq_length, batch_size, write)
        tokens = (
            _token_frame(documents, excerpts, losses, tokenizer, reference_counts)
            if ranks.first
            else None
        )
        if writer is not None and tokens is not None and ranks.size == 1:
            writer.write_tokens(tokens)
    ranks.wait()
    if tokens is None:
        return None
    if trace is not None and ranks.size > 1:
        _join_parts(trace[0], tokens, ranks, overwrite)
    nats = _scored(losses, excerpts)
    scored = tokens.filter(pl.col("loss").is_not_null())
    return Evaluation(
        loss=float(nats.mean()),
        bits_per_byte=float(nats.sum()) / math.log(2) / int(scored["n_bytes"].sum()),
        num_tokens=len(nats),
        num_documents=tokens["doc"].n_unique(),
        tokens=tokens,
    )


@torch.no_grad()
def validation_loss(
    ranks: Ranks,
    model: Decoder,
    documents: Sequence[TokenizedDocument],
    *,
    seq_length: int,
    batch_size: int = 16,
    excerpts: Sequence[Excerpt] | None = None,
) -> tuple[float, int]:
    """Loss in nats per predicted token, and how many tokens it rests on: those of ``evaluate``,
    without its table of tokens. All ranks call it, and each gets the result.

    The model is left in the mode it came in, and the state of random numbers as it was.
    """
    excerpts = _some(documents, excerpts)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        losses = _losses(ranks, model, documents, excerpts, seq_length, batch_size)
    nats = _scored(losses, excerpts)
    return float(nats.mean()), len(nats)


def _some(
    documents: Sequence[TokenizedDocument], excerpts: Sequence[Excerpt] | None
) -> Sequence[Excerpt]:
    """The excerpts, of whole documents by default. Raises ``CorpusError`` if there are none."""
    if excerpts is None:
        excerpts = excerpts_of([len(document.ids) for document in documents])
    require(
        excerpts,
        "validation text of at least two tokens in a document",
        "none",
        "longer documents",
        error=CorpusError,
    )
    return excerpts


def _losses(
    ranks: Ranks,
    model: Decoder,
    documents: Sequence[TokenizedDocument],
    excerpts: Sequence[Excerpt],
    seq_length: int,
    batch_size: int,
    write: Callable[[WindowBatch, Sequence[Routing]], None] | None = None,
) -> list[np.ndarray]:
    """Of each document, nats by token, NaN where none was predicted; the same on all ranks.

    Args:
        write: called with each of this rank's batches and the routings of its layers.
    """
    ids = [document.ids for document in documents]
    device = next(model.parameters()).device
    losses = [np.full(len(sequence), np.nan) for sequence in ids]
    with evaluating(model):
        batches = list(windows(ids, excerpts, seq_length, batch_size))
        for batch, is_own in tracked(list(_own_batches(batches, ranks)), "evaluating"):
            output = model(batch.ids.to(device), valid_BS=batch.valid.to(device))
            if is_own:
                _scatter(losses, token_losses(output.logits, batch.targets), batch)
                if write is not None:
                    write(batch, output.routings)
    _gather(losses, sorted({excerpt.document for excerpt in excerpts}), ranks)
    return losses


def _scored(losses: Sequence[np.ndarray], excerpts: Sequence[Excerpt]) -> np.ndarray:
    """[n] float64: nats of the predicted tokens of the excerpts, rounded as in the trace."""
    nats = np.concatenate([losses[item.document][item.start : item.stop] for item in excerpts])
    return nats[~np.isnan(nats)].astype(np.float32).astype(np.float64)


def _own_batches(
    batches: Sequence[WindowBatch], ranks: Ranks
) -> Iterator[tuple[WindowBatch, bool]]:
    """This rank's run of the batches. Shards of a model are gathered by all ranks at once, so each
    makes as many passes as any: one that has fewer batches repeats one, which is not its own.
    """
    start, stop = (len(batches) * edge // ranks.size for edge in (ranks.rank, ranks.rank + 1))
    for number in range(start, start - (-len(batches) // ranks.size)):
        yield batches[min(number, len(batches) - 1)], number < stop


def _gather(losses: Sequence[np.ndarray], documents: Sequence[int], ranks: Ranks) -> None:
    """Fill in what the other ranks have scored of these documents."""
    if ranks.size == 1:
        return
    scores = torch.from_numpy(np.concatenate([losses[index] for index in documents]))
    scored = ranks.total((~scores.isnan()).long()) > 0
    all_scores = torch.where(scored, ranks.total(scores.nan_to_num()), torch.nan).cpu().numpy()
    for index, values in zip(
        documents,
        np.split(all_scores, np.cumsum([len(losses[index]) for index in documents])[:-1]),
        strict=True,
    ):
        losses[index][:] = values


def _part(trace: Path, ranks: Ranks, rank: int | None = None) -> Path:
    """Where a rank (this one) records its part of a trace."""
    return (
        trace
        if ranks.size == 1
        else trace.with_name(f"{trace.name}.rank-{ranks.rank if rank is None else rank}")
    )


def _join_parts(trace: Path, tokens: pl.DataFrame, ranks: Ranks, overwrite: bool) -> None:
    parts = [_part(trace, ranks, rank) for rank in range(ranks.size)]
    merge_traces(parts, trace, renumber=False, tokens=tokens, overwrite=overwrite)
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)


def _scatter(losses: list[np.ndarray], nats: np.ndarray, batch: WindowBatch) -> None:
    """A target's loss belongs to the target token, one position after its input."""
    scored = (batch.targets != IGNORE).numpy()
    for index in np.unique(batch.doc[scored]):
        mask = scored & (batch.doc == index)
        losses[index][batch.pos[mask] + 1] = nats[mask]


def _token_frame(
    documents: Sequence[TokenizedDocument],
    excerpts: Sequence[Excerpt],
    losses: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    reference_counts: np.ndarray | None,
) -> pl.DataFrame:
    """One row per token of the excerpts; classes are those of the whole document (what was seen
    before it, where a string began).
    """
    frames = []
    for index, group in groupby(excerpts, key=lambda excerpt: excerpt.document):
        document = documents[index]
        classes = token_classes(document, tokenizer, reference_counts).with_columns(
            doc=pl.lit(document.index, pl.UInt32),
            document=pl.lit(document.name),
            loss=pl.Series(losses[index], dtype=pl.Float32).fill_nan(None),
        )
        for excerpt in group:
            rows = classes.slice(excerpt.start, excerpt.stop - excerpt.start)
            spans = rows.select("start", "end").iter_rows()
            frames.append(
                rows.with_columns(
                    text=pl.Series(
                        [document.text[start:end] for start, end in spans], dtype=pl.String
                    )
                )
            )
    return pl.concat(frames)
