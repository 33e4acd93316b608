"""Health of a router: balance pressure and similarity of its rows.

``gradient_ratio`` is LongCat's R_g, the gradient of the balance loss over that of the language
loss on mean expert probabilities (alarm above 0.1); ``row_cosine`` the mean pairwise cosine of the
router's rows (alarm where it rises). Both: arXiv 2509.01322, section 3. Load CV and MaxVio
(arXiv 2408.15664) are those of ``moe_lab.measures``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.errors import require
from moe_lab.measures import load_cv, max_violation
from moe_lab.routing.routing import Routing

__all__ = ["gradient_ratio", "load_cv", "max_violation", "row_cosine"]


def gradient_ratio(balance_loss: Tensor, language_loss: Tensor, routing: Routing) -> Tensor:
    """``R_g = ||d balance / dP|| / ||d language / dP||`` on the mean probability vector P of one
    layer. Keep it below 0.1.

    P moves by delta when every token's scores move by delta, so the gradient on P is the sum over
    tokens of the gradient on the scores. Balance losses read probabilities as scores over their
    sum, so what pulls on all experts alike does not count. Call it before ``backward``; the graphs
    are kept. 0 where neither loss depends on the scores, infinity where only balance does.

    Args:
        balance_loss: with its coefficient.
        routing: of the same forward pass (its ``scores`` carry the graph).

    Raises:
        ConfigError: the routing has no graph (made under ``no_grad``, or detached).
    """
    require(
        routing.scores.requires_grad,
        "a routing with a gradient graph",
        "detached scores",
        "calling it before backward()",
        field="routing",
    )
    balance, language = (_on_mean(loss, routing.scores) for loss in (balance_loss, language_loss))
    return torch.where(balance > 0, balance / language, balance)


def _on_mean(loss: Tensor, scores_TE: Tensor) -> Tensor:
    if not loss.requires_grad:
        return scores_TE.new_zeros(())
    (gradient,) = torch.autograd.grad(loss, scores_TE, retain_graph=True, allow_unused=True)
    return (
        scores_TE.new_zeros(())
        if gradient is None
        else torch.linalg.vector_norm(gradient.sum(dim=0))
    )


@torch.no_grad()
def row_cosine(weight_ED: Tensor) -> Tensor:
    """Mean cosine similarity of different rows: near 0 for a random router, near 1 where experts
    cannot be distinguished.
    """
    rows = F.normalize(weight_ED.float(), dim=1)
    experts = rows.shape[0]
    if experts < 2:
        return rows.new_zeros(())
    return ((rows @ rows.t()).sum() - rows.square().sum()) / (experts * (experts - 1))
