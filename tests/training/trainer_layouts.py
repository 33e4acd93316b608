"""Small modules with the attribute names and router outputs of torchtitan and Megatron-LM.

torchtitan: ``torchtitan/models/moe/moe.py`` at 003edbe (``TitanMoE(new=False)``) and
``torchtitan/models/common/moe.py`` at 00a4c14 (``new=True``). Megatron-LM:
``megatron/core/transformer/moe/router.py`` at 005742f, ``moe_layer.py`` at 0011998. Shape letters:
T tokens, K slots, E experts, D d_model.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, E, K, VOCABULARY = 8, 6, 2, 30


class GroupedExperts(nn.Module):
    """Stacked matrices [E, F, D] and [E, D, F]."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = E
        self.w1 = nn.Parameter(torch.randn(E, 4, D) / D)
        self.w2 = nn.Parameter(torch.randn(E, D, 4) / D)

    def forward(self, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        hidden = torch.einsum("td,efd->tef", x_TD, self.w1).relu()
        return torch.einsum("tef,edf,te->td", hidden, self.w2, weights_TE)


class RoutedExperts(GroupedExperts):
    """Under the name of the newer torchtitan."""


class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


class TokenChoiceTopKRouter(nn.Module):
    def __init__(self, new: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.num_experts, self.top_k, self.new = E, K, new
        self.score_func: Any = Sigmoid() if new else "softmax"

    def forward(
        self, x_TD: Tensor, expert_bias: Tensor | None = None, *, padding_mask_T: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x_TD)
        scores = self.score_func(logits) if self.new else logits.softmax(dim=1)
        indices = (scores if expert_bias is None else scores + expert_bias).topk(K, dim=1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, True)
        return scores.gather(1, indices), indices, chosen if self.new else chosen.sum(dim=0)


class TitanMoE(nn.Module):
    def __init__(self, new: bool) -> None:
        super().__init__()
        self.router, self.new = TokenChoiceTopKRouter(new), new
        setattr(
            self,
            "routed_experts" if new else "experts",
            (RoutedExperts if new else GroupedExperts)(),
        )
        self.register_buffer("expert_bias_E" if new else "expert_bias", torch.linspace(0, 0.5, E))

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, D)
        if self.new:
            padding = torch.zeros(len(x_TD), dtype=torch.bool)
            padding[:3] = True
            weights, indices, _ = self.router(x_TD, self.expert_bias_E, padding_mask_T=padding)
            bank = self.routed_experts
        else:
            weights, indices, _ = self.router(x_TD, self.expert_bias)
            bank = self.experts
        dense = torch.zeros(len(x_TD), E).scatter(1, indices, weights)
        return bank(x_TD, dense).view_as(x)


class TopKRouter(nn.Module):
    """Megatron's: a dense map of what runs, logits inside, ids of a token that lost its capacity
    left out.
    """

    expert_bias: Tensor

    def __init__(self, score_function: str, drop: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_moe_experts=E, moe_router_topk=K)
        self.num_experts, self.topk, self.score_function, self.drop = E, K, score_function, drop
        self.layer_number: int | None = None
        self.weight = nn.Parameter(torch.randn(E, D))
        self.register_buffer("expert_bias", torch.linspace(0, 0.5, E))

    def gating(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gating(input).view(-1, E)
        scores = logits.sigmoid() if self.score_function == "sigmoid" else logits.softmax(dim=-1)
        indices = (scores + self.expert_bias).topk(K, dim=1).indices
        ran = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, True)
        if self.drop:
            ran[0] = False
        return scores * ran, ran


class SequentialMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local_experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))


class MegatronMoE(nn.Module):
    """Named MoELayer there; hidden states are [S, B, D]."""

    def __init__(self, score_function: str = "softmax", drop: bool = False) -> None:
        super().__init__()
        self.router = TopKRouter(score_function, drop)
        self.experts = SequentialMLP()

    def forward(self, hidden_states: Tensor) -> Tensor:
        probs, _ = self.router(hidden_states)
        x_TD = hidden_states.reshape(-1, D)
        outputs = torch.stack([expert(x_TD) for expert in self.experts.local_experts], dim=1)
        return (outputs * probs.unsqueeze(2)).sum(dim=1).view_as(hidden_states)


class Model(nn.Module):
    """Layers in a list, with activation checkpointing if asked: "reentrant" or "plain"."""

    def __init__(self, *blocks: nn.Module, checkpointing: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": block}) for block in blocks)
        self.head, self.checkpointing = nn.Linear(D, VOCABULARY), checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            block = layer["moe"]
            if self.checkpointing:
                y = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
                assert isinstance(y, Tensor)
            else:
                y = block(x)
            x = x + y
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def titan(new: bool = False, **options: Any) -> Model:
    torch.manual_seed(0)
    return Model(TitanMoE(new), TitanMoE(new), **options)


def megatron(score_function: str = "softmax", drop: bool = False, **options: Any) -> Model:
    torch.manual_seed(0)
    return Model(*(MegatronMoE(score_function, drop) for _ in range(2)), **options)
