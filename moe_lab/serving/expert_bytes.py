"""Bytes of one expert of each layer: given, counted from a configuration, or recorded."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lab.accounting import count
from moe_lab.errors import AnalysisError, require
from moe_lab.plain_text import one_line
from moe_lab.trace import LayerMeta, TraceMeta

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
        AnalysisError: another number of experts or slots in ``config`` than in the trace; no size
            of an expert of some layer; a size of less than a byte or more than ``MOST``.
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
            traced = (layer.num_experts, layer.top_k)
            piece = pieces.get(layer.layer)
            used = None if piece is None else piece.used
            fixed = used is not None and used.least == used.most
            experts = layer.num_experts if piece is None else piece.copies
            slots = int(used.most) if used is not None and fixed else layer.top_k
            require(
                (experts, slots) == traced,
                f"the configuration of the traced model, {layer.num_experts} experts and "
                f"{layer.top_k} slots in layer {layer.layer}",
                f"one of {experts} and {slots}",
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
        f"the bytes of one expert of each layer, 1 to {MOST:,}",
        ", ".join(given.get(layer.layer, f"none for layer {layer.layer}") for layer in layers[:5]),
        "--config with the model's config.json, or --expert-bytes",
        error=AnalysisError,
        field="expert_bytes",
    )
    return np.array([round(size) for size in sizes], np.int64)


def other_model(meta: TraceMeta, config: Any, name: str = "") -> str:
    """What speaks for ``config`` being of another model than the trace, in one line; empty where
    nothing does. ``name``: of the model of ``config``, empty where unknown.
    """
    own, theirs = (_bare(text) for text in (meta.model, name))
    clauses = []
    if own and theirs and own != theirs:
        clauses.append(f"the trace is of {one_line(meta.model)}, --config of {one_line(name)}")
    layers = count(config).moe_layers.keys()
    if absent := layers - {layer.layer for layer in meta.layers}:
        clauses.append(f"{len(absent)} of the {len(layers)} MoE layers of --config are not traced")
    return "; ".join(clauses)


def _bare(name: str) -> str:
    """A model's name without its owner and revision, in small letters."""
    return name.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
