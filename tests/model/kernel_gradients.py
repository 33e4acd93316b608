"""What every backend of fused kernels must hold, beside its own tests."""

import torch
from refusals import refused
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_lab.model import MoEConfig, MoELayer
from moe_lab.routing import RouterConfig


def layer_of(dispatch: str, zero: int) -> MoELayer:
    router = RouterConfig(kind="longcat" if zero else "softmax_topk", num_experts=4, top_k=2)
    router = router.replace(num_zero_experts=zero)
    torch.manual_seed(0)
    return MoELayer(MoEConfig(8, 4, router, dispatch=dispatch))


def check_second_order_is_refused(dispatch: str, zero: int) -> None:
    x = torch.randn(6, 8, requires_grad=True)
    with refused("dispatch"):
        torch.autograd.grad(layer_of(dispatch, zero)(x).sum(), x, create_graph=True)


def gradients_of_a_layer(dispatch: str, zero: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``gate_up``: as it is, with activation checkpointing, and in bfloat16 under autocast."""
    layer = layer_of(dispatch, zero)
    x = torch.randn(6, 8, requires_grad=True)

    def gradient(whole: bool, half: bool) -> Tensor:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = layer(x) if whole else checkpoint(layer, x, use_reentrant=False)
            assert isinstance(y, Tensor)
            y.float().square().sum().backward()
        assert layer.experts.gate_up.grad is not None
        return layer.experts.gate_up.grad.clone()

    return (
        gradient(whole=True, half=False),
        gradient(whole=False, half=False),
        gradient(whole=True, half=True),
    )
