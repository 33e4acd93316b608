"""From a trace to a decision: which experts to keep in memory, on which device to place them, and
what decoding reads.

Every function takes an opened ``Trace``, returns a frame with documented columns, and prints
nothing; ``docs/serving.md`` says what each number may and may not claim.
"""

from moe_lab.serving.expert_cache import expert_cache
from moe_lab.serving.expert_sets import ExpertSets, expert_sets

__all__ = ["ExpertSets", "expert_cache", "expert_sets"]
