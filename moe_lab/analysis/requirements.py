"""What a trace must have recorded for an analysis to mean something. Imports keep what their source
does not say as missing; a measure of it would be a number about nothing.
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
    """For measures of tokens, of pairs of experts or of the order of tokens: rows that were made up
    to have given counts hold none.
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
    """For measures of ``ffn_count`` and ``zero_count``: some engines write zero-compute experts as
    expert 0.
    """

    @functools.wraps(analysis)
    def checked(trace: Trace, *args: P.args, **kwargs: P.kwargs) -> R:
        for one in (trace, *_traces(args)):
            require(
                one.meta.zero_experts_known,
                f"a trace that tells zero-compute experts for {_name(analysis)}",
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
