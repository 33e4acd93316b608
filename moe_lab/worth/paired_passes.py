"""Documents run with the routing of a model edited and untouched, so that differences are paired.

``edited_sums`` runs sets of edits; all sets whose lowest edited layer is the same share one pass of
the layers below it. Shape letters: B batch, S sequence, N predicted tokens of a batch, V
vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn

from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.document_pass import evaluating, pad_right
from moe_lab.errors import AnalysisError, TraceError, require
from moe_lab.model import Decoder
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.hooks import Hooks, Pass
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.interventions import Edit, Exchange, Forbid, Silence, intervene
from moe_lab.worth.shared_prefix import SharedPrefix
from moe_lab.worth.token_groups import TokenGroups

SUMS = ("tokens", "d_loss", "kl", "used", "d_loss_used")
"""What is summed over the predicted tokens of a document, in this order."""
BLOCK_CELLS = 2**24
EditSet: TypeAlias = Sequence[Edit]


@dataclass(frozen=True)
class Document:
    """Token ids [n] of the document at place ``number`` among those given, or of a window of it."""

    number: int
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents padded on the right: ids and mask [B, S]."""

    documents: Sequence[Document]
    ids: Tensor
    mask: Tensor

    @cached_property
    def predicts(self) -> Tensor:
        """[B, S] places at which a token of the document is predicted."""
        following_BS = self.mask.bool().roll(-1, dims=1)
        following_BS[:, -1] = False
        return following_BS

    @cached_property
    def targets(self) -> Tensor:
        """[N] the predicted tokens, in the order of ``predicts``."""
        return self.ids.roll(-1, dims=1)[self.predicts]

    @cached_property
    def docs(self) -> NDArray[np.int64]:
        """[N] number of the document of each predicted token."""
        return np.repeat(
            [document.number for document in self.documents],
            [len(document.ids) - 1 for document in self.documents],
        )


def padded_batches(
    model: nn.Module, documents: Sequence[np.ndarray], batch_tokens: int
) -> list[Batch]:
    """Documents of at least two tokens in batches of about equal lengths.

    One that is longer than the model's context runs in windows, all in one batch, that do not see
    each other. They overlap by a token, so that every token but the first is predicted once.
    """
    context = context_of(model)
    whole = [
        [
            Document(number, np.asarray(ids)[start : start + (context or len(ids))])
            for start in range(0, len(ids) - 1, (context or len(ids)) - 1)
        ]
        for number, ids in enumerate(documents)
        if len(ids) > 1
    ]
    require(
        whole, "a document of at least two tokens", "none", error=AnalysisError, field="documents"
    )
    batches: list[list[Document]] = [[]]
    for windows in sorted(whole, key=lambda windows: -len(windows[0].ids)):
        rows = [*batches[-1], *windows]
        if batches[-1] and len(rows) * len(rows[0].ids) > batch_tokens:
            batches.append([])
        batches[-1] += windows
    return [Batch(chosen, *pad_right(chosen, None)) for chosen in batches]


def context_of(model: nn.Module) -> int | None:
    """The most tokens that a model takes at a time; None: no limit is known."""
    if isinstance(model, Decoder):
        return model.config.context_length
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 1 else None


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
        """False where the edits silence experts that no token of the batch used."""
        silent = all(isinstance(edit, Silence) for edit in edits)
        return not silent or bool(self._used(named_experts(edits)).any())

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
        """[documents, groups, len(SUMS)] of the batch, documents in the order of their numbers;
        ``matrix`` is that of ``TokenGroups`` for the batch.
        """
        loss, kl = self.differences(edits, readers)
        named = named_experts(edits)
        used = self.used(named) if named else np.ones(len(loss), bool)
        table = np.stack([np.ones(len(loss)), loss, kl, used, loss * used], axis=1)
        return (matrix @ table).reshape(len(np.unique(self.batch.docs)), -1, len(SUMS))


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
    batch_tokens: int = 2048,
    readers: Mapping[str, Reader] | None = None,
) -> Floats:
    """[sets, documents, groups, len(SUMS)] sums over predicted tokens under each set of edits.

    ``used`` are the tokens predicted at places that used one of the experts that the set names; all
    tokens where it names none. Without ``groups`` there is one, of all tokens.
    """
    groups = groups or TokenGroups(documents)
    sites, _ = find_sites(model, readers, None)
    by_layer = {site.layer: site for site in sites}
    sums = np.zeros((len(edit_sets), len(documents), len(groups.names), len(SUMS)))
    lowest: dict[int, list[int]] = {}
    for place, edits in enumerate(edit_sets):
        lowest.setdefault(_lowest(edits, sites), []).append(place)
    batches = padded_batches(model, documents, batch_tokens)
    with evaluating(model), torch.no_grad():
        for layer, places in lowest.items():
            numbers = {layer}.union(*(named_experts(edit_sets[place]) for place in places))
            watched = [site for site in sites if site.layer in numbers]
            for batch in batches:
                untouched = Untouched(model, by_layer[layer], watched, batch)
                matrix = groups.matrix(batch.docs)
                rows = np.unique(batch.docs)
                for place in places:
                    sums[place, rows] = untouched.sums(edit_sets[place], matrix, readers)
    return sums


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
