"""``ratios``: what makes two models of different size the same architecture, a mini beside its
original.
"""

from moe_lab.accounting.parameter_count import ParameterCount
from moe_lab.cost.parts import LOOKUP, Part
from moe_lab.errors import require


def ratios(counted: ParameterCount) -> dict[str, float]:
    """What makes two models of different size the same architecture; embeddings, head and lookup
    tables listed apart.

    Keys: experts_per_active (E / mean of real experts run), zero_share (zero-compute experts over
    all choices), shared_share (of the expert parameters that a token runs), layer_active (share of
    the parameters of the MoE layers that a token runs, routers and norms left out), sparsity (1 -
    active / total of all layers, routers included), table_share (n-gram tables over all parameters
    but embedding and head), embedding_share (embedding and head over all parameters).
    """
    layers = counted.moe_layers
    require(layers, "a model with MoE layers", counted.model_type, field="model")
    parts = counted.by_part
    ends = parts[Part.EMBEDDING] + parts[Part.HEAD]
    body = counted.total - ends - parts[Part.NGRAM_TABLE]
    pieces = [
        piece for number, piece in counted.pieces() if number in layers and piece.part not in LOOKUP
    ]
    square = [piece for piece in pieces if piece.part not in (Part.ROUTER, Part.NORM)]
    real, idle = (
        sum(piece.copies for piece in group)
        for group in (layers.values(), (p for p in pieces if p.part is Part.ZERO_EXPERT))
    )
    routed, shared = (
        sum(piece.active() for piece in pieces if piece.part is part)
        for part in (Part.ROUTED, Part.SHARED)
    )
    return {
        "experts_per_active": real
        / sum(piece.used.mean for piece in layers.values() if piece.used is not None),
        "zero_share": idle / (real + idle),
        "shared_share": shared / (shared + routed),
        "layer_active": sum(piece.active() for piece in square)
        / sum(piece.params for piece in square),
        "sparsity": 1 - counted.active("C") / body,
        "table_share": parts[Part.NGRAM_TABLE] / (counted.total - ends),
        "embedding_share": ends / counted.total,
    }
