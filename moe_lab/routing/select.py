"""The pieces that routers select with: group limits, variable counts as slots, and capacity.

None of them waits for the device.
"""

import torch
from torch import Tensor

from moe_lab.routing.config import GroupFill, GroupScore
from moe_lab.routing.routing import UNUSED


def limit_groups(
    choice_TE: Tensor, num_groups: int, topk_groups: int, score: GroupScore, fill: GroupFill
) -> Tensor:
    """[T, E]: ``choice`` with the experts of all but the best ``topk_groups`` of ``num_groups``
    equal groups filled.

    DeepSeek-V2 (arXiv 2405.04434) ranks groups by their best expert, DeepSeek-V3 (arXiv 2412.19437)
    by the sum of their best two.
    """
    grouped = choice_TE.view(choice_TE.shape[0], num_groups, -1)
    best = (
        grouped.topk(2, dim=2).values.sum(dim=2)
        if score == GroupScore.BEST_TWO
        else grouped.amax(dim=2)
    )
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(
        1, best.topk(topk_groups, dim=1).indices, True
    )
    value = float("-inf") if fill == GroupFill.EXCLUDE else 0.0
    return grouped.masked_fill(~kept.unsqueeze(2), value).reshape(choice_TE.shape)


def slots_from_mask(mask_TE: Tensor, order_TE: Tensor, slots: int, at_least: int = 0) -> Tensor:
    """[T, slots] ids of the experts where ``mask``, highest ``order`` first, -1 in the slots left
    over.

    Args:
        order_TE: finite; decides who stays where a row of the mask has more than ``slots`` experts.
        at_least: the experts of highest order that are taken whatever the mask says (K_min).
    """
    order_TE = order_TE.detach()
    if at_least:
        floor = torch.zeros_like(mask_TE).scatter_(1, order_TE.topk(at_least, dim=1).indices, True)
        mask_TE = mask_TE | floor
    ranked = torch.where(mask_TE, order_TE, float("-inf")).topk(slots, dim=1)
    return torch.where(ranked.values == float("-inf"), UNUSED, ranked.indices)


def take(values_TE: Tensor, indices_TK: Tensor) -> Tensor:
    """[T, K]: the value of each slot's expert, 0 in unused slots."""
    return torch.where(indices_TK >= 0, values_TE.gather(1, indices_TK.clamp_min(0)), 0.0)


def within_capacity(
    indices_TK: Tensor,
    capacity_E: Tensor,
    *,
    sequence_length: int,
    valid: Tensor | None = None,
    priority_T: Tensor | None = None,
) -> Tensor:
    """[T, K] bool: the slots that fit into their expert's capacity, counted from zero in each
    sequence.

    All first choices are placed before any second choice (GShard, arXiv 2006.16668), each in order
    of position, or of descending ``priority`` (batch-prioritised routing, arXiv 2106.05974). Unused
    slots never fit; padding takes no place and always does.

    Args:
        capacity_E: [E] int64, or [N, E] where sequences differ (their tokens without padding).
        sequence_length: tokens over which a capacity counts; divides T.
        priority_T: [T], larger goes first.
    """
    tokens, slots = indices_TK.shape
    experts = capacity_E.shape[-1]
    used = indices_TK >= 0
    counted = used if valid is None else used & valid.unsqueeze(1)
    sequence = torch.arange(tokens, device=indices_TK.device) // max(sequence_length, 1)
    key_TK = sequence.unsqueeze(1) * (experts + 1) + torch.where(counted, indices_TK, experts)
    order_T = torch.arange(tokens, device=key_TK.device)
    if priority_T is not None:
        order_T = priority_T.detach().argsort(descending=True, stable=True)
    # Choice-major: position in this list, within one key, is the place in the expert's queue.
    queue = key_TK[order_T].t().reshape(-1)
    by_key = queue.argsort(stable=True)
    ordered = queue[by_key]
    place = torch.arange(queue.shape[0], device=queue.device) - torch.searchsorted(ordered, ordered)
    rank = torch.empty_like(place).scatter_(0, by_key, place).view(slots, tokens).t()
    rank_TK = torch.empty_like(rank).scatter_(0, order_T.unsqueeze(1).expand(tokens, slots), rank)
    row_T1 = (sequence if capacity_E.dim() == 2 else torch.zeros_like(sequence)).unsqueeze(1)
    capacity_TK = capacity_E.view(-1, experts)[row_T1, indices_TK.clamp_min(0)]
    return used & (~counted | (rank_TK < capacity_TK))
