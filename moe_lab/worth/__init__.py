"""What an expert is worth: the routing of a model changed on purpose, and what that costs.

``docs/worth.md`` says what each number may and may not claim.
"""

from typing import TYPE_CHECKING

from moe_lab.lazy import on_first_use
from moe_lab.worth.agreement import Conventions, find_conventions, routing_agreement

if TYPE_CHECKING:
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

_EDITS = ("Edit", "Exchange", "Forbid", "Replay", "Silence", "TopK", "intervene")
__getattr__ = on_first_use(
    __name__,  # torch
    {
        "interventions": _EDITS,
        "measures": ("EditKind", "expert_losses", "expert_minutes", "expert_worth"),
        "scores": ("SCORES", "expert_scores", "score_agreement"),
    },
)

__all__ = [
    "SCORES",
    "Conventions",
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
    "find_conventions",
    "intervene",
    "routing_agreement",
    "score_agreement",
]
