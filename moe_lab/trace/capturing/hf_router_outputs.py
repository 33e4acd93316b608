"""Router classes of transformers that do not return (logits, weights, indices), and what theirs
means.

Read in transformers 5.23. Selection is taken from what the class returns or hands on. Where a class
keeps part of it to itself, its own rule is followed and compared with what it did return. Shape
letters: T tokens, K slots, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.errors import TraceError, require
from moe_lab.trace.capturing.router_output import Reader, Reading, Seen, triple
from moe_lab.trace.score_spread import Spread


@dataclass(frozen=True)
class HFRouter:
    """
    Attributes:
        read: the reader.
        block: the class is not a router but a block with one inside.
        taps: children of the block (of the router's parent, if it is not a block) whose inputs and
            outputs the reader needs.
        zero_kind: what the zero-compute experts return.
    """

    read: Reader = triple
    block: bool = False
    taps: tuple[str, ...] = ()
    zero_kind: str = ""


def llama4(module: nn.Module, seen: Seen) -> Reading:
    """Scores [T, E], zero where an expert is not selected, then logits: the class takes the top k
    of the logits.
    """
    scores_TE, logits_TE = seen["output"]
    indices_TK = logits_TE.topk(module.top_k, dim=1).indices  # type: ignore[arg-type]
    weights_TK = scores_TE.gather(1, indices_TK)
    require(
        int((scores_TE > 0).sum()) <= int((weights_TK > 0).sum()),
        "scores of 0 outside the top k of the logits",
        "others",
        error=TraceError,
    )
    return Reading(indices_TK, weights_TK.detach(), logits_TE.detach())


def switch(module: nn.Module, seen: Seen) -> Reading:
    """One-hot [B, S, E] of the expert, all zero where it was full; [B, S, 1] its probability;
    logits [B, S, E].
    """
    mask_TE, weight_T1, logits_TE = (
        item.detach().reshape(-1, item.shape[-1]) for item in seen["output"]
    )
    probabilities = logits_TE.softmax(dim=-1, dtype=module.dtype).to(weight_T1.dtype)  # type: ignore[arg-type]
    selected_T1 = probabilities.argmax(dim=1, keepdim=True)
    ran_T1 = mask_TE.gather(1, selected_T1) > 0
    require(
        not bool((mask_TE.sum(dim=1, keepdim=True) != ran_T1).any()),
        "a dispatch mask that marks the most probable expert or none",
        "others",
        error=TraceError,
    )
    return Reading(
        torch.where(ran_T1, selected_T1, -1),
        torch.where(ran_T1, weight_T1, torch.zeros_like(weight_T1)),
        logits_TE,
        selected=selected_T1,
    )


def nllb(module: nn.Module, seen: Seen) -> Reading:
    """Mask [T, E] of the first expert, combining weights [T, E] of both, logits [T, E]; what was
    full is zero in each.
    """
    first_mask_TE, weights_TE, logits_TE = (item.detach() for item in seen["output"])
    probabilities = logits_TE.softmax(dim=-1, dtype=module.dtype).to(weights_TE.dtype)  # type: ignore[arg-type]
    first_ran_T1 = first_mask_TE.any(dim=1, keepdim=True)
    first_T1 = torch.where(
        first_ran_T1,
        first_mask_TE.argmax(dim=1, keepdim=True),
        probabilities.argmax(dim=1, keepdim=True),
    )
    others_TE = weights_TE.scatter(1, first_T1, 0.0)
    require(
        int((others_TE > 0).sum(dim=1).max()) <= 1,
        "combining weights of at most two experts",
        "more",
        error=TraceError,
    )
    second_ran_T1 = (others_TE > 0).any(dim=1, keepdim=True)
    wanted_T1 = logits_TE.scatter(1, first_T1, -torch.inf).argmax(dim=1, keepdim=True)
    second_T1 = torch.where(second_ran_T1, others_TE.argmax(dim=1, keepdim=True), wanted_T1)
    # Under the other policies the second expert may never have been asked for, which is no drop.
    asked = (
        second_ran_T1 if module.second_expert_policy != "all" else torch.ones_like(second_ran_T1)
    )
    ran_T2 = torch.cat([first_ran_T1, second_ran_T1], dim=1)
    selected_T2 = torch.cat([first_T1, torch.where(asked, second_T1, -1)], dim=1)
    gates_T2 = weights_TE.gather(1, selected_T2.clamp_min(0))
    return Reading(
        torch.where(ran_T2, selected_T2, -1),
        gates_T2.masked_fill(~ran_T2, 0.0),
        logits_TE,
        selected=selected_T2,
    )


def first_three(module: nn.Module, seen: Seen) -> Reading:
    """Logits, weights, indices, and something else of a shape that could be taken for weights."""
    logits_TE, weights_TK, indices_TK = seen["output"][:3]
    return Reading(indices_TK, weights_TK.detach(), logits_TE.detach())


def zaya(module: Any, seen: Seen) -> Reading:
    """The id of the skip expert is rewritten to 0 and its weight to 0: the class's own choice is
    taken again, and must agree elsewhere.
    """
    logits_TE, weights_TK, indices_TK = (item.detach() for item in seen["output"][:3])
    probabilities = logits_TE.softmax(dim=-1)
    chosen_TK = (probabilities.float() + module.balancing_biases).topk(module.top_k, dim=-1).indices
    skipped_TK = chosen_TK == module.num_experts
    require(
        torch.equal(chosen_TK.masked_fill(skipped_TK, 0), indices_TK),
        "the returned ids to be the top k of the biased probabilities",
        "others",
        error=TraceError,
    )
    return Reading(chosen_TK, weights_TK, logits_TE)


def jetmoe(module: Any, seen: Seen) -> Reading:
    """Slots sorted by expert: their places [T * K], tokens and gates, the number of each expert's
    slots, and logits [T, E].
    """
    places, _, gates, sizes, logits_TE = seen["output"]
    slots, experts = module.top_k, len(sizes)
    expert_of = torch.repeat_interleave(
        torch.arange(experts, device=places.device), torch.tensor(sizes, device=places.device)
    )
    indices = torch.empty_like(places).scatter_(0, places, expert_of)
    weights = torch.empty_like(gates).scatter_(0, places, gates.detach())
    return Reading(indices.view(-1, slots), weights.view(-1, slots), logits_TE.detach())


def doge(module: Any, seen: Seen) -> Reading:
    """Product keys: an expert is a pair of keys, its logit the sum of theirs. The ids are those
    looked up in the experts' embedding.

    Over pairs the softmax is the product of two, so its entropy is a sum and its best K + 1 pairs
    are among the best K + 1 keys.
    """
    keys_2TN = seen["output"][1].detach()
    indices_TK = seen["down_embed input"][0]
    number = module.num_keys
    x_TN, y_TN = keys_2TN.float().log_softmax(dim=-1)
    log_TK = x_TN.gather(1, indices_TK // number) + y_TN.gather(1, indices_TK % number)
    best = min(indices_TK.shape[1] + 1, number)
    pairs = (
        (x_TN.topk(best, dim=1).values.unsqueeze(2) + y_TN.topk(best, dim=1).values.unsqueeze(1))
        .flatten(1)
        .exp()
    )
    if indices_TK.shape[1] < number * number:
        top = pairs.topk(indices_TK.shape[1] + 1, dim=1).values
        margin_T = top[:, -2] - top[:, -1]
    else:
        margin_T = pairs.new_full((len(pairs),), float("inf"))
    entropy_T = -sum((part.exp() * part).sum(dim=1) for part in (x_TN, y_TN))
    assert isinstance(entropy_T, Tensor)
    return Reading(indices_TK, log_TK.softmax(dim=1), spread=Spread(entropy_T, margin_T))


HF_ROUTERS: dict[str, HFRouter] = {
    # product keys inside the feed-forward; ids are read at the experts' embedding
    "DogeCDMoE": HFRouter(doge, block=True, taps=("down_embed",)),
    # the gates of the shared experts are a fourth tensor
    "InklingTopkRouter": HFRouter(first_three),
    # slots sorted by expert; there is one in the attention too
    "JetMoeTopKGating": HFRouter(jetmoe),
    # scores [T, E] and logits; the weight multiplies the expert's input
    "Llama4Router": HFRouter(llama4),
    # identity experts, whose ids follow the real ones
    "LongcatFlashTopkRouter": HFRouter(zero_kind="identity"),
    # a mask and dense weights; tokens beyond capacity are dropped
    "NllbMoeTop2Router": HFRouter(nllb),
    # a dispatch mask; tokens beyond an expert's capacity are dropped
    "SwitchTransformersTop1Router": HFRouter(switch),
    # the skip expert is rewritten to expert 0 with weight 0; recorded as a zero-compute expert
    "ZayaRouter": HFRouter(zaya, zero_kind="skip"),
    # logits alone; ids and weights are read where the block hands them to the experts
    "DbrxRouter": HFRouter(),
}
"""Class name -> how to read it. Every other router class of the library is read as a triple."""
