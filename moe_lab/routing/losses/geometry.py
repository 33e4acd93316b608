"""Losses on the router's rows: similar experts are hard to tell apart."""

import torch
import torch.nn.functional as F
from torch import Tensor


def simbal_loss(weight_ED: Tensor) -> Tensor:
    """SimBal (arXiv 2506.14038): entrywise L1 norm of ``W W^T - I``, W the router's rows.

    Needs no token and no count.
    """
    return (weight_ED @ weight_ED.t() - _eye(weight_ED)).abs().sum()


def orthogonality_loss(weight_ED: Tensor) -> Tensor:
    """Mean squared cosine between different rows: 0 where all are orthogonal, 1 where they are
    parallel, whatever their lengths.
    """
    rows = F.normalize(weight_ED, dim=1)
    experts = rows.shape[0]
    off_diagonal = (rows @ rows.t()).square() * (1 - _eye(rows))
    return off_diagonal.sum() / max(experts * (experts - 1), 1)


def dynmoe_loss(weight_ED: Tensor, active_E: Tensor | None = None) -> Tensor:
    """DynMoE's auxiliary loss (arXiv 2405.14297, eq. 8): Frobenius norm of ``W W^T - I`` plus the
    mean row length, of the active experts.

    Args:
        active_E: [E] bool, the experts that some token selected; all if None.
    """
    active = (
        torch.ones(weight_ED.shape[0], dtype=torch.bool, device=weight_ED.device)
        if active_E is None
        else active_E
    )
    mask = active.to(weight_ED.dtype)
    gram = (weight_ED @ weight_ED.t() - _eye(weight_ED)) * mask.unsqueeze(0) * mask.unsqueeze(1)
    lengths = torch.linalg.vector_norm(weight_ED, dim=1) * mask
    return torch.linalg.matrix_norm(gram) + lengths.sum() / mask.sum().clamp_min(1)


def _eye(weight_ED: Tensor) -> Tensor:
    return torch.eye(weight_ED.shape[0], dtype=weight_ED.dtype, device=weight_ED.device)
