"""What an expert is worth: the routing of a model changed on purpose, and what that costs.

``docs/worth.md`` says what each number may and may not claim.
"""

from typing import TYPE_CHECKING

from moe_lab.lazy import on_first_use
from moe_lab.worth.agreement import (
    Conventions,
    drift_sentence,
    find_conventions,
    routing_agreement,
)

if TYPE_CHECKING:
    from moe_lab.worth.ablation import Ablation
    from moe_lab.worth.curves import removal_curves, top_k_losses
    from moe_lab.worth.edits import Edit, Exchange, Forbid, Replay, Silence, TopK
    from moe_lab.worth.interventions import intervene
    from moe_lab.worth.measures import EditKind, expert_losses, expert_minutes, expert_worth
    from moe_lab.worth.pairs import exchange_losses, pair_losses
    from moe_lab.worth.replays import replay_divergence
    from moe_lab.worth.scores import SCORES, expert_scores, score_agreement

_EDITS = ("Edit", "Exchange", "Forbid", "Replay", "Silence", "TopK")
__getattr__ = on_first_use(
    __name__,  # torch
    {
        "ablation": ("Ablation",),
        "curves": ("removal_curves", "top_k_losses"),
        "edits": _EDITS,
        "interventions": ("intervene",),
        "measures": ("EditKind", "expert_losses", "expert_minutes", "expert_worth"),
        "pairs": ("exchange_losses", "pair_losses"),
        "replays": ("replay_divergence",),
        "scores": ("SCORES", "expert_scores", "score_agreement"),
    },
)

__all__ = [
    "SCORES",
    "Ablation",
    "Conventions",
    "Edit",
    "EditKind",
    "Exchange",
    "Forbid",
    "Replay",
    "Silence",
    "TopK",
    "drift_sentence",
    "exchange_losses",
    "expert_losses",
    "expert_minutes",
    "expert_scores",
    "expert_worth",
    "find_conventions",
    "intervene",
    "pair_losses",
    "removal_curves",
    "replay_divergence",
    "routing_agreement",
    "score_agreement",
    "top_k_losses",
]
