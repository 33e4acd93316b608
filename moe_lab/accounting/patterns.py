"""Which layers are what: rules that read a pattern from a configuration, for layer types and for
the layers that are sparse.
"""

from collections.abc import Callable

from moe_lab.errors import ConfigError, expected
from moe_lab.hf.fields import Fields

Rule = Callable[[Fields], list[bool]]


def every(f: Fields) -> list[bool]:
    """All layers are sparse."""
    return [True] * f.num_layers


def first_only(f: Fields) -> list[bool]:
    """The first layer."""
    return [layer == 0 for layer in range(f.num_layers)]


def after_dense(f: Fields) -> list[bool]:
    """``first_k_dense_replace`` leading dense layers; then every ``moe_layer_freq``-th, or where
    its list says so (DeepSeek).
    """
    first, layers = f.size("first_k_dense_replace", 0), f.num_layers
    if isinstance(f.find("moe_layer_freq"), list):
        return [bool(mark) for mark in f.per_layer("moe_layer_freq")]
    freq = f.size_or("moe_layer_freq", 1, 1)
    return [layer >= first and layer % freq == 0 for layer in range(layers)]


def leading_dense(field: str) -> Rule:
    """As many leading dense layers as ``field`` says."""
    return lambda f: [layer >= f.size(field, 0) for layer in range(f.num_layers)]


def by_mlp_type(otherwise: Rule) -> Rule:
    """``mlp_layer_types`` ("sparse" or "dense") where the configuration has it, else another rule."""

    def rule(f: Fields) -> list[bool]:
        if f.find("mlp_layer_types") is None:
            return otherwise(f)
        kinds = f.per_layer("mlp_layer_types")
        unknown = sorted({str(kind) for kind in kinds} - {"sparse", "dense"})
        if unknown:
            raise ConfigError(expected("mlp_layer_types of dense and sparse", ", ".join(unknown)))
        return [kind == "sparse" for kind in kinds]

    return rule


def listed(otherwise: Rule) -> Rule:
    """``moe_layer_freq`` as a list of 0 and 1 where the configuration has it, else another rule."""

    def rule(f: Fields) -> list[bool]:
        if f.find("moe_layer_freq") is None:
            return otherwise(f)
        return [bool(mark) for mark in f.per_layer("moe_layer_freq")]

    return rule


def usual_dense(count: int) -> Rule:
    """``count`` leading dense layers, which no field says: noted as an assumption."""

    def rule(f: Fields) -> list[bool]:
        if f.find("first_k_dense_replace") is None:
            f.note(
                "mlp_layer_types",
                f"the first {count} layers are dense (no mlp_layer_types; the usual pattern of {f.family})",
            )
        first = f.size_or("first_k_dense_replace", count)
        return [layer >= first for layer in range(f.num_layers)]

    return rule


def sparse_step(f: Fields) -> list[bool]:
    """Every ``decoder_sparse_step``-th layer, except ``mlp_only_layers`` (Qwen)."""
    step, dense, experts = (
        f.size("decoder_sparse_step"),
        set(f.numbers("mlp_only_layers")),
        f.size("num_experts", 0),
    )
    return [
        layer not in dense and experts > 0 and (layer + 1) % step == 0
        for layer in range(f.num_layers)
    ]


def ernie(f: Fields) -> list[bool]:
    """``moe_layer_start_index`` to ``moe_layer_end_index``, every ``moe_layer_interval``-th."""
    start, end, step = (
        f.size("moe_layer_start_index", 0),
        f.size("moe_layer_end_index", -1),
        f.size("moe_layer_interval"),
    )
    last = f.num_layers - 1 if end == -1 else end
    return [(layer + 1) % step == 0 and start <= layer <= last for layer in range(f.num_layers)]


def llama4(f: Fields) -> list[bool]:
    """``moe_layers``, or every ``interleave_moe_layer_step``-th."""
    if f.find("moe_layers") is not None:
        listed = set(f.numbers("moe_layers"))
        return [layer in listed for layer in range(f.num_layers)]
    step = f.size("interleave_moe_layer_step")
    return [(layer + 1) % step == 0 for layer in range(f.num_layers)]


def jamba_experts(f: Fields) -> list[bool]:
    """Every ``expert_layer_period``-th from ``expert_layer_offset``, if there is more than one
    expert.
    """
    period, offset, several = (
        f.size("expert_layer_period"),
        f.size("expert_layer_offset", 0),
        f.size("num_experts", 0) > 1,
    )
    return [several and layer % period == offset for layer in range(f.num_layers)]


def step3_layers(f: Fields) -> list[bool]:
    """``moe_layers_enum``: the sparse layers as "3,4,5,..."; else all after three dense ones."""
    if f.find("moe_layers_enum") is None:
        return usual_dense(3)(f)
    names = f.text("moe_layers_enum").split(",")
    if not all(name.strip().isdecimal() for name in names if name.strip()):
        raise ConfigError(
            expected('moe_layers_enum as "3,4,5,..."', repr(f.text("moe_layers_enum")))
        )
    listed = {int(name) for name in names if name.strip()}
    return [layer in listed for layer in range(f.num_layers)]


# -----------------------------------------------------------------------------------------------------------
# layer types

Types = Callable[[Fields], list[str]]


def usual_types(f: Fields, types: list[str], what: str) -> list[str]:
    """A pattern that no field says: noted as an assumption."""
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


_NEMOTRON = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def nemotron_types(f: Fields) -> list[str]:
    return nemotron_marks(f.text("hybrid_override_pattern"))


def nemotron_marks(pattern: str) -> list[str]:
    """M Mamba, E experts, * attention, - dense feed-forward."""
    if unknown := sorted(set(pattern) - set(_NEMOTRON)):
        raise ConfigError(expected("hybrid_override_pattern of M, E, * and -", "".join(unknown)))
    return [_NEMOTRON[mark] for mark in pattern]


def nemotron_layers(f: Fields) -> int:
    """The pattern has one mark for each layer."""
    listed = f.find("layer_types")
    return len(listed) if isinstance(listed, list) else len(f.text("hybrid_override_pattern"))


# ------------------------------------------------------------------------------------------------------
# other derivations


def kv_is_heads(f: Fields) -> int:
    """No ``num_key_value_heads``: multi-head attention."""
    heads = f.size("num_attention_heads")
    if not f.given("num_key_value_heads"):
        f.assume("num_key_value_heads", heads, "as many as num_attention_heads")
    return heads
