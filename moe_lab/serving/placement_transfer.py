"""Does a placement hold on text that it was not chosen on? ``placement_transfer`` chooses on one
part of a trace and judges on another; ``tokens_needed`` asks how many tokens that takes;
``nodes_touched`` counts what crosses nodes.

Judged is the imbalance: load of the fullest device over the mean, of all tokens of a part together,
mean over the layers in which a real expert ran. A batch is smaller than a part and less even
(``load_over_windows``).
Shape letters: U units of documents, G groups, L layers, E real experts, D devices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import add_counts
from moe_lab.analysis.document_bootstrap import MIN_DOCUMENTS, RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import Documents, documents, nulls
from moe_lab.analysis.map_reduce import Sum, cells, counted, reduced
from moe_lab.analysis.slot_counts import unit_counts
from moe_lab.analysis.token_groups import grouping
from moe_lab.errors import AnalysisError, expected, require
from moe_lab.serving.expert_sets import expert_sets, require_real_experts
from moe_lab.serving.placement import Placement, place, placement_bound
from moe_lab.serving.sentences import ranged
from moe_lab.trace import Trace

REPEATS = 40
"""Random halves of the documents that ``tokens_needed`` draws."""
MAX_PARTS = 64
OTHERS = "all others"

Choose = Callable[[Floats], Placement]


@dataclass(frozen=True)
class Part:
    """Documents (and groups of their tokens) that are chosen or judged on.

    Attributes:
        name: for the frame.
        units: [U'] units.
        groups: of their tokens, or None for all.
    """

    name: str
    units: NDArray[np.int64]
    groups: tuple[int, ...] | None = None


def placement_transfer(
    trace: Trace,
    devices: int,
    slots: int | None = None,
    method: str = "eplb",
    *,
    by: str = "documents",
    nodes: int = 1,
    groups: int = 1,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """Choose a placement on one part of a trace, judge it on another.

    Args:
        trace: also one made up from counts.
        devices, slots, method, nodes, groups: as ``place``.
        by: "documents" (a random half, the other half), "time" (the first half of the documents,
            the second), or a token column: each value in turn, judged on each other value and on
            all others together.

    Returns:
        [chosen_on, judged_on, method, imbalance, lo, hi, in_sample, contiguous, contiguous_lo,
        contiguous_hi, gain, gain_lo, gain_hi, bound, beats, n_docs, note]: ``imbalance`` on the
        judged part, ``in_sample`` on the chosen one; ``contiguous`` and ``bound`` on the judged
        part; ``gain`` is contiguous less imbalance; ``beats`` is "yes" or "no" where the interval
        of the gain excludes 0, else "cannot tell". Intervals resample the judged documents.

    Raises:
        ConfigError: as ``place``. AnalysisError: aliased experts; one document; "time" of a trace
            made up from counts; a column with one value.

    Example:
        >>> placement_transfer(trace, devices=8, slots=72, by="domain")
    """
    require_real_experts(trace, "placement")
    table = _Loads(trace, by, seed)

    def choose(load: Floats) -> Placement:
        return place(load, devices, slots, method, nodes=nodes, groups=groups)

    contiguous = place(table.load(table.everything), devices, slots, "contiguous", nodes=nodes)
    resampling = Resampling(resamples, seed, level)
    rows = [
        [chosen.name, judged.name, method,
         *_judged(table, choose, contiguous, chosen, judged, resampling, devices, slots)]
        for chosen, judged in table.pairs()
    ]  # fmt: skip
    numbers = ("imbalance", "lo", "hi", "in_sample", "contiguous", "contiguous_lo",
               "contiguous_hi", "gain", "gain_lo", "gain_hi", "bound")  # fmt: skip
    schema = {
        **dict.fromkeys(("chosen_on", "judged_on", "method"), pl.String),
        **dict.fromkeys(numbers, pl.Float64),
        "beats": pl.String,
        "n_docs": pl.Int64,
        "note": pl.String,
    }
    return nulls(pl.DataFrame(rows, schema=schema, orient="row"))


def _judged(
    table: "_Loads",
    choose: Choose,
    contiguous: Placement,
    chosen: Part,
    judged: Part,
    resampling: Resampling,
    devices: int,
    slots: int | None,
) -> list:
    known, unseen = table.load(chosen), table.load(judged)
    placement = choose(known)
    counts_UN = table.counts(judged)
    # A document counts where it has tokens of the part.
    present = counts_UN.sum(axis=(1, 2)) > 0
    counts_UN = counts_UN[present]

    def both(weights: Floats) -> Floats:
        load = np.einsum("bu,ule->ble", weights, counts_UN)
        values = np.stack(
            [
                np.stack([_over_layers(one.imbalance(row)) for row in load])
                for one in (placement, contiguous)
            ]
        ).T
        return np.column_stack([values, values[:, 1] - values[:, 0]])

    low, high = resampling.interval(both, len(counts_UN))
    at = both(np.ones((1, len(counts_UN))))[0]
    bound = _over_layers(placement_bound(unseen, devices, slots))
    beats = "yes" if low[2] > 0 else "no" if high[2] < 0 else "cannot tell"
    number = int(present.sum())
    note = "" if number >= MIN_DOCUMENTS else f"No interval: fewer than {MIN_DOCUMENTS} documents."
    in_sample = _over_layers(placement.imbalance(known))
    return [
        at[0], low[0], high[0], in_sample, at[1], low[1], high[1], at[2], low[2], high[2], bound,
        beats, number, note,
    ]  # fmt: skip


def _over_layers(values_L: Floats) -> float:
    """Mean over the layers in which a real expert ran, NaN where there is none."""
    known = values_L[~np.isnan(values_L)]
    return float(known.mean()) if len(known) else math.nan


class _Loads:
    """Slots of each real expert by unit of documents, group of tokens and layer."""

    def __init__(self, trace: Trace, by: str, seed: int) -> None:
        self.layers = sorted(trace.meta.layers, key=lambda layer: layer.layer)
        experts = {layer.num_experts for layer in self.layers}
        if len(experts) != 1:
            raise AnalysisError(expected("layers with one number of experts", sorted(experts)))
        if by == "time" and not trace.meta.per_token:
            want = "a trace of tokens in their order for by='time'"
            raise AnalysisError(expected(want, "one made up from counts"))
        split = by in ("documents", "time")
        self.groups = None if split else grouping(trace, by)
        cells = experts.copy().pop() * len(self.layers) * (len(self.groups) if self.groups else 1)
        self.docs: Documents = documents(trace, cells)
        self.table = np.stack(
            [
                counts_UGE[:, :, : layer.num_experts]
                for layer, counts_UGE in zip(
                    self.layers,
                    unit_counts(trace, self.layers, self.docs, self.groups),
                    strict=True,
                )
            ],
            axis=2,
        )  # [U, G, L, E]
        self.everything = Part("all", np.arange(self.docs.units))
        self.by, self.seed = by, seed
        if self.docs.units < 2:
            raise AnalysisError(
                expected("at least 2 documents to choose on one and judge on another", "1")
            )
        if self.groups is not None and not 2 <= len(self.groups) <= MAX_PARTS:
            what = f"a column of 2 to {MAX_PARTS} values"
            raise AnalysisError(expected(what, f"{by} of {len(self.groups)}"))

    def pairs(self) -> list[tuple[Part, Part]]:
        """(chosen on, judged on)."""
        if self.groups is not None:
            every = self.everything.units
            names = [str(name) for name in self.groups.values]
            parts = [Part(name, every, (place,)) for place, name in enumerate(names)]
            numbers = range(len(names))
            others = [
                Part(OTHERS, every, tuple(one for one in numbers if one != place))
                for place in numbers
            ]
            return [
                (one, judged)
                for one, rest in zip(parts, others, strict=True)
                for judged in (rest, *(other for other in parts if other is not one))
            ]
        units = np.arange(self.docs.units)
        names = "first half", "second half"
        if self.by == "documents":
            units = np.random.default_rng(self.seed).permutation(units)
            names = "half of the documents", "the other half"
        half = len(units) // 2
        return [(Part(names[0], np.sort(units[:half])), Part(names[1], np.sort(units[half:])))]

    def counts(self, part: Part) -> Floats:
        """[U', L, E] slots by unit."""
        table = self.table[part.units]
        chosen = table if part.groups is None else table[:, list(part.groups)]
        return chosen.sum(axis=1).astype(np.float64)

    def load(self, part: Part) -> Floats:
        """[L, E] slots."""
        return self.counts(part).sum(axis=0)


def tokens_needed(
    trace: Trace,
    devices: int,
    slots: int | None = None,
    method: str = "eplb",
    *,
    nodes: int = 1,
    groups: int = 1,
    repeats: int = REPEATS,
    seed: int = 0,
) -> pl.DataFrame:
    """The number of tokens that a placement must be chosen on before it beats the contiguous one on
    unseen text.

    Documents are halved at random, ``repeats`` times; placements are chosen on 1, 2, 4, ...
    documents of one half and judged on the whole other half.

    Returns:
        [documents, tokens, imbalance, lo, hi, contiguous, gain, gain_lo, gain_hi, beats]: means
        over repeats, and the middle 95 % of them; ``beats``: share of the repeats in which the
        placement was more even than contiguous. Enough is the first row with ``gain_lo`` above 0.

    Raises:
        As ``placement_transfer``; fewer than 2 documents; no real expert that ran.
    """
    require_real_experts(trace, "placement")
    table = _Loads(trace, "documents", seed)
    counts_ULE = table.counts(table.everything)
    require(counts_ULE.any(), "a trace in which a real expert ran", "none", error=AnalysisError)
    first = table.layers[0].layer
    fold = counted((table.docs.units,))
    (tokens_U,) = reduced([Sum(_tokens, (trace,), (first,), fold, (first, table.docs))])
    generator = np.random.default_rng(seed)
    half = len(counts_ULE) // 2
    sizes = [2**power for power in range(20) if 2**power < half] + [half]
    found: dict[int, list[tuple[float, float, float]]] = {size: [] for size in sizes}
    contiguous = place(counts_ULE.sum(axis=0), devices, slots, "contiguous", nodes=nodes)
    for _ in range(repeats):
        order = generator.permutation(len(counts_ULE))
        unseen = counts_ULE[order[half:]].sum(axis=0)
        base = _over_layers(contiguous.imbalance(unseen))
        for size in sizes:
            known = counts_ULE[order[:size]].sum(axis=0)
            placement = place(known, devices, slots, method, nodes=nodes, groups=groups)
            value = _over_layers(placement.imbalance(unseen))
            found[size].append((tokens_U[order[:size]].sum(), value, base))
    rows = []
    for size, values in found.items():
        tokens, imbalance, base = np.array(values).T
        gain = base - imbalance
        rows.append(
            [size, tokens.mean(), imbalance.mean(), *np.quantile(imbalance, [0.025, 0.975]),
             base.mean(), gain.mean(), *np.quantile(gain, [0.025, 0.975]), (gain > 0).mean()]
        )  # fmt: skip
    names = ("tokens", "imbalance", "lo", "hi", "contiguous", "gain", "gain_lo", "gain_hi", "beats")
    schema = {"documents": pl.Int64, **dict.fromkeys(names, pl.Float64)}
    return nulls(pl.DataFrame(rows, schema=schema, orient="row"))


def _tokens(trace: Trace, layer: int, docs: Documents) -> pl.DataFrame:
    """Cells of [U]: tokens of each unit."""
    tokens_U = np.zeros(docs.units, np.int64)
    for frame in trace.batches(layer, ["doc"]):
        add_counts(tokens_U, docs.unit(frame["doc"].to_numpy()))
    return cells(tokens_U)


def nodes_touched(
    trace: Trace,
    placement: Placement,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """The number of nodes that a token's experts are on, which is what crosses between nodes.

    An expert with replicas on several nodes is run on one that the token needs anyway, if any.

    Returns:
        [layer, nodes, lo, hi, crossing]: mean nodes that a token's real experts touch, and the mean
        number of them beyond the first, which is what is sent at least once more.

    Raises:
        AnalysisError: as ``expert_sets``; a placement of other layers or more than 62 nodes.
    """
    sets = expert_sets(trace)
    layers = tuple(layer.layer for layer in sets.layers)
    if layers != placement.layers:
        raise AnalysisError(expected("a placement of the traced layers", list(placement.layers)))
    require(placement.nodes <= 62, "at most 62 nodes", placement.nodes)
    experts = sorted({layer.num_experts for layer in sets.layers})
    require(
        experts == [placement.num_experts],
        f"a placement of the traced {experts} experts of a layer",
        placement.num_experts,
        error=AnalysisError,
    )
    mask_LE = np.zeros((len(layers), placement.num_experts + 1), np.int64)
    node_S = np.arange(placement.physical_to_logical.shape[1]) * placement.nodes
    node_S //= placement.physical_to_logical.shape[1]
    for place_, row in enumerate(placement.physical_to_logical):
        np.bitwise_or.at(mask_LE[place_], row, np.int64(1) << node_S)
    docs = documents(trace)
    require(docs.units, "a trace with tokens", "none", error=AnalysisError)
    fold = counted((docs.units, len(layers) + 1))
    table = sets.summed(_nodes, fold, (docs, mask_LE)).astype(np.float64)
    sums, counts = table[:, :-1], table[:, -1]
    resampling = Resampling(resamples, seed, level)
    low, high = resampling.interval(lambda w: w @ sums / (w @ counts)[:, None], docs.units)
    mean = sums.sum(axis=0) / counts.sum()
    return nulls(
        pl.DataFrame(
            {
                "layer": np.array(layers, np.uint32),
                "nodes": mean,
                "lo": low,
                "hi": high,
                "crossing": np.maximum(mean - 1, 0),
            }
        )
    )


def _nodes(trace: Trace, docs: Documents, mask_LE: NDArray[np.int64]) -> pl.DataFrame:
    """Cells of [U, L + 1]: nodes that the tokens of each unit touch in each layer, and tokens."""
    sets = expert_sets(trace)
    table = np.zeros((docs.units, len(sets.layers) + 1), np.int64)
    for key_T, _, ids_TLK in sets.tokens():
        unit_T = docs.unit((key_T >> np.uint64(32)).astype(np.uint32))
        add_counts(table[:, -1], unit_T)
        for at, mask_E in enumerate(mask_LE):
            # The last mask is that of a slot that was not used.
            touched_T = _touched(mask_E[np.minimum(ids_TLK[:, at], len(mask_E) - 1)])
            np.add.at(table[:, at], unit_T, touched_T)
    return cells(table)


def _touched(mask_TK: NDArray[np.int64]) -> NDArray[np.uint8]:
    """[T] nodes: those of experts on one node, then the others one by one."""
    single = (mask_TK & (mask_TK - 1)) == 0
    need = np.bitwise_or.reduce(np.where(single, mask_TK, 0), axis=1)
    for column, alone in zip(mask_TK.T, single.T, strict=True):
        missing = ~alone & ((need & column) == 0)
        need = np.where(missing, need | (column & -column), need)
    return np.bitwise_count(need)


def placement_sentence(frame: pl.DataFrame) -> str:
    """The transfer in one sentence, the interval first; of several parts the one that gains
    least.
    """
    known = frame.drop_nulls(["gain", "in_sample"])
    if known.is_empty():
        return "No placement could be judged: no real expert ran in one part of the text."
    together = known.filter(pl.col("judged_on") == OTHERS)
    row = (together if together.height else known).sort("gain").row(0, named=True)
    says = {
        "yes": "is more even than the contiguous one",
        "no": "is less even than the contiguous one",
    }.get(row["beats"], "cannot be told from the contiguous one")
    fullest = ranged(row["imbalance"], row["lo"], row["hi"], " times the mean load", 3)
    return (
        f"On text that it was not chosen on ({row['judged_on']}, chosen on {row['chosen_on']}), "
        f"the fullest device has {fullest}, and {row['contiguous']:.3f} times with the contiguous "
        f"placement: this placement {says}. On the text it was chosen on it has "
        f"{row['in_sample']:.3f}; on the other no placement can have less than {row['bound']:.3f}."
    )
