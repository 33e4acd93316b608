"""Router classes of trainers, and what they return.

Read in torchtitan (``torchtitan/models/moe/moe.py`` at 003edbe, ``torchtitan/models/common/moe.py``
at 00a4c14) and in Megatron-LM (``megatron/core/transformer/moe/router.py`` at 005742f,
``moe_layer.py`` at 0011998). Shape letters: T tokens, K slots, E experts, D d_model.
"""

from functools import partial
from typing import Any

import torch

from moe_lab.errors import TraceError, require
from moe_lab.trace.capturing.hf_router_outputs import HFRouter
from moe_lab.trace.capturing.router_output import Reading, Seen


def torchtitan(module: Any, seen: Seen) -> Reading:
    """Scores [T, K], ids [T, K], and counts [E] or a map [T, E]; the gate inside gives logits
    [T, E], and ``padding_mask_T`` is true for padding.
    """
    weights_TK, indices_TK = seen["output"][:2]
    logits_TE = seen["gate output"].detach().float()
    function: Any = module.score_func
    if isinstance(function, str):
        function = {"softmax": partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid}[function]
    scores_TE = function(logits_TE)
    padding_T = seen["kwargs"].get("padding_mask_T")
    return Reading(
        indices_TK.detach(),
        weights_TK.detach(),
        scores=scores_TE.detach(),
        valid=None if padding_T is None else ~padding_T,
    )


@torch.no_grad()
def megatron(module: Any, seen: Seen) -> Reading:
    """Weights [T, E] and a map [T, E] of what runs. The logits stay inside the class: they are
    taken again by its ``gating``, without the input jitter, for the entropy alone.
    """
    weights_TE, map_TE = (item.detach() for item in seen["output"][:2])
    slots = module.topk
    require(
        int(map_TE.sum(dim=1).max()) <= slots,
        f"at most topk = {slots} experts of a token in the routing map",
        "more (moe_pad_expert_input_to_capacity marks what no token selected)",
        error=TraceError,
    )
    ran_TK, indices_TK = map_TE.to(torch.uint8).topk(slots, dim=1)
    given = seen["input"][0] if seen["input"] else seen["kwargs"]["input"]
    logits_TE = module.gating(given).reshape(map_TE.shape).float()
    sigmoid = getattr(module, "score_function", "softmax") == "sigmoid"
    return Reading(
        torch.where(ran_TK > 0, indices_TK, -1),
        weights_TE.gather(1, indices_TK).where(ran_TK > 0, 0.0),
        scores=logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1),
    )


TRAINER_ROUTERS: dict[str, HFRouter] = {
    "TokenChoiceTopKRouter": HFRouter(torchtitan, block=True, taps=("gate",)),
    "QuantileBalancedTopKRouter": HFRouter(torchtitan, block=True, taps=("gate",)),
    "TopKRouter": HFRouter(megatron),
}
"""Class name -> how to read it."""
