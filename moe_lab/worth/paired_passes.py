"""Documents run with the routing of a model edited and untouched, so that differences are paired.

``edited_sums`` runs sets of edits; all sets whose lowest edited layer is the same share one pass of
the layers below it. Shape letters: B batch, S sequence, N predicted tokens of a batch, V
vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn

from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.document_pass import evaluating
from moe_lab.errors import TraceError, require
from moe_lab.files import content_hash
from moe_lab.model import Decoder
from moe_lab.progress import tell
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.hooks import Hooks, Pass
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.batches import Batch, padded_batches
from moe_lab.worth.edits import Edit, Exchange, Forbid, Silence, TopK
from moe_lab.worth.interventions import intervene
from moe_lab.worth.measured_rows import MEASURED, SUMS, Key, MeasuredRows, measurement_key
from moe_lab.worth.shared_prefix import SharedPrefix
from moe_lab.worth.token_groups import TokenGroups

BLOCK_CELLS = 2**24
EditSet: TypeAlias = Sequence[Edit]


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


class Untouched:
    """The untouched pass of a batch: log-probabilities, and what routers chose.

    Args:
        site: the lowest router that edits will name; the layers below it are shared.
        watched: routers whose choice is kept.
    """

    def __init__(
        self, model: nn.Module, site: TracedRouter, watched: Sequence[TracedRouter], batch: Batch
    ) -> None:
        self.model, self.batch = model, batch
        self.prefix = SharedPrefix(model, site)
        self._chosen: dict[int, list[Tensor]] = {}

        def read(running: Pass, output: Any) -> None:
            for place, router in enumerate(watched):
                readings = router.readings(running.calls[place], batch.ids.numel())
                self._chosen[router.layer] = [reading.indices for reading in readings]

        hooks = Hooks(model, watched, read, ratio=False)
        try:
            with self.prefix.recorded():
                logits = logits_of(model, batch)
        finally:
            hooks.remove()
        self._log_p = list(log_probabilities(logits, batch))

    def used(self, named: Mapping[int, Sequence[int]]) -> NDArray[np.bool_]:
        """[N] was the token predicted at a place that used one of these experts of these layers?"""
        return self._used(named)[self.batch.predicts].numpy()

    def _used(self, named: Mapping[int, Sequence[int]]) -> Tensor:
        """[B, S] was one of these experts used, padding included?"""
        used_BS = torch.zeros_like(self.batch.predicts)
        for layer, experts in named.items():
            for ids_TK in self._chosen[layer]:
                wanted = torch.tensor(experts, device=ids_TK.device)
                found_T = torch.isin(ids_TK, wanted).any(dim=1)
                used_BS |= found_T.view(used_BS.shape).to(used_BS.device)
        return used_BS

    def changes(self, edits: EditSet) -> bool:
        """False where the edits silence experts that no token of the batch used, or name none of
        its tokens.
        """
        if all(isinstance(edit, Silence) for edit in edits):
            return bool(self._used(named_experts(edits)).any())
        named = [edit.tokens for edit in edits if isinstance(edit, TopK)]
        return len(named) < len(edits) or any(part is None or bool(part.any()) for part in named)

    def differences(
        self, edits: EditSet, readers: Mapping[str, Reader] | None = None
    ) -> tuple[Floats, Floats]:
        """[N] the loss under the edits less the loss without, and the divergence of the edited
        prediction from the untouched one, in nats.
        """
        if not self.changes(edits):
            zeros = np.zeros((2, len(self.batch.docs)))
            return zeros[0], zeros[1]
        with intervene(self.model, *edits, readers=readers), self.prefix.reused():
            logits = logits_of(self.model, self.batch)
        return paired_differences(self._log_p, logits, self.batch)

    def sums(
        self, edits: EditSet, matrix: csr_array, readers: Mapping[str, Reader] | None = None
    ) -> Floats:
        """[B, groups, len(SUMS)] of the batch, whose matrix of ``TokenGroups`` is given."""
        loss, kl = self.differences(edits, readers)
        named = named_experts(edits)
        used = self.used(named) if named else np.ones(len(loss), bool)
        table = np.stack([np.ones(len(loss)), loss, kl, used, loss * used], axis=1)
        return (matrix @ table).reshape(len(self.batch.documents), -1, len(SUMS))


def log_probabilities(logits_BSV: Tensor, batch: Batch) -> Iterator[Tensor]:
    """[.., V] in blocks of the predicted tokens, in float32 or the model's float64."""
    logits_NV = logits_BSV[batch.predicts.to(logits_BSV.device)]
    for block in logits_NV.split(max(1, BLOCK_CELLS // logits_NV.shape[1])):
        precise = block if block.dtype == torch.float64 else block.float()
        yield precise.log_softmax(dim=1)


def paired_differences(
    before: Sequence[Tensor], logits_BSV: Tensor, batch: Batch
) -> tuple[Floats, Floats]:
    """([N], [N]) loss of these logits less that of ``before``, and KL(before || these)."""
    losses, divergences, start = [], [], 0
    for log_p, log_q in zip(before, log_probabilities(logits_BSV, batch), strict=True):
        targets = batch.targets[start : start + len(log_p)].to(log_p.device)
        moved = log_p - log_q
        losses.append(moved.gather(1, targets[:, None])[:, 0].double().cpu())
        divergences.append((log_p.exp() * moved).sum(dim=1).double().cpu())
        start += len(log_p)
    return torch.cat(losses).numpy(), torch.cat(divergences).numpy()


def edited_sums(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    edit_sets: Sequence[EditSet],
    groups: TokenGroups | None = None,
    *,
    alone: Sequence[int] | None = None,
    batch_tokens: int = 2048,
    path: Path | str | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> Floats:
    """[sets, documents, groups, len(SUMS)] sums over predicted tokens under each set of edits.

    ``used`` are the tokens predicted at places that used one of the experts that the set names; all
    tokens where it names none. Without ``groups`` there is one, of all tokens. Rows that the file
    ``path`` holds are not measured again.

    Args:
        alone: for each set, which are of ``TopK``, the group whose tokens alone have that k.
    """
    groups = groups or TokenGroups(documents)
    sites, _ = find_sites(model, readers, None)
    by_layer = {site.layer: site for site in sites}
    rows = set_rows(path, model, documents, groups)
    only = [None] * len(edit_sets) if alone is None else alone
    chosen = list(zip(edit_sets, only, strict=True))
    keys = [
        (content_hash(repr(edits) if group is None else [repr(edits), group]),)
        for edits, group in chosen
    ]
    distinct, group_of = dict(zip(keys, edit_sets, strict=True)), dict(zip(keys, only, strict=True))
    lowest: dict[int, list[Key]] = {}
    for key, edits in distinct.items():
        lowest.setdefault(_lowest(edits, sites), []).append(key)
    batches = padded_batches(model, documents, batch_tokens)
    left = [
        (layer, batch, missing)
        for layer, named in lowest.items()
        for batch in batches
        if (missing := [key for key in named if rows.lacks(key, batch.documents)])
    ]
    done, total = 0, sum(len(missing) for *_, missing in left)
    with evaluating(model), torch.no_grad():
        try:
            for layer, batch, missing in left:
                numbers = {layer}.union(*(named_experts(distinct[key]) for key in missing))
                watched = [site for site in sites if site.layer in numbers]
                untouched = Untouched(model, by_layer[layer], watched, batch)
                matrix = groups.matrix(batch.documents)
                for key in missing:
                    tell("measuring sets of edits", done, total)
                    edits, group = distinct[key], group_of[key]
                    if group is not None:
                        places = groups.places(batch, group)
                        edits = [replace(edit, tokens=places) for edit in edits]  # type: ignore[call-arg]
                    sums = untouched.sums(edits, matrix, readers)
                    rows.add(key, batch.documents, sums)
                    done += 1
        finally:
            rows.write()
    tell("measuring sets of edits", total, total)
    return rows.sums(keys, len(documents))


def set_rows(
    path: Path | str | None,
    model: nn.Module,
    documents: Sequence[np.ndarray],
    groups: TokenGroups,
) -> MeasuredRows:
    """The sums that ``edited_sums`` wrote to ``path``."""
    key = measurement_key(path, model, documents, "sets", groups)
    return MeasuredRows(path, groups, {"edits": pl.String}, {MEASURED: key})


def _lowest(edits: EditSet, sites: Sequence[TracedRouter]) -> int:
    """The first router of the model that the edits reach; ``intervene`` refuses unknown layers."""
    named = {getattr(edit, "layer", None) for edit in edits}
    reached = (site.layer for site in sites if None in named or site.layer in named)
    return next(reached, sites[0].layer)


def named_experts(edits: EditSet) -> dict[int, list[int]]:
    """Layer -> experts that the edits name."""
    named: dict[int, list[int]] = {}
    for edit in edits:
        if isinstance(edit, Silence | Forbid):
            named.setdefault(edit.layer, []).append(edit.expert)
        elif isinstance(edit, Exchange):
            named.setdefault(edit.layer, []).extend((edit.first, edit.second))
    return named
