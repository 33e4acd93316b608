"""Does compute follow difficulty? Identity-controlled association, its nulls and intervals, and what a marginal expert gains."""

from moe_lab.analysis.difficulty.association import difficulty_association

__all__ = ["difficulty_association"]
