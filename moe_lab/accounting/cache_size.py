"""``cache_size(config)``: what a decoding sequence keeps in memory.

Softmax attention keeps numbers for each key (``kv heads * (qk + v)``; latent attention its latent
and the rotary key, arXiv 2405.04434 section 2.1.3; an indexer its own key), within a window or
chunk only the last ones, and one for several positions where keys are compressed. A recurrence
keeps its state, and a convolution its last inputs, whatever the length. Multi-token-prediction
modules are left out. DeepSeek-V3 keeps 61 * 576 numbers, 70,272 bytes in bfloat16, as arXiv
2505.09343 table 1 has it.
"""

from dataclasses import dataclass
from typing import Any

from moe_lab.accounting.parameter_count import ParameterCount, count
from moe_lab.cost.parts import Attend, Index, Kernel, Part
from moe_lab.errors import require


@dataclass(frozen=True)
class CacheSize:
    """Numbers (not bytes) that one sequence keeps.

    Attributes:
        context: tokens that the sequence has.
        per_token: what a further token adds while no window is full: for all layers that keep keys.
        growth: what a further token adds once all windows are full.
        at_context: what the sequence keeps at ``context`` tokens, ``state`` included.
        state: of recurrences and convolutions, whatever the length.
    """

    context: int
    per_token: float
    growth: float
    at_context: int
    state: int

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


def cache_size(config: Any, context: int = 4096) -> CacheSize:
    """What a sequence of ``context`` tokens keeps, from a configuration or its ``ParameterCount``.

    >>> cache_size("deepseek-ai/DeepSeek-V3").per_token
    35136.0

    Raises:
        ConfigError: as ``count``; a context below 1.
    """
    counted = config if isinstance(config, ParameterCount) else count(config)
    require(context >= 1, "a context of at least 1 token", repr(context), field="context")
    per_token, growth, kept, state = 0.0, 0.0, 0, 0
    for times, pieces in counted.kinds:
        for piece in pieces:
            if piece.part is Part.MTP:
                continue
            passes = times * piece.passes
            state += passes * piece.state
            if isinstance(piece.kernel, Attend | Index):
                each = passes * piece.kernel.cached
                per_token += each / piece.kernel.stride
                growth += 0.0 if _limit(piece.kernel) else each / piece.kernel.stride
                kept += each * _keys(piece.kernel, context)
    return CacheSize(context, per_token, growth, kept + state, state)


def _limit(kernel: Kernel) -> int | None:
    """Keys that a window or chunk keeps at most."""
    return (kernel.window or kernel.chunk) if isinstance(kernel, Attend) else None


def _keys(kernel: Attend | Index, context: int) -> int:
    visible = context // kernel.stride
    limit = _limit(kernel)
    return visible if limit is None else min(visible, limit)
