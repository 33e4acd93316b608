"""The layers of a model that hold routed experts: one rule for each way in which Hugging Face
configurations state them.

A rule maps ``Fields`` to one boolean per layer. Encoder-decoder models number the decoder's layers
after the encoder's.
"""

from collections.abc import Callable

from moe_lab.errors import ConfigError, expected, require
from moe_lab.hf.fields import MOST, Fields

Rule = Callable[[Fields], list[bool]]
Visits = Callable[[Fields], list[int]]
"""From ``Fields`` to the layers that a token goes through, in order; a layer that runs several
times is there as often.
"""


def every_layer(f: Fields) -> list[bool]:
    """All layers are sparse."""
    return [True] * f.num_layers


def where(field: str) -> Rule:
    """All layers where the boolean ``field`` is true, else none."""
    return lambda f: [f.truth(field)] * f.num_layers


def leading_dense(field: str | None = "first_k_dense_replace") -> Rule:
    """``mlp_layer_types`` ("sparse" or "dense") where the configuration has it; else
    ``moe_layer_freq`` as a list of 0 and 1; else ``field`` leading dense layers, and after them
    every ``moe_layer_freq``-th layer (DeepSeek). ``field`` None: no dense layers.
    """

    def rule(f: Fields) -> list[bool]:
        if f.find("mlp_layer_types") is not None:
            kinds = f.per_layer("mlp_layer_types")
            unknown = sorted({str(kind) for kind in kinds} - {"sparse", "dense"})
            require(not unknown, "mlp_layer_types of dense and sparse", ", ".join(unknown))
            return [kind == "sparse" for kind in kinds]
        if isinstance(f.find("moe_layer_freq"), list):
            return [bool(mark) for mark in f.per_layer("moe_layer_freq")]
        first = 0 if field is None else f.size(field, 0)
        freq = f.size_or("moe_layer_freq", 1, 1)
        return [layer >= first and layer % freq == 0 for layer in range(f.num_layers)]

    return rule


def sparse_step(f: Fields) -> list[bool]:
    """Every ``decoder_sparse_step``-th layer, except ``mlp_only_layers`` (Qwen)."""
    step, dense = f.size("decoder_sparse_step"), set(f.numbers("mlp_only_layers"))
    some = f.size("num_experts", 0) > 0
    return [
        some and layer not in dense and (layer + 1) % step == 0 for layer in range(f.num_layers)
    ]


def every_nth(f: Fields) -> list[bool]:
    """Every ``moe_every_n_layers``-th layer, the second one first (Nomic): of 2, layers 1, 3, 5."""
    step = f.size("moe_every_n_layers", 0)
    return [step > 0 and layer % step == 1 % step for layer in range(f.num_layers)]


def some_experts(f: Fields) -> list[bool]:
    """All layers if there is an expert (Granite 4)."""
    return [f.size("num_experts", 0) > 0] * f.num_layers


def ernie(f: Fields) -> list[bool]:
    """``mlp_layer_types`` where the configuration has it; else ``moe_layer_start_index`` to
    ``moe_layer_end_index``, every ``moe_layer_interval``-th.
    """
    if f.find("mlp_layer_types") is not None:
        return leading_dense(None)(f)
    start, end = f.size("moe_layer_start_index", 0), f.size("moe_layer_end_index", -1)
    step, last = f.size("moe_layer_interval"), f.num_layers - 1 if end == -1 else end
    return [(layer + 1) % step == 0 and start <= layer <= last for layer in range(f.num_layers)]


def llama4(f: Fields) -> list[bool]:
    """``moe_layers``, or every ``interleave_moe_layer_step``-th."""
    if f.find("moe_layers") is not None:
        listed = set(f.numbers("moe_layers"))
        return [layer in listed for layer in range(f.num_layers)]
    step = f.size("interleave_moe_layer_step")
    return [(layer + 1) % step == 0 for layer in range(f.num_layers)]


def jamba(f: Fields) -> list[bool]:
    """Every ``expert_layer_period``-th from ``expert_layer_offset``, if there are two experts."""
    period, offset = f.size("expert_layer_period"), f.size("expert_layer_offset", 0)
    several = f.size("num_experts", 0) > 1
    return [several and layer % period == offset for layer in range(f.num_layers)]


def step3(f: Fields) -> list[bool]:
    """``moe_layers_enum``: the sparse layers as "3,4,5,...", where the configuration has it."""
    if f.find("mlp_layer_types") is not None or f.find("moe_layers_enum") is None:
        return leading_dense()(f)
    names = [name.strip() for name in f.text("moe_layers_enum").split(",") if name.strip()]
    require(
        all(name.isdecimal() for name in names),
        'moe_layers_enum as "3,4,5,..."',
        repr(f.text("moe_layers_enum")),
    )
    listed = {int(name) for name in names}
    return [layer in listed for layer in range(f.num_layers)]


_NEMOTRON = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def nemotron_marks(pattern: str) -> list[str]:
    """Layer types of a pattern: M Mamba, E experts, * attention, - dense feed-forward."""
    if unknown := sorted(set(pattern) - set(_NEMOTRON)):
        raise ConfigError(expected("hybrid_override_pattern of M, E, * and -", "".join(unknown)))
    return [_NEMOTRON[mark] for mark in pattern]


def nemotron_types(f: Fields) -> list[str]:
    return nemotron_marks(f.text("hybrid_override_pattern"))


def nemotron_layers(f: Fields) -> int:
    """The number of layers: the pattern has one mark for each."""
    listed = f.find("layer_types")
    return len(listed) if isinstance(listed, list) else len(f.text("hybrid_override_pattern"))


def nemotron(f: Fields) -> list[bool]:
    """The layers of type "moe": a layer is one mixer or one feed-forward."""
    return [kind == "moe" for kind in f.per_layer("layer_types")]


def switch(f: Fields) -> list[bool]:
    """Every n-th layer of a stack from the second: n is ``<stack>_sparse_step``, or layers over
    ``num_sparse_<stack>_layers`` where the configuration has no step.
    """

    def stack(name: str, layers: int) -> list[bool]:
        if f.find(f"{name}_sparse_step") is not None:
            step = f.size(f"{name}_sparse_step", 0)
        else:
            sparse = f.size(f"num_sparse_{name}_layers", 0)
            step = layers // sparse if sparse > 0 else layers
        return [step > 0 and (layer % step == 1 or step == 1) for layer in range(layers)]

    decoder = f.size("num_decoder_layers", most=MOST)
    return [*stack("encoder", f.num_layers), *stack("decoder", decoder)]


def nllb(f: Fields) -> list[bool]:
    """Every ``<stack>_sparse_step``-th layer of each stack."""
    marks = []
    for stack in ("encoder", "decoder"):
        step = f.size(f"{stack}_sparse_step", 0)
        layers = f.size(f"{stack}_layers", most=MOST)
        marks += [step > 0 and (layer + 1) % step == 0 for layer in range(layers)]
    return marks


def looped(f: Fields) -> list[int]:
    """Layers ``loop_layer_index_start`` to ``loop_layer_index_end - 1`` run ``loop_num_passes``
    times, one pass over all of them after the other.
    """
    layers, passes = list(range(f.num_layers)), f.size("loop_num_passes", most=MOST)
    start = f.size("loop_layer_index_start")
    end = f.size("loop_layer_index_end", start, len(layers))
    return [*layers[:start], *layers[start:end] * passes, *layers[end:]]
