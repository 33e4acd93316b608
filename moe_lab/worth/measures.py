"""What a model loses without an expert, measured on held-out documents.

For each expert every document runs with one edit and without, so that all differences are paired.
``expert_losses`` sums them over documents, ``expert_worth`` takes means with intervals over
documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from time import perf_counter

import numpy as np
import polars as pl
import torch
from torch import nn

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.document_pass import evaluating
from moe_lab.errors import TraceError, require
from moe_lab.progress import tell
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.batches import Batch, padded_batches
from moe_lab.worth.decisions import find_form
from moe_lab.worth.document_means import ratios, tables
from moe_lab.worth.edits import Forbid, Silence
from moe_lab.worth.measured_rows import MEASURED, SUMS, MeasuredRows, measurement_key
from moe_lab.worth.paired_passes import Untouched
from moe_lab.worth.token_groups import Classes, TokenGroups


class EditKind(StrEnum):
    """How an expert is taken away."""

    FORBID = "forbid"
    SILENCE = "silence"


EDITS = {EditKind.FORBID: Forbid, EditKind.SILENCE: Silence}
Experts = int | Sequence[tuple[int, int]] | None
TIMED_SECONDS = 1.0
"""The passes of a layer are timed until they took so long."""


def expert_losses(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    *,
    experts: Experts = None,
    layers: Sequence[int] | None = None,
    edit: EditKind = EditKind.FORBID,
    classes: Classes | None = None,
    align: Align = Align.TARGET,
    batch_tokens: int = 2048,
    seed: int = 0,
    path: Path | str | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> pl.DataFrame:
    """What each document loses without an expert, one expert at a time.

    Args:
        model: that ``intervene`` can edit; it maps token ids to logits.
        documents: token ids [n] each, of texts that the model was not trained on, within its
            context.
        experts: (layer, expert) pairs; a number: so many real experts of each layer, drawn with
            ``seed``; None: all real experts.
        layers: those that are measured; None: all with experts.
        edit: "forbid": the router chooses among the others; "silence": nothing takes its place.
        classes: column -> for each document the class of each of its tokens (None: in no class):
            columns of ``token_classes``, or a domain for all tokens of a document.
        align: a loss counts for the class of the predicted token ("target"), or of the token at
            whose place it is predicted, which the routers see ("input").
        batch_tokens: tokens of a forward pass, padding included.
        path: a Parquet file that takes the result as it grows. Rows that it holds are not measured
            again.
        readers: as for ``capture``.

    Returns:
        [layer, expert, edit, by, class, doc, tokens, d_loss, kl, used, d_loss_used]: sums over the
        predicted tokens of a document (numbered as given), all of them where ``by`` and ``class``
        are null, then those of each class of each column. ``d_loss`` is the loss with the edit less
        the loss without, in nats; ``kl`` the divergence of the edited prediction from the untouched
        one, in nats; ``used`` the tokens predicted at places that used the expert, and
        ``d_loss_used`` the difference of their losses.

    Raises:
        AnalysisError: no document of two tokens; ``path`` holds another measurement.
        TraceError: a layer or expert that is not there or cannot be edited.
    """
    task = _Task.of(model, documents, experts, layers, batch_tokens, seed, readers)
    rows = _rows(path, model, documents, edit, TokenGroups(documents, classes, align))
    left = task.left(rows)
    done, total = 0, sum(len(missing) * task.height(site) for site, _, missing in left)
    with evaluating(model), torch.no_grad():
        try:
            for site, batch, missing in left:
                untouched = Untouched(model, site, [site], batch)
                matrix = rows.groups.matrix(batch.documents)
                for expert in missing:
                    tell("measuring experts", done, total)
                    edits = [EDITS[edit](site.layer, expert)]
                    sums = untouched.sums(edits, matrix, readers)
                    rows.add((site.layer, expert), batch.documents, sums)
                    done += task.height(site)
        finally:
            rows.write()
    tell("measuring experts", total, total)
    pairs = [(layer, number) for layer, numbers in task.chosen.items() for number in numbers]
    return rows.of(pairs)


def expert_worth(losses: pl.DataFrame, *, level: float = 0.95) -> pl.DataFrame:
    """Means of ``expert_losses`` over tokens, with intervals over documents.

    Returns:
        [layer, expert, edit, by, class, d_loss, lo, hi, d_loss_used, used_lo, used_hi, kl, tokens,
        used, docs]: nats per predicted token, over all tokens and over those predicted where the
        expert was used (null where it never was), of all tokens (``by`` and ``class`` null) and of
        each class. Intervals are null where fewer than five documents used the expert.

    Example:
        >>> worth = expert_worth(expert_losses(model, documents))
        >>> worth.sort("d_loss").head()  # the experts that the model needs least
    """
    names, sums = tables(losses, ["layer", "expert", "edit", "by", "class"], SUMS)
    touched = (sums["used"] > 0) | (sums["d_loss"] != 0)
    mean, low, high = ratios(sums["d_loss"], sums["tokens"], level, touched)
    mean_used, used_low, used_high = ratios(sums["d_loss_used"], sums["used"], level)
    total = {name: values.sum(axis=0) for name, values in sums.items()}
    return names.with_columns(
        d_loss=mean,
        lo=low,
        hi=high,
        d_loss_used=mean_used,
        used_lo=used_low,
        used_hi=used_high,
        kl=total["kl"] / total["tokens"],
        tokens=pl.Series(total["tokens"]).cast(pl.Int64),
        used=pl.Series(total["used"]).cast(pl.Int64),
        docs=pl.Series((sums["tokens"] > 0).sum(axis=0)).cast(pl.Int64),
    ).with_columns(pl.col(pl.Float64).fill_nan(None))


def expert_minutes(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    *,
    experts: Experts = None,
    layers: Sequence[int] | None = None,
    edit: EditKind = EditKind.FORBID,
    classes: Classes | None = None,
    align: Align = Align.TARGET,
    batch_tokens: int = 2048,
    seed: int = 0,
    path: Path | str | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> float:
    """Minutes that ``expert_losses`` will take with the same arguments, from timing its passes
    over one batch at the first and the last layer.
    """
    task = _Task.of(model, documents, experts, layers, batch_tokens, seed, readers)
    rows = _rows(path, model, documents, edit, TokenGroups(documents, classes, align))
    batch = task.batches[len(task.batches) // 2]
    first, last = task.sites[0], task.sites[-1]
    with evaluating(model), torch.no_grad():
        ends = [_pass_seconds(model, site, edit, batch, readers) for site in (first, last)]
    steps = max(task.height(first) - task.height(last), 1)
    seconds = 0.0
    for site, item, missing in task.left(rows):
        between = (task.height(first) - task.height(site)) / steps
        untouched, edited = ((1 - between) * a + between * b for a, b in zip(*ends, strict=True))
        seconds += item.ids.numel() / batch.ids.numel() * (untouched + len(missing) * edited)
    return seconds / 60


def _rows(
    path: Path | str | None,
    model: nn.Module,
    documents: Sequence[np.ndarray],
    edit: EditKind,
    groups: TokenGroups,
) -> MeasuredRows:
    """The sums that ``expert_losses`` wrote to ``path``."""
    key = measurement_key(path, model, documents, edit, groups)
    keys = {"layer": pl.Int64, "expert": pl.Int64}
    return MeasuredRows(path, groups, keys, {"edit": edit.value, MEASURED: key})


def _pass_seconds(
    model: nn.Module,
    site: TracedRouter,
    edit: EditKind,
    batch: Batch,
    readers: Mapping[str, Reader] | None,
) -> tuple[float, float]:
    """Mean seconds of the untouched pass, and of an edited one times the share of experts that need
    one; the first pass of each kind is not counted.
    """
    untouched = Untouched(model, site, [site], batch)
    every = [[EDITS[edit](site.layer, expert)] for expert in range(site.num_experts or 0)]
    needed = [edits for edits in every if untouched.changes(edits)]
    times = np.zeros((0, 2))
    for edits in needed[:1]:
        untouched.differences(edits, readers)
    while times.sum() < TIMED_SECONDS:
        start = perf_counter()
        untouched = Untouched(model, site, [site], batch)
        middle = perf_counter()
        for edits in needed[:1]:
            untouched.differences(edits, readers)
        times = np.append(times, [[middle - start, perf_counter() - middle]], axis=0)
    whole, edited = times.mean(axis=0).tolist()
    return whole, edited * len(needed) / len(every)


@dataclass(frozen=True)
class _Task:
    """The passes of a measurement.

    Attributes:
        sites: routers of the layers that are measured, in order.
        chosen: layer -> its experts that are measured, in order.
        heights: layer -> how many routers of the model are not below its own.
    """

    sites: Sequence[TracedRouter]
    chosen: Mapping[int, Sequence[int]]
    batches: Sequence[Batch]
    heights: Mapping[int, int]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        documents: Sequence[np.ndarray],
        experts: Experts,
        layers: Sequence[int] | None,
        batch_tokens: int,
        seed: int,
        readers: Mapping[str, Reader] | None,
    ) -> "_Task":
        sites, _ = find_sites(model, readers, None)
        heights = {site.layer: len(sites) - place for place, site in enumerate(sites)}
        for layer in layers or ():
            require(
                layer in heights,
                f"layers among {sorted(heights)}",
                layer,
                error=TraceError,
                field="layers",
            )
        chosen = {
            layer: numbers
            for layer, numbers in _chosen(sites, experts, seed).items()
            if numbers and (layers is None or layer in layers)
        }
        sites = [site for site in sites if site.layer in chosen]
        for site in sites:
            find_form(site, None)  # raises where nothing can be edited
        return cls(sites, chosen, padded_batches(model, documents, batch_tokens), heights)

    def height(self, site: TracedRouter) -> int:
        """The cost of an edited pass, in layers."""
        return self.heights[site.layer]

    def left(self, rows: MeasuredRows) -> list[tuple[TracedRouter, Batch, list[int]]]:
        """The experts of each layer and batch that ``rows`` does not hold."""
        left = []
        for site in self.sites:
            for batch in self.batches:
                missing = [
                    expert
                    for expert in self.chosen[site.layer]
                    if rows.lacks((site.layer, expert), batch.documents)
                ]
                if missing:
                    left.append((site, batch, missing))
        return left


def _chosen(sites: Sequence[TracedRouter], experts: Experts, seed: int) -> dict[int, list[int]]:
    """Layer -> its experts that are measured, in order."""
    sizes = {site.layer: site.num_experts or 0 for site in sites}
    for site in sites:
        require(
            site.num_experts,
            "a router whose number of experts is configured",
            "none",
            error=TraceError,
            where=site,
            field=site.name,
        )
    if experts is None:
        return {layer: list(range(size)) for layer, size in sizes.items()}
    if isinstance(experts, int):
        most = max(sizes.values(), default=0)
        what = f"1 to {most} experts, as many as a layer has"
        require(1 <= experts <= most, what, experts, field="experts")
        generator = np.random.default_rng(seed)
        return {
            layer: sorted(generator.permutation(size)[:experts].tolist())
            for layer, size in sizes.items()
        }
    chosen: dict[int, list[int]] = {layer: [] for layer in sizes}
    for layer, number in experts:
        require(
            0 <= number < sizes.get(layer, 0),
            f"(layer, expert) pairs of the layers {sorted(sizes)}",
            (layer, number),
            error=TraceError,
            field="experts",
        )
        chosen[layer].append(number)
    return {layer: sorted(set(numbers)) for layer, numbers in chosen.items()}
