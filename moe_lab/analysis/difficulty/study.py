"""``difficulty_study``: from a trace to a frame with difficulties, and from that to every table.

The verdict over all tables is in ``difficulty_verdict``.
"""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.difficulty.alignment import HALVES, PLACES, STRATA
from moe_lab.analysis.difficulty.association import association_rows, pairings, tables
from moe_lab.analysis.difficulty.compute_budget import compute_budget, compute_variance
from moe_lab.analysis.difficulty.curves import curve_rows, information_rows
from moe_lab.analysis.difficulty.difficulty_verdict import MIN_DOCUMENTS
from moe_lab.analysis.difficulty.nulls import baseline_association, null_rows
from moe_lab.config import require
from moe_lab.errors import AnalysisError
from moe_lab.progress import tracked
from moe_lab.text import ngram_halves, ngram_surprisal
from moe_lab.trace import Trace

NGRAM = "ngram_loss"
LEARNABILITY = ("H->H", "L->H", "H->L", "L->L")
FALL = 0.2
"""Nats that the fitted line must fall or rise by to count as a change."""


def difficulty_study(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    seed: int = 0,
    *,
    resamples: int = 2000,
    min_documents: int = MIN_DOCUMENTS,
    baselines: bool = True,
) -> dict[str, pl.DataFrame]:
    """The tables ``budget``, ``association``, ``variance``, ``curves``, ``information``, ``nulls``
    and, on request, ``baselines``.

    Args:
        frame: as ``difficulty_association``; its class columns are judged as taxonomies.
    """
    schema = frame.lazy().collect_schema()
    taxonomies: Sequence[str] = [name for name in STRATA if name in schema]
    one_pass = {
        "association": association_rows(seed, resamples, min_documents=min_documents, details=True),
        "curves": curve_rows(seed, resamples),
        "information": information_rows(seed),
        "nulls": null_rows(seed),
    }

    def measured() -> dict[str, pl.DataFrame]:
        found = tables(pairings(frame, difficulty, "ffn_count"), *one_pass.values())
        return dict(zip(one_pass, found, strict=True))

    steps: list[Callable[[], dict[str, pl.DataFrame]]] = [
        lambda: {"budget": compute_budget(frame, seed=seed)},
        measured,
        lambda: {"variance": compute_variance(frame, difficulty, taxonomies=taxonomies)},
        lambda: {
            "baselines": baseline_association(
                frame, difficulty, seed, resamples=min(resamples, 1000)
            )
        },
    ]
    made: dict[str, pl.DataFrame] = {}
    for make in tracked(steps if baselines else steps[:-1], "computing tables"):
        made |= make()
    return made


def difficulty_frame(
    trace: Trace, *, difficulty: pl.DataFrame | pl.LazyFrame | None = None, seed: int = 0
) -> pl.LazyFrame:
    """[layer, doc, pos, token_id, ffn_count, gate_mass_ffn, entropy, margin, <class columns>,
    <difficulty columns>] of a trace with a token table.

    Args:
        difficulty: [doc, pos, <columns>] to join; by default ``ngram_loss``, the trigram surprisal
            of each token under n-grams counted in the other half of the trace's documents. (Own
            loss is no difficulty: compute lowers it.)

    Raises:
        AnalysisError: the trace has no token table.
    """
    schema = trace.tokens.collect_schema()
    require(
        trace.meta.has_token_ids
        and "token_id" in schema
        and trace.tokens.select(pl.len()).collect().item() != 0,
        "a trace with a token table",
        f"none in {trace.folder}",
        "tracing again with token ids",
        error=AnalysisError,
    )
    marks = [column for column, _ in PLACES.values()]
    classes = [name for name in dict.fromkeys([*STRATA, *marks]) if name in schema]
    tokens = trace.tokens.select("doc", "pos", "token_id", *classes)
    added = (trace_surprisal(trace, seed) if difficulty is None else difficulty).lazy()
    added = added.with_columns(pl.col("doc", "pos").cast(pl.UInt32))
    measures = ("ffn_count", "gate_mass_ffn", "entropy", "margin")
    routing = trace.routing.select("layer", "doc", "pos", *measures)
    return routing.join(tokens.join(added, on=["doc", "pos"], how="left"), on=["doc", "pos"])


def trace_surprisal(trace: Trace, seed: int = 0, folds: int = 2) -> pl.DataFrame:
    """[doc, pos, ngram_loss, ngram_loss_half_a, ngram_loss_half_b] from the tokens of the trace
    alone; null where no token stands before. The halves tell how reliable it is.

    A document is whole in its fold, and runs of positions with a gap between are scored apart.
    """
    rows = trace.tokens.select("doc", "pos", "token_id").collect().sort("doc", "pos")
    doc, pos, ids = (rows[name].to_numpy().astype(np.int64) for name in ("doc", "pos", "token_id"))
    breaks = np.flatnonzero((doc[1:] != doc[:-1]) | (pos[1:] != pos[:-1] + 1)) + 1
    starts = np.append(0, breaks)
    vocabulary = trace.meta.vocab_size or int(ids.max(initial=0)) + 1
    pieces, groups = np.split(ids, breaks), doc[starts]
    found = ngram_surprisal(pieces, vocabulary, folds, seed, groups=groups)
    halves = ngram_halves(pieces, vocabulary, folds, seed, groups=groups)
    columns = zip((NGRAM, *(NGRAM + end for end in HALVES)), (found, *halves), strict=True)
    return rows.select("doc", "pos").with_columns(
        pl.Series(name, np.concatenate(values).astype(np.float32)).fill_nan(None)
        for name, values in columns
    )


def learnability(losses: NDArray, fall: float = FALL) -> NDArray[np.uint8]:
    """[T] index into ``LEARNABILITY``: how each token's loss moved while a reference model learnt.

    The four classes of Rho-1 (arXiv 2404.07965, section 2.1 and appendix D.1) from [T, C] losses at
    C checkpoints, evenly spaced. A token that was hard and stayed hard is likely noise, and a good
    router may well ignore it; one that went from hard to easy repaid compute.

    A straight line is fitted to each token's losses. A fall of more than ``fall`` over the run is
    H->L, a rise L->H; otherwise the last loss above the mean of all tokens' last losses is H->H,
    else L->L. Tokens with a missing loss get 255.
    """
    losses = np.asarray(losses, dtype=np.float64)
    require(
        losses.ndim == 2 and losses.shape[1] >= 2,
        "losses of shape [tokens, at least 2 checkpoints]",
        list(losses.shape),
        field="losses",
    )
    steps = np.linspace(-0.5, 0.5, losses.shape[1])
    change = losses @ steps / (steps @ steps)  # fitted end less fitted start
    last = losses[:, -1]
    high = last > np.nanmean(last)
    code = np.select([change < -fall, change > fall, high], [2, 1, 0], 3).astype(np.uint8)
    code[~np.isfinite(losses).all(axis=1)] = 255
    return code
