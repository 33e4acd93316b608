"""Bytes of one expert of each layer: given, counted from a configuration, or recorded."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lab.accounting import count
from moe_lab.errors import AnalysisError, require
from moe_lab.trace import LayerMeta

Bytes = float | Mapping[int, float]
MOST = 2**40
"""Bytes of one expert: sums over experts and requests stay within 64 bits."""


def bytes_by_layer(
    layers: tuple[LayerMeta, ...],
    config: Any = None,
    bytes_per_parameter: float = 2.0,
    expert_bytes: Bytes | None = None,
) -> NDArray[np.int64]:
    """[L] bytes of one expert of each layer.

    Args:
        layers: of the trace.
        config: what ``accounting.count`` takes; an expert's parameters times
            ``bytes_per_parameter``.
        expert_bytes: bytes of an expert of every layer, or by layer number; goes before ``config``,
            and both go before what the trace recorded.

    Raises:
        AnalysisError: another number of experts in ``config`` than in the trace; no size of an
            expert of some layer; a size of less than a byte or more than ``MOST``.
    """
    if expert_bytes is not None:
        table = (
            dict(expert_bytes)
            if isinstance(expert_bytes, Mapping)
            else dict.fromkeys((layer.layer for layer in layers), float(expert_bytes))
        )
    elif config is not None:
        pieces = count(config).moe_layers
        for layer in layers:
            experts = pieces[layer.layer].copies if layer.layer in pieces else layer.num_experts
            require(
                experts == layer.num_experts,
                f"the configuration of the traced model, {layer.num_experts} experts in layer "
                f"{layer.layer}",
                f"one of {experts}",
                "--config with the config.json of that model",
                error=AnalysisError,
                field="config",
            )
        table = {number: piece.size * bytes_per_parameter for number, piece in pieces.items()}
    else:
        table = {layer.layer: float(layer.expert_bytes) for layer in layers if layer.expert_bytes}
    sizes = [table.get(layer.layer, 0.0) for layer in layers]
    given = {number: f"{size:g} in layer {number}" for number, size in table.items()}
    require(
        all(1 <= size <= MOST for size in sizes),  # not where one is NaN
        f"the bytes of one expert of each layer, 1 to {MOST}",
        ", ".join(given.get(layer.layer, f"none for layer {layer.layer}") for layer in layers[:5]),
        "--config with the model's config.json, or --expert-bytes",
        error=AnalysisError,
        field="expert_bytes",
    )
    return np.array([round(size) for size in sizes], np.int64)
