"""``LayerReading``: what one MoE layer did in one optimiser step, as alarms, pages and files read
it.

Values are on the CPU. ``read_layers`` takes readings of moe_lab's own layers from the routings of
a step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lab.cpu_kernels.row_statistics import entropy_and_spread
from moe_lab.model import MoELayer
from moe_lab.routing import FACTS, Router, RouterConfig, Routing
from moe_lab.routing.choices import SelectOn
from moe_lab.routing.controllers.config import CONTROLLER_FACTS, Moves
from moe_lab.training.checkpoint import whole
from moe_lab.training.ranks import ALONE, Ranks


@dataclass(frozen=True, eq=False)
class LayerReading:
    """One MoE layer in one optimiser step, over all micro-batches and ranks.

    Attributes:
        step: optimiser steps done, this one included.
        layer: index of the block in the model.
        counts: [E] int64, slots that each real expert ran.
        tokens: tokens of the step, without padding.
        entropy: of the router's scores in nats, mean over tokens.
        entropy_max: the largest that ``entropy`` can be: ln of the number of experts, zero-compute
            ones included.
        mean_ffn_count: real experts executed, mean over tokens.
        sparse_scores: whether experts that a token does not run have a score of 0 (ReMoE), so that
            a low entropy is no sign of certainty.
        ffn_target: the ``mean_ffn_count`` that the layer aims at, where tokens may differ in
            their number of real experts; None: the number is fixed, or no mean is aimed at.
        num_zero_experts: zero-compute experts of the layer.
        bias: [E + Z] float, the selection bias; None: the layer has none.
        score_spread: largest less smallest of a token's scores (logits, where the router selects
            by logits), mean over tokens, as a scale for ``bias``; None: the layer has no bias.
        gradient_ratio: R_g (`moe_lab.routing.monitors`); None: not measured in this step.
        expert_norms: [E] float64, the product of the norms of each expert's matrices, 0 where its
            output is zero because a matrix is; None: not measured.
        router_norm: norm of all that the router learns, in float64: from step to step the same
            number to the bit means that it does not learn. None: not measured, or it learns
            nothing.
    """

    step: int
    layer: int
    counts: Tensor
    tokens: int
    entropy: float
    entropy_max: float
    mean_ffn_count: float
    sparse_scores: bool = False
    ffn_target: float | None = None
    num_zero_experts: int = 0
    bias: Tensor | None = None
    score_spread: float | None = None
    gradient_ratio: float | None = None
    expert_norms: Tensor | None = None
    router_norm: float | None = None

    @property
    def num_experts(self) -> int:
        return len(self.counts)


@torch.no_grad()
def read_layers(
    step: int,
    layers: Mapping[int, MoELayer],
    routings: Sequence[Sequence[Routing]],
    *,
    gradient_ratios: Sequence[float] | None = None,
    ranks: Ranks = ALONE,
) -> list[LayerReading]:
    """One reading per layer. All ranks must call it. It waits for the device once.

    Args:
        layers: block index -> layer, as ``Decoder.moe_layers()``.
        routings: of each layer, those of the step's micro-batches.
        gradient_ratios: R_g of each layer, if it was measured.

    Example:
        >>> readings = read_layers(step, model.moe_layers(), routings)
        >>> alarms.observe(readings)
    """
    measured: list[Tensor | None] = []
    for layer, seen in zip(layers.values(), routings, strict=True):
        by_logits = selects_by_logits(layer.router)
        sums = torch.stack([routing_sums(routing, by_logits) for routing in seen]).sum(dim=0)
        measured += [
            ranks.total(sums),
            expert_norms([layer.experts.gate_up, layer.experts.down]),
            parameter_norm(layer.router.parameters()),
            moved_bias(layer.router),
        ]
    found = iter(on_cpu(measured))
    readings = []
    for place, (index, layer) in enumerate(layers.items()):
        router, (sums, norms, norm, bias) = layer.router, (next(found) for _ in range(4))
        assert sums is not None
        readings.append(
            reading_of_sums(
                sums,
                step=step,
                layer=index,
                sparse_scores=router.facts.sparse_scores,
                ffn_target=ffn_target(router.config),
                num_zero_experts=router.config.num_zero_experts,
                bias=bias,
                gradient_ratio=None if gradient_ratios is None else gradient_ratios[place],
                expert_norms=norms,
                router_norm=None if norm is None else float(norm),
            )
        )
    return readings


def on_cpu(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors on the CPU, each in its dtype, in one wait for a device; None stays None."""
    there = [tensor for tensor in tensors if tensor is not None]
    if not there:
        return list(tensors)
    device = there[-1].device
    flat = torch.cat([tensor.reshape(-1).double().to(device) for tensor in there]).cpu()
    parts = iter(flat.split([tensor.numel() for tensor in there]))
    return [
        None if tensor is None else next(parts).view(tensor.shape).to(tensor.dtype)
        for tensor in tensors
    ]


def routing_sums(routing: Routing, by_logits: bool = False) -> Tensor:
    """[E + Z + 4] float64, on the device: what a reading needs of one micro-batch, in a form that
    adds up over micro-batches and ranks. Slots by expert; then, of valid tokens, their number, and
    sums of the entropy, of the real experts executed and of the spread of the scores.

    Args:
        by_logits: the spread is that of the logits.
    """
    values_TE = routing.logits if by_logits else routing.scores
    of_tokens = torch.stack(entropy_and_spread(routing.scores, values_TE)).double()
    entropy, spread = of_tokens.where(routing.valid_mask(), 0.0).sum(dim=1)
    counts = routing.counts().double()
    executed = counts[: routing.num_experts].sum()
    return torch.cat(
        [counts, torch.stack([routing.num_valid().double(), entropy, executed, spread])]
    )


def reading_of_sums(
    sums: Tensor, *, num_zero_experts: int, bias: Tensor | None, **measured: Any
) -> LayerReading:
    """The reading of a layer from its ``routing_sums`` over a step, on the CPU; ``measured`` are
    the other fields.
    """
    choices = len(sums) - 4
    tokens, entropy, ffn_count, spread = sums[choices:].tolist()
    each = max(tokens, 1)
    return LayerReading(
        counts=sums[: choices - num_zero_experts].long(),
        tokens=int(tokens),
        entropy=entropy / each,
        entropy_max=math.log(choices),
        mean_ffn_count=ffn_count / each,
        num_zero_experts=num_zero_experts,
        bias=bias,
        score_spread=None if bias is None else spread / each,
        **measured,
    )


def selects_by_logits(router: Router) -> bool:
    """Whether a router's selection bias is added to logits, not to scores."""
    return router.config.setting("select_on") is SelectOn.LOGITS


def ffn_target(config: RouterConfig) -> float | None:
    """Real experts per token that a router aims at; None where their number is fixed, or where no
    mean is aimed at (top-p with a fixed p).
    """
    runs = FACTS[config.kind].experts_run(config)
    return runs.mean if runs.least < runs.mean < runs.most else None


def moved_bias(router: Router) -> Tensor | None:
    """[E + Z]: the selection bias that the router's controller moves, where it is; None without
    such a controller.
    """
    controller = router.controller
    if controller is None or Moves.BIAS not in CONTROLLER_FACTS[controller.config.kind].moves:
        return None
    return controller.bias.detach()


def expert_norms(matrices: Iterable[Tensor]) -> Tensor:
    """[E] float64, on the device: the product of the norms of each expert's matrices.

    It bounds an expert's output and is 0 where any of its matrices is 0.

    Args:
        matrices: each [E, ...].
    """
    norms = [torch.linalg.vector_norm(matrix.detach().flatten(1), dim=1) for matrix in matrices]
    return torch.stack([whole(norm).double() for norm in norms]).prod(dim=0)


def parameter_norm(parameters: Iterable[Tensor]) -> Tensor | None:
    """[] float64, on the device: the norm of all of ``parameters`` together; None if there are
    none.
    """
    norms = [
        whole(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64))
        for parameter in parameters
    ]
    return torch.stack(norms).norm() if norms else None
