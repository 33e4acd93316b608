"""The losses and measures here on the scores and choices of a router that is not from moe_lab."""

import torch

from moe_lab.measures import dead_experts, max_violation
from moe_lab.routing import Routing, losses

torch.manual_seed(0)
logits = torch.randn(512, 16, requires_grad=True)  # yours: [T, E]
scores = logits.softmax(dim=-1)
indices = scores.topk(2, dim=-1).indices  # [T, K]

routing = Routing.from_scores(scores, indices)
balance = losses.load_balancing_loss(routing)  # 1 at uniform load
(gradient,) = torch.autograd.grad(balance, logits)
print(f"balance loss {balance.item():.3f}, gradient {gradient.norm().item():.2e}")
print(f"MaxVio {max_violation(routing.counts()).item():.2f} (0 is even),", end=" ")
print("experts without a token:", int(dead_experts(routing.counts())))
