"""The training objective of a step, and the model spread over the ranks that compute it."""

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_lab.config import require
from moe_lab.model import Decoder
from moe_lab.routing import DecidesOver, Routing
from moe_lab.routing.losses import LOSSES, load_balancing_loss, z_loss
from moe_lab.routing.losses.across_ranks import shared_by
from moe_lab.training.config import Dtype, RunConfig
from moe_lab.training.ranks import Parallel, Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Objective(nn.Module):
    """[B, S+1] token ids of this rank's part of a micro-batch -> language-model loss, weighted
    auxiliary losses, detached routings.

    The means of both losses over the ranks of the micro-batch are the losses of the whole
    micro-batch, and so are those of their gradients: every rank has equally many targets, z-loss
    and the model's own losses are means over tokens, the balance loss has its load from the counts
    of all ranks, and routers' own losses take their sums from all of them.
    """

    def __init__(self, model: Decoder, config: RunConfig, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.config, self.ranks = model, config, ranks

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, list[Routing]]:
        config = self.config
        whole = shared_by(self.ranks.parts, self.ranks.group)
        with (
            whole,
            torch.autocast(
                batch.device.type, dtype=torch.bfloat16, enabled=config.dtype == Dtype.BFLOAT16
            ),
        ):
            output = self.model(batch[:, :-1], batch[:, 1:])
        assert output.loss is not None
        auxiliary = torch.zeros((), device=batch.device)
        for routing, balance in zip(output.routings, self._balance(output.routings), strict=True):
            auxiliary = auxiliary + config.router_aux_loss_coef * balance
            auxiliary = auxiliary + config.router_z_loss_coef * z_loss(routing)
            for value in routing.losses.values():
                auxiliary = auxiliary + config.router_own_loss_coef * value
            for term in config.losses:
                auxiliary = auxiliary + term.coefficient * LOSSES[term.name](routing)
        auxiliary = auxiliary / max(len(output.routings), 1)
        for part in output.losses.values():
            auxiliary = auxiliary + part
        return output.loss, auxiliary, [routing.detach() for routing in output.routings]

    def _balance(self, routings: list[Routing]) -> list[Tensor]:
        """Of each layer over the whole micro-batch; one exchange for all layers."""
        if self.ranks.parts == 1 or not routings:
            return [load_balancing_loss(routing) for routing in routings]
        local = [
            torch.cat([routing.selected_counts(), routing.num_valid().reshape(1)])
            for routing in routings
        ]
        found = self.ranks.total_of_micro_batch(torch.cat(local)).split(
            [len(counts) for counts in local]
        )
        return [
            # A part's share of the sum, times the parts: their mean is what gradients are averaged
            # to.
            self.ranks.parts
            * load_balancing_loss(routing, scope="global", counts=counts[:-1], tokens=counts[-1])
            for routing, counts in zip(routings, found, strict=True)
        ]


def check_shareable(config: RunConfig, ranks: Ranks) -> None:
    """Raise ``ConfigError`` where ranks would share micro-batches over which the router must decide
    as one.
    """
    moe = config.model.moe
    if ranks.parts == 1 or moe is None:
        return
    what = (
        f"a grad_accumulation that is a multiple of the {ranks.size} ranks: "
        f"router {moe.router.kind!r} decides over whole micro-batches"
    )
    require(
        moe.router.decides_over is not DecidesOver.BATCH,
        what,
        config.grad_accumulation,
        f"grad_accumulation {ranks.size}",
        field="grad_accumulation",
    )


def spread(objective: Objective, ranks: Ranks) -> nn.Module:
    """The objective to call in training: gradients come out averaged over the ranks. The model is
    changed in place by "fsdp".

    Raises ``ConfigError`` for a model that cannot be spread so.
    """
    if ranks.parallel == Parallel.DDP:
        return _replicated(objective, ranks.device)
    if ranks.parallel == Parallel.FSDP:
        scalars = [
            name for name, parameter in objective.model.named_parameters() if parameter.dim() == 0
        ]
        require(
            not scalars,
            "parameters with an axis to shard for parallel 'fsdp'",
            ", ".join(scalars),
            "parallel 'ddp'",
            field="parallel",
        )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        for block in objective.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(objective.model, mesh=mesh)
    return objective


def _replicated(objective: Objective, device: torch.device) -> nn.Module:
    # The controllers keep their buffers equal themselves. (The option has another name from torch
    # 2.13 on.)
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
    }
    # A router may have parameters that no loss reaches, so DDP must look for such; this one keeps
    # it from warning where there is none.
    objective.unreached = nn.Parameter(torch.zeros((), device=device))
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        objective, device_ids=devices, find_unused_parameters=True, **buffers
    )


def average_gradients(objective: nn.Module, now: bool) -> None:
    """Whether the coming backward pass exchanges gradients: only the last micro-batch of a step
    needs to.
    """
    if isinstance(objective, DistributedDataParallel):
        objective.require_backward_grad_sync = now
    elif isinstance(objective, Objective) and objective.ranks.parallel == Parallel.FSDP:
        cast("FSDPModule", objective.model).set_requires_gradient_sync(now)
