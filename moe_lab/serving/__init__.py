"""From a trace to a decision: which experts to keep in memory, on which device to place them, and
what decoding reads.

Every function takes an opened ``Trace``, returns a frame with documented columns, and prints
nothing; ``docs/serving.md`` says what each number may and may not claim.
"""

from moe_lab.serving.coverage import calibration_tokens, coverage, write_expert_lists
from moe_lab.serving.distinct_experts import distinct_experts
from moe_lab.serving.expert_cache import expert_cache
from moe_lab.serving.expert_sets import ExpertSets, expert_sets
from moe_lab.serving.placement import (
    Placement,
    place,
    placement_bound,
    placement_load,
)
from moe_lab.serving.placement_export import (
    read_sglang_locations,
    read_vllm_expert_map,
    write_sglang_locations,
    write_vllm_expert_map,
)
from moe_lab.serving.placement_transfer import (
    nodes_touched,
    placement_sentence,
    placement_transfer,
    tokens_needed,
)
from moe_lab.serving.policies import METHODS, POLICIES
from moe_lab.serving.prefetch import prefetch
from moe_lab.serving.roofline import Roofline, fit_roofline
from moe_lab.serving.speculation import speculation
from moe_lab.serving.workload import Workload, fit_workload, workload_agreement

__all__ = [
    "METHODS",
    "POLICIES",
    "ExpertSets",
    "Placement",
    "Roofline",
    "Workload",
    "calibration_tokens",
    "coverage",
    "distinct_experts",
    "expert_cache",
    "expert_sets",
    "fit_roofline",
    "fit_workload",
    "nodes_touched",
    "place",
    "placement_bound",
    "placement_load",
    "placement_sentence",
    "placement_transfer",
    "prefetch",
    "read_sglang_locations",
    "read_vllm_expert_map",
    "speculation",
    "tokens_needed",
    "workload_agreement",
    "write_expert_lists",
    "write_sglang_locations",
    "write_vllm_expert_map",
]
