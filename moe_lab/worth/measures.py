"""What a model loses without an expert, measured on held-out documents.

For each expert every document runs with one edit and without, so that all differences are paired.
``expert_losses`` sums them over documents, ``expert_worth`` takes means with intervals from
resampling documents.
"""

import hashlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from time import perf_counter

import numpy as np
import polars as pl
import torch
from torch import nn

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.analysis.document_bootstrap import RESAMPLES, Resampling
from moe_lab.document_pass import evaluating
from moe_lab.errors import AnalysisError, TraceError, require
from moe_lab.files import content_hash, write_parquet
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.fingerprints import model_hash
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.document_means import ratios, tables
from moe_lab.worth.interventions import Forbid, Silence
from moe_lab.worth.paired_passes import SUMS, Batch, Untouched, edited_sums, padded_batches
from moe_lab.worth.token_groups import Classes, TokenGroups


class EditKind(StrEnum):
    """How an expert is taken away."""

    FORBID = "forbid"
    SILENCE = "silence"


_EDITS = {EditKind.FORBID: Forbid, EditKind.SILENCE: Silence}
Experts = int | Sequence[tuple[int, int]] | None


def expert_losses(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    *,
    experts: Experts = None,
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
        edit: "forbid": the router chooses among the others; "silence": nothing takes its place.
        classes: column -> for each document the class of each of its tokens (None: in no class):
            columns of ``token_classes``, or a domain for all tokens of a document.
        align: a loss counts for the class of the predicted token ("target"), or of the token at
            whose place it is predicted, which the routers see ("input").
        batch_tokens: tokens of a forward pass, padding included.
        path: a Parquet file that takes the result layer by layer. Layers that it holds are not
            measured again.
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
        TraceError: an expert that is not there or cannot be edited.
    """
    sites, _ = find_sites(model, readers, None)
    chosen = _chosen(sites, experts, seed)
    groups = TokenGroups(documents, classes, align)
    key = _key(model, documents, edit, classes, align)
    done = _resumed(path, key)
    for site in sites:
        held = done.filter(pl.col("layer") == site.layer)["expert"].unique().to_list()
        missing = [number for number in chosen[site.layer] if number not in held]
        if not missing:
            continue
        edits = [[_EDITS[edit](site.layer, expert)] for expert in missing]
        sums = edited_sums(
            model, documents, edits, groups, batch_tokens=batch_tokens, readers=readers
        )
        rows = groups.frame(sums, SUMS)
        rows = rows.with_columns(
            layer=pl.lit(site.layer, pl.Int64),
            expert=pl.col("set").replace_strict(
                range(len(missing)), missing, return_dtype=pl.Int64
            ),
            edit=pl.lit(edit.value),
            measured=pl.lit(key),
        )
        done = pl.concat([done, rows.select(*_SCHEMA)])
        if path is not None:
            write_parquet(path, done)
    pairs = [(layer, number) for layer, numbers in chosen.items() for number in numbers]
    wanted = pl.DataFrame(pairs, schema={"layer": pl.Int64, "expert": pl.Int64}, orient="row")
    return done.join(wanted, on=["layer", "expert"], how="semi").drop("measured").sort(_ORDER)


_ORDER = ("layer", "expert", "by", "class", "doc")
_SCHEMA = {
    "layer": pl.Int64,
    "expert": pl.Int64,
    "edit": pl.String,
    "by": pl.String,
    "class": pl.String,
    "doc": pl.Int64,
    **dict.fromkeys(SUMS, pl.Float64),
    "measured": pl.String,
}


def expert_worth(
    losses: pl.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """Means of ``expert_losses`` over tokens, with intervals from resampling documents.

    Returns:
        [layer, expert, edit, by, class, d_loss, lo, hi, d_loss_used, used_lo, used_hi, kl, tokens,
        used, docs]: nats per predicted token, over all tokens and over those predicted where the
        expert was used (null where it never was), of all tokens (``by`` and ``class`` null) and of
        each class. Intervals are null where fewer than five documents have such tokens.

    Example:
        >>> worth = expert_worth(expert_losses(model, documents))
        >>> worth.sort("d_loss").head()  # the experts that the model needs least
    """
    names, sums = tables(losses, ["layer", "expert", "edit", "by", "class"], SUMS)
    resampling = Resampling(resamples, seed, level)
    mean, low, high = ratios(sums["d_loss"], sums["tokens"], resampling)
    mean_used, used_low, used_high = ratios(sums["d_loss_used"], sums["used"], resampling)
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
    edit: EditKind = EditKind.FORBID,
    batch_tokens: int = 2048,
    seed: int = 0,
    readers: Mapping[str, Reader] | None = None,
) -> float:
    """Minutes that ``expert_losses`` will take with the same arguments, from timing its passes
    over one batch at the first and the last router.
    """
    sites, _ = find_sites(model, readers, None)
    chosen = _chosen(sites, experts, seed)
    batches = padded_batches(documents, batch_tokens)
    batch = batches[len(batches) // 2]
    share = sum(item.ids.numel() for item in batches) / batch.ids.numel()
    with evaluating(model), torch.no_grad():
        ends = [_pass_seconds(model, site, edit, batch, readers) for site in (sites[0], sites[-1])]
    seconds = 0.0
    for place, site in enumerate(sites):
        between = place / max(len(sites) - 1, 1)
        untouched, edited = ((1 - between) * a + between * b for a, b in zip(*ends, strict=True))
        number = len(chosen[site.layer])
        seconds += share * (untouched + number * edited) if number else 0
    return seconds / 60


def _pass_seconds(
    model: nn.Module,
    site: TracedRouter,
    edit: EditKind,
    batch: Batch,
    readers: Mapping[str, Reader] | None,
) -> tuple[float, float]:
    """Seconds of the untouched pass and of an edited one, the second time that each runs."""
    start = middle = 0.0
    for _ in range(2):
        start = perf_counter()
        untouched = Untouched(model, site, [site], batch)
        middle = perf_counter()
        untouched.differences([_EDITS[edit](site.layer, 0)], readers)
    return middle - start, perf_counter() - middle


# ------------------------------------------------------------------------------------------------
# what is measured


def _chosen(sites: Sequence[TracedRouter], experts: Experts, seed: int) -> dict[int, list[int]]:
    """Layer -> its experts that are measured, in order."""
    sizes = {site.layer: site.num_experts or 0 for site in sites}
    if experts is None:
        return {layer: list(range(size)) for layer, size in sizes.items()}
    if isinstance(experts, int):
        require(experts >= 1, "at least 1 expert of each layer", experts, field="experts")
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


def _key(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    edit: EditKind,
    classes: Classes | None,
    align: Align,
) -> str:
    """Hash of the model's configuration and parameters, and of what is measured."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "big") + np.asarray(ids, np.int64).tobytes())
    sums = [
        [name, float(value.detach().double().sum())] for name, value in model.state_dict().items()
    ]
    labels = {name: [list(values) for values in given] for name, given in (classes or {}).items()}
    return content_hash(
        [model_hash(model), sums, digest.hexdigest(), edit.value, labels, Align(align).value]
    )


def _resumed(path: Path | str | None, key: str) -> pl.DataFrame:
    """The layers that the file holds; none where there is no file."""
    if path is None or not Path(path).exists():
        return pl.DataFrame(schema=_SCHEMA)
    frame = pl.read_parquet(path)
    same = frame.schema == _SCHEMA and frame["measured"].unique().to_list() == [key]
    require(
        same,
        f"the measurement of this model, text and edit in {path}",
        "another file",
        "another path",
        error=AnalysisError,
        field="path",
    )
    return frame
