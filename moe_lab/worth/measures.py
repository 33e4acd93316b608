"""What a model loses without an expert, measured on held-out documents.

For each expert every document runs with one edit and without, so that all differences are paired.
``expert_losses`` sums them over documents, ``expert_worth`` takes means with intervals from
resampling documents. Shape letters: B batch, S sequence, T tokens, V vocabulary, E experts.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.document_pass import evaluating, length_batches, pad_right
from moe_lab.errors import AnalysisError, TraceError, require
from moe_lab.files import content_hash, write_parquet
from moe_lab.model import Decoder
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.fingerprints import model_hash
from moe_lab.trace.capturing.hooks import Hooks, Pass
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.interventions import Forbid, Silence, intervene
from moe_lab.worth.shared_prefix import SharedPrefix


class EditKind(StrEnum):
    """How an expert is taken away."""

    FORBID = "forbid"
    SILENCE = "silence"


_EDITS = {EditKind.FORBID: Forbid, EditKind.SILENCE: Silence}
SUMS = ("tokens", "d_loss", "kl", "used", "d_loss_used")
Experts = int | Sequence[tuple[int, int]] | None


@dataclass(frozen=True)
class Document:
    """Token ids [n] of the document at place ``number`` among those given."""

    number: int
    ids: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Documents padded on the right: ids and mask [B, S]."""

    documents: Sequence[Document]
    ids: Tensor
    mask: Tensor


def expert_losses(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    *,
    experts: Experts = None,
    edit: EditKind = EditKind.FORBID,
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
        batch_tokens: tokens of a forward pass, padding included.
        path: a Parquet file that takes the result layer by layer. Layers that it holds are not
            measured again.
        readers: as for ``capture``.

    Returns:
        [layer, expert, edit, doc, tokens, d_loss, kl, used, d_loss_used]: sums over the predicted
        tokens of a document (numbered as given). ``d_loss`` is the loss with the edit less the
        loss without, in nats; ``kl`` the divergence of the edited prediction from the untouched
        one, in nats; ``used`` the tokens predicted at places that used the expert, and
        ``d_loss_used`` the difference of their losses.

    Raises:
        AnalysisError: no document of two tokens; ``path`` holds another measurement.
        TraceError: an expert that is not there or cannot be edited.
    """
    sites, _ = find_sites(model, readers, None)
    chosen = _chosen(sites, experts, seed)
    batches = padded_batches(documents, batch_tokens)
    key = _key(model, documents, edit)
    done = _resumed(path, key)
    with evaluating(model), torch.no_grad():
        for site in sites:
            held = done.filter(pl.col("layer") == site.layer)["expert"].unique().to_list()
            missing = [number for number in chosen[site.layer] if number not in held]
            if not missing:
                continue
            rows = _measure_layer(model, site, missing, edit, batches, len(documents), readers)
            done = pl.concat([done, rows.with_columns(measured=pl.lit(key))])
            if path is not None:
                write_parquet(path, done)
    pairs = [(layer, number) for layer, numbers in chosen.items() for number in numbers]
    wanted = pl.DataFrame(pairs, schema={"layer": pl.Int64, "expert": pl.Int64}, orient="row")
    return done.join(wanted, on=["layer", "expert"], how="semi").drop("measured").sort(_ORDER)


_ORDER = ("layer", "expert", "doc")
_SCHEMA = {
    "layer": pl.Int64,
    "expert": pl.Int64,
    "edit": pl.String,
    "doc": pl.Int64,
    **dict.fromkeys(SUMS, pl.Float64),
    "measured": pl.String,
}


def expert_worth(
    losses: pl.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """Means of ``expert_losses`` over tokens, with intervals from resampling documents.

    Returns:
        [layer, expert, edit, d_loss, lo, hi, d_loss_used, used_lo, used_hi, kl, tokens, used,
        docs]: nats per predicted token, over all tokens and over those predicted where the expert
        was used (null where it never was). Intervals are null below five documents.

    Example:
        >>> worth = expert_worth(expert_losses(model, documents))
        >>> worth.sort("d_loss").head()  # the experts that the model needs least
    """
    keys = ["layer", "expert", "edit"]
    numbers = losses["doc"].unique().sort()
    table = losses.sort(*_ORDER)
    names = table.select(keys).unique(maintain_order=True)
    require(
        table.height == names.height * len(numbers) and table.height > 0,
        "one row for each expert and document",
        f"{table.height} rows of {names.height} experts and {len(numbers)} documents",
        error=AnalysisError,
        field="losses",
    )
    sums = {
        name: table[name].to_numpy().reshape(names.height, len(numbers)).T for name in SUMS
    }  # [docs, experts]

    def ratio(above: str, below: str) -> Callable[[Floats], Floats]:
        def statistic(weights: Floats) -> Floats:
            total = weights @ sums[below]
            return np.divide(
                weights @ sums[above], total, out=np.full(total.shape, np.nan), where=total > 0
            )

        return statistic

    def interval(above: str, below: str) -> tuple[Floats, Floats]:
        rests_on = (sums[below] > 0).sum(axis=0)
        return resampling.interval(ratio(above, below), len(numbers), rests_on)

    resampling, whole = Resampling(resamples, seed, level), np.ones((1, len(numbers)))
    low, high = interval("d_loss", "tokens")
    used_low, used_high = interval("d_loss_used", "used")
    return names.with_columns(
        d_loss=ratio("d_loss", "tokens")(whole)[0],
        lo=low,
        hi=high,
        d_loss_used=ratio("d_loss_used", "used")(whole)[0],
        used_lo=used_low,
        used_hi=used_high,
        kl=ratio("kl", "tokens")(whole)[0],
        tokens=pl.Series(sums["tokens"].sum(axis=0)).cast(pl.Int64),
        used=pl.Series(sums["used"].sum(axis=0)).cast(pl.Int64),
        docs=len(numbers),
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


# ------------------------------------------------------------------------------------------------
# passes


def _measure_layer(
    model: nn.Module,
    site: TracedRouter,
    experts: Sequence[int],
    edit: EditKind,
    batches: Sequence[Batch],
    documents: int,
    readers: Mapping[str, Reader] | None,
) -> pl.DataFrame:
    """Rows of the experts of one layer."""
    sums = np.zeros((len(experts), documents, len(SUMS)))
    for batch in batches:
        untouched = _Untouched(model, site, batch)
        for place, expert in enumerate(experts):
            numbers, rows = untouched.differences(expert, edit, readers)
            sums[place, numbers] = rows
    docs = np.flatnonzero(sums[0, :, 0])
    count = len(docs)
    return pl.DataFrame(
        {
            "layer": np.full(len(experts) * count, site.layer),
            "expert": np.repeat(np.asarray(experts), count),
            "edit": [edit.value] * (len(experts) * count),
            "doc": np.tile(docs, len(experts)),
            **{name: sums[:, docs, place].reshape(-1) for place, name in enumerate(SUMS)},
        }
    )


class _Untouched:
    """The untouched pass of a batch: log-probabilities, what the router chose, and the layers below
    it.
    """

    def __init__(self, model: nn.Module, site: TracedRouter, batch: Batch) -> None:
        self.model, self.site, self.batch = model, site, batch
        self.prefix = SharedPrefix(model, site)
        self._chosen: list[Tensor] = []
        hooks = Hooks(model, [site], self._read, ratio=False)
        try:
            with self.prefix.recorded():
                logits = logits_of(model, batch)
        finally:
            hooks.remove()
        self.log_p = list(self._log_p(logits))

    def _read(self, running: Pass, output: Any) -> None:
        readings = self.site.readings(running.calls[0], self.batch.ids.numel())
        self._chosen = [reading.indices for reading in readings]

    def _log_p(self, logits_BSV: Tensor) -> Iterator[Tensor]:
        """[n - 1, V] of each document."""
        for row, document in enumerate(self.batch.documents):
            yield logits_BSV[row, : len(document.ids) - 1].float().log_softmax(dim=1)

    def differences(
        self, expert: int, edit: EditKind, readers: Mapping[str, Reader] | None
    ) -> tuple[list[int], np.ndarray]:
        """Numbers of the documents, and their sums [n, len(SUMS)]."""
        edited = intervene(self.model, _EDITS[edit](self.site.layer, expert), readers=readers)
        with edited, self.prefix.reused():
            logits = logits_of(self.model, self.batch)
        shape = self.batch.ids.shape
        used_BS = torch.stack(
            [(ids_TK == expert).any(dim=1).view(shape) for ids_TK in self._chosen]
        ).any(dim=0)
        rows = []
        for row, (document, before, after) in enumerate(
            zip(self.batch.documents, self.log_p, self._log_p(logits), strict=True)
        ):
            targets = torch.from_numpy(document.ids[1:].astype(np.int64)).to(before.device)
            moved = before - after
            loss = moved.gather(1, targets[:, None])[:, 0].double()
            used = used_BS[row, : len(targets)].to(loss.device)
            kl = (before.exp() * moved).sum().double()
            sums = (loss.sum(), kl, used.sum(), loss[used].sum())
            rows.append([len(targets), *(float(value) for value in sums)])
        return [document.number for document in self.batch.documents], np.array(rows)


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
        untouched = _Untouched(model, site, batch)
        middle = perf_counter()
        untouched.differences(0, edit, readers)
    return middle - start, perf_counter() - middle


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """[B, S, V] of one batch."""
    parameter = next(model.parameters())
    ids, mask = batch.ids.to(parameter.device), batch.mask.to(parameter.device)
    if isinstance(model, Decoder):
        return model(ids, valid_BS=mask.bool()).logits
    output = model(input_ids=ids, attention_mask=mask, use_cache=False)
    logits = getattr(output, "logits", None)
    require(
        isinstance(logits, Tensor),
        "a model that returns logits over its vocabulary",
        type(output).__name__,
        error=TraceError,
        field="model",
    )
    assert isinstance(logits, Tensor)
    return logits


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


def padded_batches(documents: Sequence[np.ndarray], batch_tokens: int) -> list[Batch]:
    """Documents of at least two tokens in batches of about equal lengths."""
    whole = [
        Document(number, np.asarray(ids)) for number, ids in enumerate(documents) if len(ids) > 1
    ]
    require(
        whole, "a document of at least two tokens", "none", error=AnalysisError, field="documents"
    )
    return [
        Batch(chosen, *pad_right(chosen, None)) for chosen in length_batches(whole, batch_tokens)
    ]


def _key(model: nn.Module, documents: Sequence[np.ndarray], edit: EditKind) -> str:
    """Hash of the model's configuration and parameters, of the documents, and of the edit."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "big") + np.asarray(ids, np.int64).tobytes())
    sums = [
        [name, float(value.detach().double().sum())] for name, value in model.state_dict().items()
    ]
    return content_hash([model_hash(model), sums, digest.hexdigest(), edit.value])


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
