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

__all__ = [
    "Edit",
    "EditKind",
    "Exchange",
    "Forbid",
    "Replay",
    "Silence",
    "TopK",
    "expert_losses",
    "expert_minutes",
    "expert_worth",
    "intervene",
]
