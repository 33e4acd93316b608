"""``ZeroExperts``: what the zero-compute experts of a layer add, as one weighted sum and no matrix
product over experts.

Identity: ``E(x) = x`` (LongCat, arXiv 2509.01322). Zero: ``E(x) = 0``. Constant: ``E(x) = a_1 x +
a_2 v`` with ``[a_1, a_2] = softmax(W_c x)`` and a learned v (MoE++, arXiv 2410.07348 section 3.1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.routing import Routing, ZeroExpertKind


class ZeroExperts(nn.Module):
    """Shape letters: Z zero-compute experts, C of them constant.

    Args:
        kinds: what each returns; entry z belongs to expert id ``num_experts + z``.
    """

    constant_ids: Tensor
    is_identity: Tensor

    def __init__(self, kinds: Sequence[ZeroExpertKind], d_model: int) -> None:
        super().__init__()
        constants = [index for index, kind in enumerate(kinds) if kind is ZeroExpertKind.CONSTANT]
        # The last entry stands for every slot that is no zero-compute expert.
        identity = [kind is ZeroExpertKind.IDENTITY for kind in kinds] + [False]
        self.register_buffer("is_identity", torch.tensor(identity), persistent=False)
        self.register_buffer(
            "constant_ids", torch.tensor(constants, dtype=torch.int64), persistent=False
        )
        self.mixture = nn.Parameter(torch.empty(len(constants), 2, d_model)) if constants else None
        self.vector = nn.Parameter(torch.empty(len(constants), d_model)) if constants else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=d_model**-0.5)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D]: the weighted outputs of the zero-compute experts that each token selected."""
        local_TK = routing.indices - routing.num_experts
        local_TK = torch.where(local_TK < 0, self.is_identity.numel() - 1, local_TK)
        weights_TK = routing.weights.to(x_TD.dtype)
        scale_T = torch.where(self.is_identity[local_TK], weights_TK, 0.0).sum(dim=1)
        if self.mixture is None or self.vector is None:
            return x_TD * scale_T.unsqueeze(1)
        chosen_TKC = local_TK.unsqueeze(2) == self.constant_ids
        weights_TC = (weights_TK.unsqueeze(2) * chosen_TKC).sum(dim=1)
        share_TC2 = torch.einsum("td,cjd->tcj", x_TD, self.mixture.to(x_TD.dtype)).softmax(dim=2)
        scale_T = scale_T + (weights_TC * share_TC2[..., 0]).sum(dim=1)
        return x_TD * scale_T.unsqueeze(1) + (weights_TC * share_TC2[..., 1]) @ self.vector.to(
            x_TD.dtype
        )
