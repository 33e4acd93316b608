"""A model's predictions with the experts that it selects itself, and with those of a trace."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext

import numpy as np
import polars as pl
import torch
from torch import nn

from moe_lab.document_pass import evaluating, pad_right
from moe_lab.errors import AnalysisError, require
from moe_lab.trace import Trace
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.worth.batches import Batch, Document
from moe_lab.worth.document_means import ratios
from moe_lab.worth.edits import Replay
from moe_lab.worth.interventions import intervene
from moe_lab.worth.paired_passes import log_probabilities, logits_of, paired_differences

OWN, IDS, WEIGHTS = "own selection", "recorded ids", "recorded ids and weights"


def replay_divergence(
    model: nn.Module,
    trace: Trace,
    *,
    recorder: nn.Module | None = None,
    batch_tokens: int = 2048,
    level: float = 0.95,
    readers: Mapping[str, Reader] | None = None,
) -> pl.DataFrame:
    """The next-token distribution of a model that selects for itself, beside its distribution with
    the selection of a trace, whose ids it weighs itself or takes with the recorded weights.

    Args:
        trace: a recording of whole documents with token ids, numbered from 0; ``model`` reads the
            same tokens.
        recorder: the model that made the recording; its distribution is the reference then.

    Returns:
        [selection, kl, lo, hi, d_loss, loss_lo, loss_hi, tokens, docs]: rows "own selection",
        "recorded ids" and, where the trace has them, "recorded ids and weights". ``kl`` is the
        divergence from the reference in nats per predicted token, and ``d_loss`` the loss less the
        reference's; the reference is ``recorder``, or the model with its own selection, which then
        has no row. Intervals are over documents.

    Raises:
        AnalysisError: no whole documents in the trace.
        TraceError: a router that cannot replay, or other tokens.

    Example:
        >>> replay_divergence(trained, open_trace("traces/engine"), recorder=before)
    """
    documents = _documents(trace)
    selections = ([] if recorder is None else [OWN]) + [IDS]
    selections += [WEIGHTS] if trace.meta.has_weights else []
    sums = np.zeros((3, len(documents), len(selections)))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for module in (model, recorder or model):
            stack.enter_context(evaluating(module))
        for batch in _consecutive(documents, batch_tokens):
            reference = list(log_probabilities(logits_of(recorder or model, batch), batch))
            for place, selection in enumerate(selections):
                edits = [] if selection == OWN else [
                    Replay(trace, selection == WEIGHTS, batch.documents[0].number)
                ]  # fmt: skip
                with intervene(model, *edits, readers=readers) if edits else nullcontext():
                    logits = logits_of(model, batch)
                loss, kl = paired_differences(reference, logits, batch)
                for row, values in enumerate((np.ones(len(loss)), kl, loss)):
                    sums[row, :, place] += np.bincount(batch.docs, values, len(documents))
    tokens, kl, loss = sums
    columns = {}
    for name, above, ends in (("kl", kl, ("lo", "hi")), ("d_loss", loss, ("loss_lo", "loss_hi"))):
        columns |= dict(zip((name, *ends), ratios(above, tokens, level), strict=True))
    return (
        pl.DataFrame({"selection": selections, **columns})
        .with_columns(
            tokens=pl.Series(tokens.sum(axis=0)).cast(pl.Int64),
            docs=pl.Series((tokens > 0).sum(axis=0)).cast(pl.Int64),
        )
        .with_columns(pl.col(pl.Float64).fill_nan(None))
    )


def _documents(trace: Trace) -> list[Document]:
    """The documents of a trace, whole and in order."""
    tokens = trace.tokens.select("doc", "pos", "token_id").sort("doc", "pos").collect()
    documents = [
        Document(number, part["token_id"].to_numpy())
        for number, part in enumerate(tokens.partition_by("doc", maintain_order=True))
        if part["doc"][0] == number
        and part["pos"].to_list() == list(range(part.height))
        and not part["token_id"].null_count()
    ]
    whole = sum(len(document.ids) for document in documents) == tokens.height
    require(
        tokens.height and whole,
        "a trace of whole documents with token ids, numbered from 0",
        trace,
        error=AnalysisError,
        field="trace",
    )
    return documents


def _consecutive(documents: Sequence[Document], batch_tokens: int) -> Iterator[Batch]:
    """Batches of documents in the order of their numbers."""
    chosen: list[Document] = []
    for document in documents:
        width = max(len(item.ids) for item in (*chosen, document))
        if chosen and (len(chosen) + 1) * width > batch_tokens:
            yield Batch(chosen, *pad_right(chosen, None))
            chosen = []
        chosen.append(document)
    yield Batch(chosen, *pad_right(chosen, None))
