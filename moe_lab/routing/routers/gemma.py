"""Gemma 4: a normalised, scaled input, softmax top-k renormalised, and one learned scale per
expert.

``u = x / rms(x) * scale / sqrt(D)``; ``s = softmax(u W^T)``; top k of s; ``g_i = s_i / sum s *
per_expert_scale_i``. The expert scale enters after the renormalisation, so the weights of a token
need not sum to one.
"""

import torch
from torch import Tensor, nn

from moe_lab.routing.config import RouterConfig
from moe_lab.routing.router import register, working_dtype
from moe_lab.routing.routers.token_choice import TokenChoice


@register("gemma")
class Gemma(TokenChoice):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.input_scale = nn.Parameter(torch.ones(d_model))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def logits(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.to(working_dtype(x_TD))
        normed = x_TD * torch.pow(
            x_TD.pow(2).mean(dim=1, keepdim=True) + self.setting("rms_norm_eps"), -0.5
        )
        return super().logits(normed * self.input_scale * self.d_model**-0.5)

    def weigh(self, scores_TE: Tensor, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        return (
            super().weigh(scores_TE, logits_TE, indices_TK)
            * self.per_expert_scale.to(scores_TE.dtype)[indices_TK]
        )
