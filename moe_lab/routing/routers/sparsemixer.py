"""SparseMixer-v2 (GRIN, arXiv 2409.12136, section 2; Phi-3.5-MoE): k masked softmax picks, one
after the other.

For each pick, experts whose logit lies more than ``2 eps`` (relative to ``max(|l|, maximum)``)
below the maximum are masked, and the weight is the softmax over those left. In training the expert
is sampled from that softmax (Gumbel), and where it is not the maximum the weight is scaled by 1/3
or, with probability 1/4, left as it is: Heun's third-order estimate of the gradient. The gradient
of the weight is that of the softmax without this scale. In evaluation the maximum is taken. The
picked expert is removed before the next pick.
"""

import torch
from torch import Tensor

from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing

HEUN = (0.3333, 0.6667)
"""The constants of the released code, which keep 4 digits of 1/3 and 2/3."""


@register("sparsemixer")
class SparseMixer(Router):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        eps: float = self.setting("sparsemixer_eps")
        remaining_TE, picks, weights = logits_TE, [], []
        for _ in range(self.config.top_k):
            pick, weight = self.pick(remaining_TE, logits_TE, eps)
            remaining_TE = remaining_TE.scatter(1, pick, float("-inf"))
            picks.append(pick)
            weights.append(weight)
        return self.routing(
            torch.cat(picks, dim=1),
            torch.cat(weights, dim=1) * self.config.routed_scaling_factor,
            logits_TE,
            logits_TE.softmax(dim=1),
            context,
        )

    def pick(self, remaining_TE: Tensor, logits_TE: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """[T, 1] expert and weight of one pick among the experts whose ``remaining`` logit is
        finite.
        """
        with torch.no_grad():
            largest, best = remaining_TE.max(dim=1, keepdim=True)
            far = (largest - logits_TE) / logits_TE.abs().clamp(min=largest) > 2 * eps
        masked_TE = remaining_TE.masked_fill(far, float("-inf"))
        gates_TE = masked_TE.softmax(dim=1)
        if not self.training:
            return best, gates_TE.gather(1, best)
        gumbel = -torch.empty_like(masked_TE).exponential_().log()
        sampled = (masked_TE.detach() + gumbel).argmax(dim=1, keepdim=True)
        weight = gates_TE.gather(1, sampled)
        exact = (sampled == best) | (torch.rand_like(weight) > 0.75)
        scale = HEUN[0] + HEUN[1] * exact.to(weight.dtype)
        return sampled, weight + (weight * (scale - 1)).detach()
