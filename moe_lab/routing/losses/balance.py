"""Balance losses over one layer's ``Routing``: products of load and probability, differentiable
through the scores, never through counts.

Notation, over the tokens of a scope: f_i the share of all used slots that selected expert i, P_i
the mean normalised score, kbar the mean number of used slots per token. ``scale`` says what the
value is at uniform load:

- ``"one"``: ``E sum f_i P_i`` = 1 (Switch, Megatron, OLMo-core, DeepSeek);
- ``"top_k"``: ``kbar E sum f_i P_i`` = k (Hugging Face, which counts slots per token instead of per
    slot).

``scope`` says over which tokens f and P are taken: the ``"batch"`` (one micro-batch on one rank),
each ``"sequence"`` (then the mean over sequences, DeepSeek-V3), or ``"global"``: f from ``counts``
that the caller accumulated over micro-batches or all-reduced over ranks (arXiv 2501.11873), P from
this micro-batch, whose gradients then add up to the global one. With ``tokens``, the number of
tokens that
``counts`` come from, P and kbar are shares of theirs too: the losses of the parts, padding in them
or not, add up to that of the whole.

Capacity dropping does not change a loss: f counts what was selected. Average layers after the loss,
never before: pooling hides the collapse of single layers.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_lab.config import require
from moe_lab.errors import ConfigError, expected
from moe_lab.routing.routing import Routing, valid_rows

Scale = Literal["one", "top_k"]
Scope = Literal["batch", "sequence", "global"]


class Shares(NamedTuple):
    """Load and probability of each of N token groups (1 unless the scope is the sequence)."""

    load: Tensor
    """[N, E]: share of the used slots; sums to 1."""
    probability: Tensor
    """[N, E]: mean normalised score; sums to 1."""
    slots: Tensor
    """[N]: used slots per token."""
    present: Tensor
    """[N]: whether the group has a token at all."""

    def mean(self, values_N: Tensor, scale: Scale) -> Tensor:
        """Mean over the groups that have tokens, times kbar for ``scale="top_k"``."""
        require(scale in ("one", "top_k"), "scale among one, top_k", repr(scale), field="scale")
        values_N = values_N * self.slots if scale == "top_k" else values_N
        return torch.where(self.present, values_N, 0.0).sum() / self.present.sum().clamp_min(1)


def shares(
    routing: Routing,
    scope: Scope = "batch",
    *,
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
    sequence_length: int | None = None,
) -> Shares:
    """f, P and kbar of a scope; padding is left out.

    Raises ``ConfigError`` where the scope lacks its argument.
    """
    scores_TE, valid_T = valid_rows(routing.scores, routing.valid, 1.0), routing.valid_mask()
    normalised_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp_min(
        torch.finfo(scores_TE.dtype).tiny
    )
    length, experts = scores_TE.shape
    normalised_TE = normalised_TE * valid_T.unsqueeze(1)
    groups = 1
    if scope == "sequence":
        if sequence_length is None or length % sequence_length:
            raise ConfigError(
                expected(
                    f"a sequence_length that divides {length} tokens for scope 'sequence'",
                    sequence_length,
                ),
                field="sequence_length",
            )
        length, groups = sequence_length, length // sequence_length
    elif scope not in ("batch", "global"):
        raise ConfigError(
            expected("scope among batch, sequence, global", repr(scope)), field="scope"
        )
    tokens_N = valid_T.view(groups, length).sum(dim=1)
    counts_NE = routing.grouped_counts(groups).to(scores_TE.dtype)
    slots_N = counts_NE.sum(dim=1) / tokens_N.clamp_min(1)
    if scope == "global":
        if counts is None or counts.shape != (experts,):
            got = None if counts is None else list(counts.shape)
            raise ConfigError(
                expected(
                    f"counts of shape [{experts}] for scope 'global'",
                    got,
                    "summing Routing.selected_counts()",
                ),
                field="counts",
            )
        counts_NE = counts.to(scores_TE.dtype).unsqueeze(0)
        if tokens is not None:
            tokens_N = tokens.reshape(1)
            slots_N = counts_NE.sum(dim=1) / tokens_N.clamp_min(1)
    return Shares(
        load=counts_NE / counts_NE.sum(dim=1, keepdim=True).clamp_min(1),
        probability=normalised_TE.view(groups, length, experts).sum(dim=1)
        / tokens_N.clamp_min(1).unsqueeze(1),
        slots=slots_N,
        present=tokens_N > 0,
    )


def load_balancing_loss(
    routing: Routing | Tensor,
    indices: Tensor | None = None,
    *,
    scale: Scale = "one",
    scope: Scope = "batch",
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """Switch Transformer's loss (arXiv 2101.03961, eq. 4) over one layer, for any number of slots.

    Args:
        routing: one layer's decisions, whose padding is left out by ``routing.valid``; or of any
            other router the scores [T, E], with ``indices``.
        indices: [T, K], the expert of each slot, -1 where a slot is not used.
        scale: value at uniform load: 1, or the mean number of used slots per token (Hugging Face).
        scope: see the module. ``counts`` [E] and, on request, ``tokens`` [] go with "global",
            ``sequence_length`` with "sequence".

    Returns:
        Scalar; the gradient reaches the scores alone.

    Example::

        load_balancing_loss(logits.softmax(-1), logits.topk(8).indices)
    """
    if not isinstance(routing, Routing):
        require(indices is not None, "indices [T, K] beside scores", None, field="indices")
        routing = Routing.from_scores(routing, indices)  # type: ignore[arg-type]
    else:
        require(indices is None, "a Routing without indices", "both", field="indices")
    found = shares(routing, scope, counts=counts, tokens=tokens, sequence_length=sequence_length)
    experts = routing.scores.shape[1]
    return found.mean(experts * (found.load * found.probability).sum(dim=1), scale)


def heterogeneous_loss(
    routing: Routing,
    *,
    ffn_share: float = 0.75,
    scale: Scale = "one",
    scope: Scope = "batch",
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """MoE++'s loss (arXiv 2410.07348, eq. 7): ``E sum eta_i f_i P_i``, eta = 1 for real experts and
    tau = ``ffn_share`` for the others.

    The paper writes ``sum eta_i f_i P_i`` with f the share of tokens: its value is that of
    ``scale="top_k"`` divided by E.
    """
    found = shares(routing, scope, counts=counts, tokens=tokens, sequence_length=sequence_length)
    experts = routing.scores.shape[1]
    eta_E = torch.ones(experts, dtype=found.load.dtype, device=found.load.device)
    eta_E[routing.num_experts :] = ffn_share
    return found.mean(experts * (eta_E * found.load * found.probability).sum(dim=1), scale)


def null_loss(
    routing: Routing,
    *,
    scale: Scale = "one",
    scope: Scope = "batch",
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """AdaMoE's loss (arXiv 2406.13233, eq. 6): null experts are alike, so each one's load is the
    mean load of them all.
    """
    found = shares(routing, scope, counts=counts, tokens=tokens, sequence_length=sequence_length)
    experts, real = routing.scores.shape[1], routing.num_experts
    nulls_NE = found.load[:, real:]
    if nulls_NE.shape[1]:
        nulls_NE = nulls_NE.mean(dim=1, keepdim=True).expand_as(nulls_NE)
    load_NE = torch.cat([found.load[:, :real], nulls_NE], dim=1)
    return found.mean(experts * (load_NE * found.probability).sum(dim=1), scale)


def device_loss(
    routing: Routing,
    groups: int | Sequence[Sequence[int]],
    *,
    scale: Scale = "one",
    scope: Scope = "batch",
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """DeepSeekMoE's device-level loss (arXiv 2401.06066, eq. 15-17): ``sum_d f'_d P'_d``, f' the
    mean relative load of the device's experts and P' their summed probability.

    Args:
        groups: number of equal contiguous groups, or the expert ids of each; together they hold
            every expert once.
    """
    experts = routing.scores.shape[1]
    members_DE = membership(groups, experts, routing.scores)
    found = shares(routing, scope, counts=counts, tokens=tokens, sequence_length=sequence_length)
    load_ND = experts * found.load @ members_DE.t() / members_DE.sum(dim=1)
    return found.mean((load_ND * (found.probability @ members_DE.t())).sum(dim=1), scale)


def longcat_device_loss(
    routing: Routing,
    num_devices: int,
    target_ffn_count: float,
    *,
    scale: Scale = "one",
    scope: Scope = "batch",
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """LongCat-Flash's device-level loss (arXiv 2509.01322, section 2.1): D groups of real experts
    and one of all zero-compute experts.

    ``f_j = D/(K_e T) n_j`` and ``f_zero = n_zero / ((K - K_e) T)`` with n the slots of the group,
    so every f is 1 at the target. Slots are counted, not tokens: an indicator per token would
    saturate as soon as a token has several slots in a group.
    """
    real, experts = routing.num_experts, routing.scores.shape[1]
    require(
        routing.num_zero_experts > 0,
        "zero-compute experts for longcat_device_loss",
        0,
        "device_loss",
        field="num_zero_experts",
    )
    require(
        0 < target_ffn_count < routing.top_k,
        f"target_ffn_count between 0 and {routing.top_k}",
        target_ffn_count,
        field="target_ffn_count",
    )
    members_DE = membership(num_devices, real, routing.scores)
    found = shares(routing, scope, counts=counts, tokens=tokens, sequence_length=sequence_length)
    real_load = (
        found.load[:, :real] @ members_DE.t() * num_devices * routing.top_k / target_ffn_count
    )
    zero_load = (
        found.load[:, real:experts].sum(dim=1) * routing.top_k / (routing.top_k - target_ffn_count)
    )
    real_part = (real_load * (found.probability[:, :real] @ members_DE.t())).sum(dim=1)
    return found.mean(real_part + zero_load * found.probability[:, real:].sum(dim=1), scale)


def membership(groups: int | Sequence[Sequence[int]], experts: int, like: Tensor) -> Tensor:
    """[D, E] of 0 and 1: which experts belong to which group."""
    if isinstance(groups, int):
        require(
            groups >= 1 and experts % groups == 0,
            f"a number of groups dividing {experts} experts",
            groups,
            field="groups",
        )
        size = experts // groups
        groups = [range(start, start + size) for start in range(0, experts, size)]
    flat = sorted(expert for group in groups for expert in group)
    require(
        flat == list(range(experts)),
        f"groups that hold each of {experts} experts once",
        [list(group) for group in groups],
        field="groups",
    )
    members = torch.zeros(len(groups), experts, dtype=like.dtype, device=like.device)
    for row, group in enumerate(groups):
        members[row, list(group)] = 1
    return members


def hf_pooled_loss(routings: Sequence[Routing]) -> Tensor:
    """The value of transformers' ``load_balancing_loss_func``: layers pooled, softmax of the
    logits, k at uniform load.

    For comparison only: layers that each collapse on other experts look perfect in it (2.0 where
    the mean over layers is 7.99).
    """
    counts = torch.stack([routing.selected_counts() for routing in routings]).sum(dim=0)
    probability = torch.stack(
        [
            (valid_rows(routing.logits, routing.valid).softmax(dim=1))
            .mul(routing.valid_mask().unsqueeze(1))
            .sum(dim=0)
            for routing in routings
        ]
    ).sum(dim=0)
    tokens = torch.stack([routing.num_valid() for routing in routings]).sum().clamp_min(1)
    return counts.shape[0] * (counts.to(probability.dtype) / tokens * probability / tokens).sum()
