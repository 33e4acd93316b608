"""Where a router's decisions stand in what its class returns, to be read and to be replaced.

``find_form`` gives the form of a router that ``capture`` found; ``take`` reads ids and weights of
an output with their gradient, ``put`` returns the same output with others. Read in transformers
5.24. Shape letters: T tokens, K slots, E experts (real and zero-compute).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_lab.errors import TraceError, expected
from moe_lab.routing import Router, Routing
from moe_lab.trace.capturing.router_output import triple_places
from moe_lab.trace.capturing.traced_router import TracedRouter

Decisions = tuple[Tensor, Tensor]
"""ids [T, K], -1 where a slot runs nothing, and gate weights [T, K]."""


class Form(Protocol):
    """Reads and replaces the decisions in a router's output."""

    def take(self, output: Any) -> Decisions: ...
    def put(self, output: Any, ids_TK: Tensor, weights_TK: Tensor) -> Any: ...


@dataclass(frozen=True)
class OwnRouting:
    """The ``Routing`` of this library's routers."""

    def take(self, output: Routing) -> Decisions:
        return output.indices, output.weights

    def put(self, output: Routing, ids_TK: Tensor, weights_TK: Tensor) -> Routing:
        return replace(output, indices=ids_TK, weights=weights_TK)


@dataclass(frozen=True)
class Triple:
    """Tuples that hold ids and weights [.., K] each; those of the experts' input too.

    Attributes:
        experts, slots: E and K, which settle what the shapes leave open.
        skip: id that the class rewrites to 0 with weight 0 (the skip expert of ZAYA), or None.
    """

    experts: int | None
    slots: int | None
    skip: int | None = None

    def take(self, output: Sequence[Any]) -> Decisions:
        indices, weights, _ = triple_places(output, self.experts, self.slots)
        ids_TK, weights_TK = (
            item.reshape(-1, item.shape[-1]) for item in (output[indices], output[weights])
        )
        if self.skip is not None:
            ids_TK = torch.where(weights_TK == 0, self.skip, ids_TK)
        return ids_TK, weights_TK

    def put(self, output: Sequence[Any], ids_TK: Tensor, weights_TK: Tensor) -> tuple[Any, ...]:
        places = triple_places(output, self.experts, self.slots)
        parts = list(output)
        if self.skip is not None:
            weights_TK = weights_TK.masked_fill(ids_TK == self.skip, 0)
            ids_TK = ids_TK.masked_fill(ids_TK == self.skip, 0)
        for place, values in zip(places[:2], (ids_TK, weights_TK), strict=True):
            parts[place] = values.to(parts[place].dtype).reshape(parts[place].shape)
        return tuple(parts)


@dataclass(frozen=True)
class DenseScores:
    """Llama 4: scores [T, E], 0 where an expert is not selected, and logits [T, E]."""

    module: Any

    def take(self, output: Any) -> Decisions:
        scores_TE, logits_TE = output
        ids_TK = logits_TE.topk(self.module.top_k, dim=1).indices
        return ids_TK, scores_TE.gather(1, ids_TK)

    def put(self, output: Any, ids_TK: Tensor, weights_TK: Tensor) -> Any:
        """The logits follow, so that the class's own rule reads these ids from them."""
        scores_TE, logits_TE = output
        kept_TK = self.take(output)[0]
        others_TE = logits_TE.scatter(1, kept_TK, -torch.inf)
        values_TK = logits_TE.gather(1, kept_TK)
        # An exchanged expert's logit moves along with its slot.
        logits_TE = others_TE.scatter(1, ids_TK, values_TK)
        return torch.zeros_like(scores_TE).scatter(1, ids_TK, weights_TK), logits_TE


@dataclass(frozen=True)
class OneHot:
    """Switch Transformers: a dispatch mask [B, S, E], zero where the expert was full; the
    probability [B, S, 1]; logits.
    """

    def take(self, output: Any) -> Decisions:
        mask, weights, _ = output
        mask_TE = mask.reshape(-1, mask.shape[-1])
        ids_T1 = torch.where(mask_TE.any(dim=1), mask_TE.argmax(dim=1), -1).unsqueeze(1)
        return ids_T1, torch.where(ids_T1 >= 0, weights.reshape(-1, 1), 0)

    def put(self, output: Any, ids_TK: Tensor, weights_TK: Tensor) -> Any:
        mask, weights, logits = output
        experts = torch.arange(mask.shape[-1], device=mask.device)
        mask = (ids_TK == experts).to(mask.dtype).reshape(mask.shape)
        kept = torch.where(ids_TK >= 0, weights_TK, weights.reshape(-1, 1))
        return mask, kept.reshape(weights.shape), logits


@dataclass(frozen=True)
class SortedSlots:
    """JetMoE: slots sorted by expert: their places [T K], tokens and gates, the number of each
    expert's slots, and logits [T, E].
    """

    module: Any

    def take(self, output: Any) -> Decisions:
        places, _, gates, sizes, _ = output
        expert_of = torch.repeat_interleave(
            torch.arange(len(sizes), device=places.device),
            torch.tensor(sizes, device=places.device),
        )
        ids = torch.empty_like(places).scatter(0, places, expert_of)
        weights = torch.empty_like(gates).scatter(0, places, gates)
        slots = self.module.top_k
        return ids.view(-1, slots), weights.view(-1, slots)

    def put(self, output: Any, ids_TK: Tensor, weights_TK: Tensor) -> Any:
        logits_TE = output[4]
        ids = ids_TK.flatten()
        places = ids.argsort(stable=True)
        tokens = places.div(ids_TK.shape[1], rounding_mode="trunc")
        sizes = torch.bincount(ids, minlength=logits_TE.shape[1]).tolist()
        return places, tokens, weights_TK.flatten()[places], sizes, logits_TE


SELECTED_BY_BLOCK = ("DbrxRouter",)
"""Router classes that return logits alone: the block around them selects, and hands ids and
weights to the experts.
"""

NOT_EDITABLE = {
    "DogeCDMoE": "an expert is a pair of keys, and the block keeps its selection to itself",
    "NllbMoeTop2Router": "its experts read the dispatch mask as expert ids, so that experts 0 and "
    "1 run whatever the router selects (transformers 5.24)",
}
"""Router classes in which no expert can be edited, and why."""

LEAST_SLOTS = {"LongcatFlashTopkRouter": 2}
"""Router classes whose experts fail with fewer slots (they squeeze the slots of a mask,
transformers 5.24).
"""

FIXED_SLOTS = ("JetMoeMoA",)
"""Blocks whose slots are the heads of an attention, so that k is a size of other parameters."""


def find_form(site: TracedRouter, slots: int | None) -> Form:
    """Where the decisions of a router stand.

    Args:
        slots: K of the router's output; None: not known.

    Raises:
        TraceError: naming the module, if its decisions cannot be replaced.
    """
    module, kind = site.module, type(site.module).__name__
    if kind in NOT_EDITABLE:
        what = "a router whose decisions can be replaced"
        raise TraceError(f"{site}: {expected(what, NOT_EDITABLE[kind])}", field=site.name)
    if isinstance(module, Router):
        return OwnRouting()
    special: dict[str, Form] = {
        "Llama4Router": DenseScores(module),
        "SwitchTransformersTop1Router": OneHot(),
        "JetMoeTopKGating": SortedSlots(module),
    }
    skip = site.num_experts if kind == "ZayaRouter" else None
    return special.get(kind) or Triple(site.num_choices, slots, skip)


def scope_of(site: TracedRouter, model: nn.Module) -> nn.Module:
    """The module in whose forward pass a router's experts are selected."""
    if type(site.module).__name__ not in SELECTED_BY_BLOCK:
        return site.module
    return model.get_submodule(site.name.rpartition(".")[0])


def dense(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> Tensor:
    """[T, E] weight of each expert, 0 where it is not selected."""
    used_TK = ids_TK >= 0
    zeros_TE = weights_TK.new_zeros(len(ids_TK), experts)
    return zeros_TE.scatter_add(1, ids_TK.long().clamp_min(0), torch.where(used_TK, weights_TK, 0))
