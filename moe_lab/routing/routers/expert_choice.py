"""Expert choice (arXiv 2202.09368, section 3): experts choose tokens. Each takes its C = T c / E
best, c = ``top_k`` on average per token.

``s = softmax(l)`` over the experts; expert i takes the C tokens of largest ``s_.i``, so the load is
even by construction and the count per token free, from 0 to E. Weights are the scores. The choice
looks at the whole batch: tokens of the future and of other sequences decide, which a causal model
cannot do at inference (Expert Threshold is the causal relative).
"""

import torch
from torch import Tensor

from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing
from moe_lab.routing.select import slots_from_mask, take


@register("expert_choice")
class ExpertChoice(Router):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        scores_TE = logits_TE.softmax(dim=1)
        indices_TK = slots_from_mask(
            self.chosen(scores_TE.detach(), context.valid), scores_TE, self.config.num_slots
        )
        return self.routing(
            indices_TK,
            take(scores_TE, indices_TK) * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )

    def chosen(self, scores_TE: Tensor, valid: Tensor | None) -> Tensor:
        """[T, E] bool: what each expert takes; padding is never taken."""
        tokens = scores_TE.shape[0] if valid is None else int(valid.sum())
        each = min(max(tokens * self.config.top_k // scores_TE.shape[1], 1), tokens)
        ranked_TE = (
            scores_TE
            if valid is None
            else scores_TE.masked_fill(~valid.unsqueeze(1), float("-inf"))
        )
        best_CE = ranked_TE.topk(each, dim=0).indices
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, best_CE, True)
