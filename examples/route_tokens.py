"""Which experts run for each token? Any of the router kinds, on random tokens."""

import torch

from moe_lab.routing import RouterConfig, build_router

config = RouterConfig(kind="longcat", num_experts=16, num_zero_experts=8, top_k=6)
router = build_router(config, d_model=64)
routing = router(torch.randn(2, 128, 64))  # [B, S, D], or [T, D]

print(routing)
print("slots per expert, zero-computation experts last:", routing.counts().tolist())
print("real experts per token, mean:", routing.ffn_count().float().mean().item())
