"""``fit_workload``: the routing statistics of a trace, from which new traces of any length are
drawn; ``workload_agreement``: whether such a sample may stand for the original.

A sampled token keeps, in each layer and independently for each slot, an expert of the token before
with the measured probability (token-to-token dependence); the other experts are drawn without
replacement, by the load of its document blended with the table of which expert follows which expert
of the layer before (layer-to-layer dependence). The load of a document is that of a document of the
trace, drawn at random (skew, and drift between documents).
Shape letters: T tokens, L layers, E real experts, K slots.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import by_layer
from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS
from moe_lab.analysis.document_sums import documents
from moe_lab.analysis.slot_counts import unit_counts
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.serving.distinct_experts import distinct_experts
from moe_lab.serving.expert_cache import expert_cache
from moe_lab.serving.expert_sets import expert_sets
from moe_lab.serving.placement_transfer import placement_transfer
from moe_lab.trace import LayerMeta, Trace, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.rows import EMPTY_SLOT, slot_rows

FIT_TOKENS = 50_000
CALIBRATIONS = 5
CALIBRATION_TOKENS = 4_000
"""Samples, and tokens of each, from which the dependence between tokens is set."""
PRIOR = 20.0
"""Pairs of experts that are taken to be as frequent as the loads say."""
SMOOTH = 0.5
"""Slots added to each expert of a document's load: what was not seen may still happen."""
LACKING = f"No interval: one of the two has fewer than {MIN_DOCUMENTS} documents."
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Workload:
    """The fitted routing statistics of a trace.

    Attributes:
        layers: of the trace.
        slots: [L] experts that a token runs, whole numbers.
        load: [U, L, E] share of slots of each document (or bundle of documents).
        keep: [L] probability that a slot keeps its expert from the token before.
        follow: [L, E, E] how often expert f of the layer before and expert e run on one token, over
            how often the loads of the documents alone would make them; ones in the first layer.
        length: mean tokens of a document.
    """

    layers: tuple[LayerMeta, ...]
    slots: NDArray[np.int64]
    load: Floats
    keep: Floats
    follow: Floats
    length: int

    def sample(self, folder: Path | str, tokens: int, *, seed: int = 0) -> Trace:
        """A trace of about ``tokens`` tokens, in documents of the mean length, written at
        ``folder``.

        Raises:
            TraceExistsError: a finished trace there.
        """
        require(tokens >= 1, "at least 1 token", tokens)
        generator = np.random.default_rng(seed)
        count = max(1, round(tokens / self.length))
        length = min(self.length, tokens)
        meta = TraceMeta(
            self.layers,
            model="a fitted workload",
            seed=seed,
            has_weights=False,
            has_scores=False,
            notes=("Drawn from a fitted workload, not routed by a model.",),
        )
        ids_DTLK = self.routes(generator, count, length)
        doc = np.repeat(np.arange(count, dtype=np.uint32), length)
        pos = np.tile(np.arange(length, dtype=np.uint32), count)
        with TraceWriter(folder, meta) as writer:
            for at, layer in enumerate(self.layers):
                ids = ids_DTLK[:, :, at, : layer.top_k].reshape(len(doc), -1)
                counts = np.bincount(ids[ids >= 0], minlength=layer.num_choices)
                writer.write_rows(
                    layer.layer, slot_rows(layer, doc, pos, ids, None, None, None), counts
                )
        return open_trace(folder, verify=False)

    def routes(self, generator: np.random.Generator, count: int, length: int) -> NDArray[np.int32]:
        """[count, length, L, K] experts of documents, -1 where a layer uses fewer slots."""
        unit_D = generator.integers(len(self.load), size=count)
        ids_DTLK = np.full((count, length, len(self.layers), self.slots.max()), -1, np.int32)
        before: list[NDArray[np.int64]] = []
        for step in range(length):
            now: list[NDArray[np.int64]] = []
            for at in range(len(self.layers)):
                logits = np.log(self.load[unit_D, at])
                if at:
                    logits = logits + np.log(self.follow[at][now[-1]]).mean(axis=1)
                held = before[at] if step else None
                chosen = _draw(generator, logits, held, self.keep[at], int(self.slots[at]))
                ids_DTLK[:, step, at, : chosen.shape[1]] = chosen
                now.append(chosen)
            before = now
        return ids_DTLK


def _draw(
    generator: np.random.Generator,
    logits_DE: Floats,
    held_DK: NDArray[np.int64] | None,
    keep: float,
    slots: int,
) -> NDArray[np.int64]:
    """[D, K] experts: kept ones first, then Gumbel-top-k draws without replacement."""
    keys = logits_DE + generator.gumbel(size=logits_DE.shape)
    if held_DK is not None:
        kept = generator.random(held_DK.shape) < keep
        rows = np.repeat(np.arange(len(keys)), held_DK.shape[1])[kept.ravel()]
        keys[rows, held_DK[kept]] = np.inf
    return np.argpartition(-keys, slots - 1, axis=1)[:, :slots]


def fit_workload(trace: Trace) -> Workload:
    """Fit the statistics of a trace's decoded tokens (at most ``FIT_TOKENS`` of them for the
    dependences).

    Raises:
        AnalysisError: as ``expert_sets``; layers with different numbers of experts; fewer than two
            documents, which have no drift between them.
    """
    sets = expert_sets(trace)
    layers = tuple(by_layer(trace))
    experts = {layer.num_experts for layer in layers}
    if len(experts) != 1:
        raise AnalysisError(expected("layers with one number of experts", sorted(experts)))
    size, number = experts.pop(), len(layers)
    docs = documents(trace, size * number)
    if docs.units < 2:
        what = "at least 2 documents to fit how their loads differ"
        raise AnalysisError(expected(what, docs.units))
    tables = unit_counts(trace, layers, docs)
    counts = np.stack([counts_UGE[:, 0, :size] for counts_UGE in tables], axis=1)
    tokens = max(trace.num_tokens, 1)
    load = counts + SMOOTH
    load = load / load.sum(axis=2, keepdims=True)
    slots_L = np.maximum(np.round(counts.sum(axis=(0, 2)) / tokens), 1).astype(np.int64)
    pairs = np.zeros((number, size, size))
    same, chance, seen = np.zeros(number), np.zeros(number), 0
    read_U = np.zeros(docs.units)
    for key_T, _, ids_TLK in sets.tokens():
        hot = np.zeros((*ids_TLK.shape[:2], size + 1), np.float32)
        np.put_along_axis(
            hot, np.where(ids_TLK == EMPTY_SLOT, size, ids_TLK).astype(np.int64), 1.0, axis=2
        )
        hot = hot[:, :, :size]
        follows = np.append(False, np.diff(key_T) == 1)
        unit_T = docs.unit((key_T >> np.uint64(32)).astype(np.uint32))
        read_U += np.bincount(unit_T, minlength=docs.units)
        for at in range(number):
            now, before = hot[follows, at], hot[np.roll(follows, -1), at]
            same[at] += (now * before).sum()
            share = np.minimum(load[unit_T[follows], at] * slots_L[at], 1)
            chance[at] += (before * share).sum()
            if at:
                pairs[at] += hot[:, at - 1].T @ hot[:, at]
        seen += int(follows.sum())
        if seen >= FIT_TOKENS:
            break
    asked = max(seen, 1) * slots_L
    overlap, spread = same / asked, np.maximum(1 - chance / asked, 1e-9)
    follow = np.ones((number, size, size))
    for at in range(1, number):
        # What the loads of the documents alone would give.
        alone = np.einsum("u,ue,uf->ef", read_U, load[:, at - 1], load[:, at])
        alone *= slots_L[at - 1] * slots_L[at]
        follow[at] = (pairs[at] + PRIOR) / (alone + PRIOR)
    length = max(1, tokens // max(len(docs.docs), 1))
    workload = Workload(layers, slots_L, load, np.zeros(number), follow, length)
    for step in range(CALIBRATIONS):
        # What a sample overlaps is the measure: independent draws overlap by chance too.
        count, several = max(1, CALIBRATION_TOKENS // length), min(length, CALIBRATION_TOKENS)
        ids = workload.routes(np.random.default_rng(step), count, several)
        found = np.array([_overlap(ids[:, :, at, : slots_L[at]]) for at in range(number)])
        keep = np.clip(workload.keep + (overlap - found) / spread, 0, 1)
        workload = replace(workload, keep=keep)
    return workload


def _overlap(ids_DTK: NDArray[np.int32]) -> float:
    """Mean share of a token's experts that the token before used."""
    if ids_DTK.shape[1] < 2:
        return 0.0
    same = ids_DTK[:, 1:, :, None] == ids_DTK[:, :-1, None, :]
    return float(same.any(axis=3).mean())


def workload_agreement(
    original: Trace,
    sample: Trace,
    *,
    devices: int = 4,
    expert_bytes: float = 1.0,
    resamples: int = 200,
    seed: int = 0,
) -> pl.DataFrame:
    """Whether cache, distinct experts and placement come out alike on a sample and its original.

    Returns:
        [question, original, lo, hi, sample, sample_lo, sample_hi, agrees, note]: LRU hit rates at
        .25 and .5 of all experts, distinct experts of windows of 4 and 16, imbalance of a placement
        on unseen documents. ``agrees`` where the two intervals overlap (null where one is missing).
        The sample may stand for the original in the questions where it agrees, and in no other.
        ``note`` says what a question that is not answered lacks.

    Raises:
        AnalysisError: as the three analyses; traces of other layers.
    """
    if [layer.layer for layer in by_layer(original)] != [layer.layer for layer in by_layer(sample)]:
        raise AnalysisError(expected("a sample of the original's layers", "others"))
    answers = [
        _answers(trace, devices, expert_bytes, resamples, seed) for trace in (original, sample)
    ]
    rows = []
    for question, (value, low, high) in answers[0].items():
        theirs = answers[1][question]
        ends = low, high, *theirs[1:]
        agrees = None if None in ends else max(ends[0], ends[2]) <= min(ends[1], ends[3])
        note = "" if agrees is not None else LACKING
        rows.append([question, value, low, high, *theirs, agrees, note])
    names = ("original", "lo", "hi", "sample", "sample_lo", "sample_hi")
    schema = {
        "question": pl.String, **dict.fromkeys(names, pl.Float64), "agrees": pl.Boolean,
        "note": pl.String,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def _answers(
    trace: Trace, devices: int, expert_bytes: float, resamples: int, seed: int
) -> dict[str, tuple[Any, ...]]:
    answers: dict[str, tuple[Any, ...]] = {}
    total = expert_bytes * sum(layer.num_experts for layer in trace.meta.layers)
    cache = expert_cache(
        trace, [total / 4, total / 2], ["lru"], expert_bytes=expert_bytes, resamples=resamples,
        seed=seed,
    )  # fmt: skip
    for part, row in zip(
        (".25", ".5"), cache.filter(phase="all").iter_rows(named=True), strict=True
    ):
        answers[f"LRU hit rate at {part} of all experts"] = tuple(
            row[name] for name in ("hit_rate", "hit_rate_lo", "hit_rate_hi")
        )
    windows = distinct_experts(trace, window=[4, 16], resamples=resamples, seed=seed)
    for row in windows.filter(pl.col("layer").is_null()).iter_rows(named=True):
        answers[f"distinct experts of {row['size']} tokens in a row"] = tuple(
            row[name] for name in ("measured", "lo", "hi")
        )
    moved = dict.fromkeys(("imbalance", "lo", "hi"))
    if documents(trace).units >= 2:
        frame = placement_transfer(trace, devices, resamples=resamples, seed=seed)
        moved = frame.row(0, named=True)
    answers[f"imbalance of {devices} devices on unseen documents"] = tuple(
        moved[name] for name in ("imbalance", "lo", "hi")
    )
    return answers
