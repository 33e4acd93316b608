"""A Mixture-of-Experts layer in a training loop of your own: loss, balance loss, controller."""

import torch

from moe_lab.measures import load_cv
from moe_lab.model import MoEConfig, MoELayer
from moe_lab.routing import ControllerConfig, RouterConfig, losses

torch.manual_seed(0)
controller = ControllerConfig(kind="sign", rate=0.01)
router = RouterConfig(kind="deepseek_v3", num_experts=8, top_k=2, controller=controller)
layer = MoELayer(MoEConfig(d_model=32, d_expert=64, router=router))
optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)

for step in range(50):
    x = torch.randn(256, 32) + 1
    y, routing = layer(x, return_routing=True)
    loss = (y - x.roll(1, dims=1)).square().mean() + 0.01 * losses.load_balancing_loss(routing)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    layer.router.update(routing)  # moves the selection bias, once a step
    if step % 10 == 0:
        cv = load_cv(routing.counts()).item()
        print(f"step {step}: loss {loss.item():.3f}, load CV {cv:.2f} (0 is even)")
