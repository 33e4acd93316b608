"""The value of eight code bases' balance losses at uniform load, and the coefficient that has the
same effect here.
"""

from collections.abc import Callable

from moe_lab.errors import require

CODE_BASES: dict[str, Callable[[int, int], float]] = {
    "moe_lab": lambda experts, top_k: 1.0,
    "transformers": lambda experts, top_k: float(top_k),
    "megatron": lambda experts, top_k: 1.0,
    "deepspeed": lambda experts, top_k: 1.0,
    "olmo_core": lambda experts, top_k: 1.0,
    "megablocks": lambda experts, top_k: 1.0,
    "tutel": lambda experts, top_k: 1.0,
    "gshard": lambda experts, top_k: 1.0 / experts**2,
    "moepp": lambda experts, top_k: top_k / experts,
}
"""Code base -> value of its loss, before its coefficient, at uniform load with E experts and k
slots per token.
"""


def convert_coefficient(
    coefficient: float, source: str, *, num_experts: int, top_k: int, target: str = "moe_lab"
) -> float:
    """The coefficient that gives ``target``'s loss the weight that ``coefficient`` gives
    ``source``'s.

    Exact where both count all k slots; Tutel, GShard and DeepSpeed's top-2 count first choices
    only, so it is exact for them at k = 1 and at uniform load. Raises ``ConfigError`` for an
    unknown code base.
    """
    for name in (source, target):
        require(
            name in CODE_BASES,
            f"a code base among {', '.join(sorted(CODE_BASES))}",
            repr(name),
            field="code_base",
        )
    return (
        coefficient
        * CODE_BASES[source](num_experts, top_k)
        / CODE_BASES[target](num_experts, top_k)
    )
