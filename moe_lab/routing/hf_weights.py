"""``Router.load_hf``: copy weights, router bias, correction bias and the few special parameters
from a Hugging Face router module.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_lab.errors import CheckpointError, require
from moe_lab.routing.router import Router

WEIGHTS = ("weight", "gate.weight", "proj.weight", "wg.weight", "layer.weight", "classifier.weight")
ROUTER_BIASES = ("bias", "classifier.bias")
SELECTION_BIASES = (
    "e_score_correction_bias",
    "moe_statics.e_score_correction_bias",
    "expert_bias",
    "balancing_biases",
)
CHILDREN = ("gate", "router")


def load_router(router: Router, module: nn.Module, selection_bias: Tensor | None) -> None:
    """See ``Router.load_hf``."""
    block, inner = (
        module,
        next(
            (
                child
                for name in CHILDREN
                if isinstance(child := getattr(module, name, None), nn.Module)
            ),
            None,
        ),
    )
    # A block's router is its child; a router whose weight sits in a linear called ``gate`` is
    # itself.
    if inner is not None and not isinstance(inner, nn.Linear):
        module = inner
    found = {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}
    outer = {name: tensor.detach() for name, tensor in block.state_dict(keep_vars=True).items()}
    copied: dict[str, Tensor] = {}
    _first(copied, "weight", WEIGHTS, found)
    _first(copied, "bias", ROUTER_BIASES, found)
    for theirs, ours in router.facts.hf_weights.items():
        if theirs in found:
            copied[ours] = found[theirs]
    if selection_bias is not None:
        copied["controller.bias"] = selection_bias.detach()
    else:
        _first(copied, "controller.bias", SELECTION_BIASES, {**outer, **found})
    _refuse_loss(router, copied)
    _assign(router, copied, type(module).__name__)


def _refuse_loss(router: Router, copied: dict[str, Tensor]) -> None:
    """Raise if a bias that is not zero has no place in ``router``, and forget it if it is."""
    homes = {"bias": router.bias is not None, "controller.bias": router.controller is not None}
    for name, at_home in homes.items():
        if name not in copied or at_home:
            continue
        require(
            name in router.facts.hf_ignored or not bool(copied[name].any()),
            f"a router without {name}",
            "one that is not zero",
            "router_bias=True" if name == "bias" else "controller=ControllerConfig()",
            error=CheckpointError,
            field=name,
        )
        del copied[name]


def _first(
    copied: dict[str, Tensor], ours: str, names: tuple[str, ...], found: Mapping[str, Tensor]
) -> None:
    for name in names:
        if name in found:
            copied[ours] = found[name].squeeze(0) if name.startswith("moe_statics") else found[name]
            return


def _assign(router: Router, copied: Mapping[str, Tensor], module: str) -> None:
    own = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    parameters = {name for name, _ in router.named_parameters()}
    missing = sorted(parameters - copied.keys() - router.facts.hf_optional)
    require(
        not missing,
        f"a router with {', '.join(missing)}",
        f"{module}, which has none",
        "another kind or module",
        error=CheckpointError,
    )
    for name, tensor in copied.items():
        target = own.get(name)
        if target is None:
            continue
        require(
            target.shape == tensor.shape,
            f"{name} of shape {list(target.shape)} in {module}",
            list(tensor.shape),
            "RouterConfig.from_hf",
            error=CheckpointError,
            field=name,
        )
        with torch.no_grad():
            target.copy_(tensor)
