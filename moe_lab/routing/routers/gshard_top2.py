"""GShard's top-2 (arXiv 2006.16668, algorithm 1) as NLLB-MoE runs it: two experts, capacity,
weights normalised over the two.

Weights are ``g_1 / (g_1 + g_2)`` and ``g_2 / (g_1 + g_2)`` of the softmax, normalised after
dropping (a token whose first expert is full gives its second the weight 1) or before it
(``norm_before_drop``). ``second_expert_policy``, in training: "all" keeps the runner-up, "random"
keeps it with probability min(1, 2 g_2), "sampling" draws it by Gumbel noise.
"""

import torch
from torch import Tensor

from moe_lab.routing.config import SecondPolicy
from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.switch import Switch, capacity, drop, rounded_up, tokens_of
from moe_lab.routing.routing import UNUSED, Routing
from moe_lab.routing.select import take


@register("gshard_top2")
class GShardTop2(Switch):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        scores_TE = logits_TE.softmax(dim=1)
        indices_TK = self.choose_two(logits_TE, scores_TE)
        tokens = context.num_valid(logits_TE)
        fraction = self.config.eval_capacity_fraction
        slots = capacity(self.config, tokens)
        if fraction and not self.training:
            slots = rounded_up(fraction * tokens_of(tokens))
        fits_TK = self.within(slots, indices_TK, scores_TE, context)
        weights_TK = take(scores_TE, indices_TK)
        if not self.config.norm_before_drop:
            weights_TK = weights_TK * fits_TK
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp_min(
            torch.finfo(weights_TK.dtype).eps
        )
        routing = self.routing(
            indices_TK,
            weights_TK * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )
        return drop(routing, fits_TK)

    def choose_two(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """[T, 2] ids; the second -1 where the random policy gives it up."""
        policy: SecondPolicy = self.setting("second_expert_policy")
        bias_E = self.selection_bias()
        choice_TE = logits_TE.detach() if bias_E is None else logits_TE.detach() + bias_E
        first = choice_TE.argmax(dim=1, keepdim=True)
        if policy == SecondPolicy.SAMPLING and self.training:
            choice_TE = choice_TE - torch.empty_like(choice_TE).exponential_().log()
        second = choice_TE.scatter(1, first, float("-inf")).argmax(dim=1, keepdim=True)
        if policy == SecondPolicy.RANDOM and self.training:
            kept = 2 * scores_TE.detach().gather(1, second) > torch.rand_like(scores_TE[:, :1])
            second = torch.where(kept, second, UNUSED)
        return torch.cat([first, second], dim=1)
