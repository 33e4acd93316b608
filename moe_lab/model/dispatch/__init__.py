"""Dispatch: run each token through its selected real experts and add up the weighted outputs.

Every backend computes ``y_t = sum_k w_tk * E_{i_tk}(x_t)`` over the slots whose id is a real
expert; zero-compute experts are the layer's business and cost nothing here. They differ in speed
alone:

| name | what it does | where |
|---|---|---|
| ``oracle`` | the definition, token by token; the others are tested against it | anywhere, slowly |
| ``cpu`` | one autograd function, a few tensor calls per expert on rows in cache | anywhere |
| ``native`` | the same in C++, compiled once per machine | CPU, float32 and float64 |
| ``grouped`` | one ``grouped_mm`` for all experts, no host synchronisation | CUDA; right on a CPU |
| ``liger`` | liger-kernel's fused Triton kernels (extra ``gpu``), SwiGLU without a limit | CUDA |
| ``quack`` | quack-kernels' grouped products (extra ``gpu``), SwiGLU without a limit | CUDA 9.0+ |

``auto`` takes the fastest that can run what it is given, again at each call; ``choose`` returns its
name and why. Among the backends for CUDA it goes by facts, for none has a figure of ours yet:
``grouped`` in bfloat16 on Hopper and data-centre Blackwell, where torch has one kernel for it;
elsewhere torch runs one product per expert and waits for their sizes, so in half precision
``liger`` is taken. ``quack`` runs by its name alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.model.dispatch import native
from moe_lab.model.dispatch.bank import (
    Bank,
    Biases,
    Dispatch,
    Weights,
    biases_of,
    gating_of,
    takes_biases,
)
from moe_lab.model.dispatch.grouped import can_group, grouped
from moe_lab.model.dispatch.liger import liger, obstacle
from moe_lab.model.dispatch.loop import loop
from moe_lab.model.dispatch.oracle import oracle
from moe_lab.model.dispatch.quack import quack
from moe_lab.registry import Registry
from moe_lab.routing import Routing

__all__ = ["BACKENDS", "Backend", "Bank", "Choice", "backend", "choose", "under_autocast"]


Backend = Dispatch

BACKENDS = Registry("a dispatch backend")
"""Name -> backend. Another one is added by ``@BACKENDS.register("name")``."""

ONE_KERNEL = (9, 10)
"""Major compute capabilities on which ``grouped_mm`` is one kernel in bfloat16, torch 2.13's gate
(pytorch/pytorch#194227: 11 takes the products of a loop, and so does 12).
"""

_BUILT_IN: dict[str, Backend] = {
    "oracle": oracle,
    "cpu": loop,
    "native": native.experts,
    "grouped": grouped,
    "liger": liger,
    "quack": quack,
}
for _name, _backend in _BUILT_IN.items():
    BACKENDS.add(_name, _backend)


class Choice(NamedTuple):
    """The backend that ``auto`` runs, and why in words."""

    name: str
    reason: str


def choose(x_TD: Tensor, bank: Bank) -> Choice:
    """What ``auto`` runs for these tensors: their device, dtype and shape decide, and on CUDA in
    half precision whether the extra ``gpu`` is installed.
    """
    if x_TD.device.type == "cpu":
        if x_TD.dtype not in native.DTYPES:
            return Choice("cpu", "the compiled backend takes float32 and float64")
        if not native.available():
            return Choice("cpu", native.problem() or "there is no compiled backend")
        return Choice("native", "it is compiled for this processor")
    if x_TD.device.type == "meta":  # nothing may wait for a value
        return Choice("grouped", "on the meta device nothing is computed")
    if not can_group(x_TD, bank):
        return Choice("cpu", "grouped_mm does not take this dtype, or weights like these")
    major, _ = torch.cuda.get_device_capability(x_TD.device)
    if x_TD.dtype == torch.bfloat16 and major in ONE_KERNEL:
        return Choice("grouped", "its products are one kernel here; others have no figure yet")
    if x_TD.dtype == torch.float32:
        return Choice("grouped", "liger would round float32 products to TF32")
    why = obstacle(x_TD, bank)
    if why:
        return Choice("grouped", "liger does not run: " + why)
    return Choice("liger", "grouped_mm is one product per expert on this device in this dtype")


def auto(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    return _BUILT_IN[choose(x_TD, bank).name](x_TD, routing, bank)


def backend(name: str) -> Backend:
    """The backend of that name, or "auto". Raises ``ConfigError`` for another name."""
    return auto if name == "auto" else takes_biases(BACKENDS.find(name))


def under_autocast(x_TD: Tensor, bank: Bank) -> tuple[Tensor, Bank]:
    """Tokens and weights in the dtype in which autocast runs matrix products, where it is on
    (float64 stays, as everywhere in autocast).
    """
    kind = x_TD.device.type
    if kind == "meta" or x_TD.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x_TD, bank
    dtype = torch.get_autocast_dtype(kind)
    biases = biases_of(bank)
    cast = None if biases is None else Biases(*(bias.to(dtype) for bias in biases))
    weights = bank.gate_up.to(dtype), bank.down.to(dtype)
    return x_TD.to(dtype), Weights(*weights, gating_of(bank), cast)
