"""Health of a router: balance pressure, similarity of its rows, violation of balance per batch and
over many.

| function | what | source | |---|---|---| | ``gradient_ratio`` | R_g: gradient of balance loss over
that of language loss, on mean expert probabilities; alarm above 0.1 | LongCat | | ``row_cosine`` |
mean pairwise cosine similarity of the router's rows; alarm where it rises | LongCat | |
``max_violation`` | MaxVio: max load / mean load - 1; of one batch, or of summed counts for the
global one | arXiv 2408.15664 |

LongCat: arXiv 2509.01322, section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.errors import ConfigError, expected
from moe_lab.routing.routing import Routing


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
    if not routing.scores.requires_grad:
        raise ConfigError(
            expected(
                "a routing with a gradient graph", "detached scores", "calling it before backward()"
            )
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
    cannot be told apart.
    """
    rows = F.normalize(weight_ED.float(), dim=1)
    experts = rows.shape[0]
    if experts < 2:
        return rows.new_zeros(())
    return ((rows @ rows.t()).sum() - rows.square().sum()) / (experts * (experts - 1))


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio of one batch's counts, or, on counts summed over batches, the global one.

    0 is perfect; dead experts lower the mean.
    """
    load = counts_E.double()
    return load.max() / load.mean().clamp_min(torch.finfo(torch.float64).tiny) - 1


def load_cv(counts_E: Tensor) -> Tensor:
    """Coefficient of variation of the load: population sd over mean, dead experts included."""
    load = counts_E.double()
    return load.std(correction=0) / load.mean().clamp_min(torch.finfo(torch.float64).tiny)
