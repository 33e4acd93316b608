"""Requirements of analyses: what a trace must have recorded. An import keeps what its source does
not record as missing, and no measure is taken of it.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from moe_lab.errors import AnalysisError, require
from moe_lab.trace import Trace

P = ParamSpec("P")
R = TypeVar("R")
Analysis = Callable[Concatenate[Trace, P], R]


def of_tokens(analysis: Analysis[P, R]) -> Analysis[P, R]:
    """Refuse measures of tokens, of pairs of experts or of the order of tokens where rows were made
    up to have given counts.
    """

    @functools.wraps(analysis)
    def checked(trace: Trace, *args: P.args, **kwargs: P.kwargs) -> R:
        for one in (trace, *_traces(args)):
            require(
                one.meta.per_token,
                f"a trace of tokens for {_name(analysis)}",
                "one that holds only counts",
                "expert_load",
                error=AnalysisError,
                field="per_token",
            )
        return analysis(trace, *args, **kwargs)

    return checked


def of_zero_experts(analysis: Analysis[P, R]) -> Analysis[P, R]:
    """Refuse measures of ``ffn_count`` and ``zero_count`` where an engine wrote zero-compute
    experts as expert 0.
    """

    @functools.wraps(analysis)
    def checked(trace: Trace, *args: P.args, **kwargs: P.kwargs) -> R:
        for one in (trace, *_traces(args)):
            require(
                one.meta.zero_experts_known,
                f"a trace that records zero-compute experts for {_name(analysis)}",
                f"an import ({one.meta.created_from}) that writes them as real ones",
                "capture()",
                error=AnalysisError,
                field="zero_experts_known",
            )
        return analysis(trace, *args, **kwargs)

    return checked


def _traces(args: tuple[Any, ...]) -> list[Trace]:
    return [value for value in args if isinstance(value, Trace)]


def _name(analysis: Callable[..., Any]) -> str:
    return getattr(analysis, "__name__", "this analysis")
