"""What an expert is worth: the routing of a model changed on purpose, and what that costs.

``docs/worth.md`` says what each number may and may not claim.
"""

from moe_lab.worth.interventions import (
    Edit,
    Exchange,
    Forbid,
    Replay,
    Silence,
    TopK,
    intervene,
)
from moe_lab.worth.measures import EditKind, expert_losses, expert_minutes, expert_worth
from moe_lab.worth.scores import SCORES, expert_scores, score_agreement

__all__ = [
    "SCORES",
    "Edit",
    "EditKind",
    "Exchange",
    "Forbid",
    "Replay",
    "Silence",
    "TopK",
    "expert_losses",
    "expert_minutes",
    "expert_scores",
    "expert_worth",
    "intervene",
    "score_agreement",
]
