"""The mixer of each layer: rules that read a pattern of layer types from a configuration.

Which layers are sparse is said in ``moe_lab.hf.sparse_layers``.
"""

from collections.abc import Callable

from moe_lab.hf.fields import Fields

Types = Callable[[Fields], list[str]]


def usual_types(f: Fields, types: list[str], what: str) -> list[str]:
    """A pattern of layer types that no field states; noted as an assumption."""
    f.note(
        "layer_types",
        f"layer_types: {what} (not in the configuration; the usual pattern of {f.family})",
    )
    return types


def all_of(kind: str) -> Types:
    return lambda f: usual_types(f, [kind] * f.num_layers, f"every layer {kind}")


def every_nth_full(period: str | int, other: str, full: str = "full_attention") -> Types:
    """``other`` except every ``period``-th layer, counted from 1; ``period`` is a number or the
    field that has it.
    """

    def rule(f: Fields) -> list[str]:
        step = period if isinstance(period, int) else f.size(period, 0)
        types = [other if not step or (layer + 1) % step else full for layer in range(f.num_layers)]
        return (
            usual_types(f, types, f"{full} in every layer divisible by {step}, else {other}")
            if isinstance(period, int)
            else types
        )

    return rule


def indexer_types(f: Fields) -> list[str]:
    """ "full" where a layer selects tokens itself, "shared" where it takes over the selection of an
    earlier one (GLM-5).
    """
    pattern = f.find("index_topk_pattern")
    if isinstance(pattern, str):
        return [{"F": "full", "S": "shared"}.get(mark, mark) for mark in pattern]
    if pattern is not None:
        return f.per_layer("index_topk_pattern")
    every_nth, skipped = (
        max(f.size_or("index_topk_freq", 1), 1),
        f.size_or("index_skip_topk_offset", 2),
    )
    return [
        "full" if max(layer - skipped + 1, 0) % every_nth == 0 else "shared"
        for layer in range(f.num_layers)
    ]


def kda_types(f: Fields) -> list[str]:
    """Kimi Linear: ``linear_attn_config.full_attn_layers`` counts layers from 1."""
    listed = f.table("linear_attn_config").get("full_attn_layers")
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        full = set(range(4, f.num_layers, 4))
        types = [
            "full_attention" if layer in full else "linear_attention"
            for layer in range(f.num_layers)
        ]
        return usual_types(
            f, types, "full_attention in every fourth layer after the first, else linear_attention"
        )
    return [
        "full_attention" if layer + 1 in set(listed) else "linear_attention"
        for layer in range(f.num_layers)
    ]


def jamba_types(f: Fields) -> list[str]:
    period, offset = f.size("attn_layer_period"), f.size("attn_layer_offset", 0)
    return [
        "full_attention" if layer % period == offset else "linear_attention"
        for layer in range(f.num_layers)
    ]


def bamba_types(f: Fields) -> list[str]:
    attention = set(f.numbers("attn_layer_indices"))
    return [
        "full_attention" if layer in attention else "linear_attention"
        for layer in range(f.num_layers)
    ]


def lara_types(f: Fields) -> list[str]:
    """Lara Mini: a period of five layers."""
    kinds = ("linear", "sliding", "linear", "full", "sliding")
    types = [f"{kinds[layer % 5]}_attention" for layer in range(f.num_layers)]
    return usual_types(f, types, f"{', '.join(kinds)} in turn")


def first_only(f: Fields) -> list[bool]:
    """Mark the first layer alone."""
    return [layer == 0 for layer in range(f.num_layers)]


# --------------------------------------------------------------------------------------------------
# other derivations


def kv_is_heads(f: Fields) -> int:
    """As many key-value heads as query heads; an assumption where the configuration does not state
    the number.
    """
    heads = f.size("num_attention_heads")
    if not f.given("num_key_value_heads"):
        f.assume("num_key_value_heads", heads, "as many as num_attention_heads")
    return heads
