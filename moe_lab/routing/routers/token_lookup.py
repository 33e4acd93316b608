"""Token-id lookup: the experts, weights and count of a token follow from its id alone. The null
model of the difficulty analysis.

``fit(token_ids, routing)`` reads another router's decisions: an id gets as many experts as it had
on average (rounded), the ones it chose most often, each with its mean weight when chosen. Ids never
seen get what all tokens together would. A router that gives hard tokens more compute must differ
from this one, which cannot know anything but the id.
"""

import torch
from torch import Tensor

from moe_lab.errors import ConfigError, expected, require
from moe_lab.routing.config import RouterConfig
from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routers.hash import equal_weights
from moe_lab.routing.routing import UNUSED, Routing


@register("token_lookup")
class TokenLookup(Router):
    learned = False
    table: Tensor
    table_weights: Tensor

    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        assert config.vocab_size is not None
        self.register_buffer("table", torch.full((config.vocab_size, config.top_k), UNUSED))
        self.register_buffer("table_weights", torch.zeros(config.vocab_size, config.top_k))

    @torch.no_grad()
    def fit(self, token_ids: Tensor, routing: Routing) -> None:
        """Build the table from one pass: [T] ids and the routing of the same tokens (padding is
        left out).

        Raises:
            ConfigError: another number of tokens or experts, or an id outside the vocabulary.
        """
        size, choices = self.table.shape[0], self.config.num_choices
        require(
            token_ids.shape == routing.indices.shape[:1] and routing.scores.shape[1] == choices,
            f"ids and a routing over {choices} experts of the same tokens",
            list(token_ids.shape),
        )
        valid = (
            torch.ones_like(token_ids, dtype=torch.bool) if routing.valid is None else routing.valid
        )
        ids, indices_TK, weights_TK = (
            token_ids[valid],
            routing.indices[valid],
            routing.weights.detach()[valid],
        )
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
            raise ConfigError(
                expected(
                    f"token ids below vocab_size {size}", f"{int(ids.min())}..{int(ids.max())}"
                ),
                field="token_ids",
            )
        used_TK = indices_TK >= 0
        pair = (ids.unsqueeze(1) * choices + indices_TK)[used_TK]
        times_VE, weight_VE = (
            ids.new_zeros(size * choices, dtype=torch.float32)
            .index_add_(0, pair, values)
            .view(size, choices)
            for values in (torch.ones_like(pair, dtype=torch.float32), weights_TK[used_TK].float())
        )
        seen_V = torch.bincount(ids, minlength=size)
        unseen = seen_V == 0
        count_V = torch.where(
            unseen, used_TK.sum() / max(ids.shape[0], 1), times_VE.sum(dim=1) / seen_V.clamp_min(1)
        )
        mean_VE = weight_VE / times_VE.clamp_min(1)
        mean_VE[unseen] = weight_VE.sum(dim=0) / times_VE.sum(dim=0).clamp_min(1)
        times_VE[unseen] = times_VE.sum(dim=0)
        chosen_VK = times_VE.argsort(dim=1, descending=True, stable=True)[:, : self.config.top_k]
        # An expert that was never chosen is never looked up, however large the rounded count.
        kept_VK = (
            torch.arange(self.config.top_k, device=ids.device) < count_V.round().unsqueeze(1)
        ) & (times_VE.gather(1, chosen_VK) > 0)
        self.table.copy_(torch.where(kept_VK, chosen_VK, UNUSED))
        self.table_weights.copy_(torch.where(kept_VK, mean_VE.gather(1, chosen_VK), 0.0))

    def decide(self, x_TD: Tensor, context: RouterContext) -> Routing:
        ids_T = context.ids_of(x_TD.shape[0], self.kind)
        routing = equal_weights(self, x_TD, self.table[ids_T], context)
        routing.weights.copy_(self.table_weights[ids_T])
        return routing
