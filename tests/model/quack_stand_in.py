"""quack-kernels' contract in plain tensor calls: what ``quack.gemm_interface`` 0.6.5 says of
shapes, layouts and dtypes, asserted. Rows past the last expert's end come back as NaN: the kernels
leave them as they were in memory.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.model.dispatch.quack import Kernels


def in_turns(halves: Tensor) -> Tensor:
    """[..., first half, second half] -> [..., first 0, second 0, first 1, ...]."""
    return torch.stack(halves.chunk(2, dim=-1), dim=-1).flatten(-2)


def halves(in_turns: Tensor) -> Tensor:
    return torch.cat([in_turns[..., ::2], in_turns[..., 1::2]], dim=-1)


def concat(value: Tensor) -> Tensor:
    """``concat_layout`` of an operand: the dimension that is not contiguous holds two halves."""
    return in_turns(value.mT).mT if value.stride(-1) == 1 else in_turns(value)


def rows_of_experts(bounds: Tensor, index: Tensor | None, rows: int) -> list[Tensor]:
    """Of each expert: which rows of A it has."""
    for value in (bounds, index):
        assert value is None or value.dtype == torch.int32
    index = torch.arange(rows) if index is None else index
    assert len(index) >= bounds[-1]
    return [index[a:b].long() for a, b in pairwise(bounds.tolist())]


def gemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    *,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
    tuned: bool = True,
    concat_layout: tuple[str, ...] | None = None,
) -> Tensor:
    assert A.dtype == B.dtype
    assert not A.requires_grad
    assert not B.requires_grad
    assert not tuned
    if cu_seqlens_m is not None:
        assert A.stride(-1) == 1, "varlen_m requires A to be k-major"
        B = concat(B) if concat_layout == ("B",) else B
        parts = rows_of_experts(cu_seqlens_m, A_idx, len(A))
        assert len(parts) == len(B)
        total = len(A) if A_idx is None else len(A_idx)
        rows = torch.cat([A[part] @ weight for part, weight in zip(parts, B, strict=True)])
        found = F.pad(rows, (0, 0, 0, total - len(rows)), value=torch.nan)
    else:
        assert cu_seqlens_k is not None
        assert A.stride(-2) == 1 or not A.numel(), "varlen_k requires A to be m-major"
        assert B.stride(-1) == 1, "varlen_k requires B to be n-major"
        bounds = cu_seqlens_k.tolist()
        parts = rows_of_experts(cu_seqlens_k, A_idx, A.shape[1])
        found = torch.stack(
            [A[:, part] @ B[a:b] for part, (a, b) in zip(parts, pairwise(bounds), strict=True)]
        )
        if concat_layout == ("out",):
            assert out is not None
            assert out.stride(-1) != 1, "the last dimension is the one with two halves"
            found = halves(found)
    if out is None:
        return found
    assert out.shape == found.shape
    return out.copy_(found)


def gemm_gated(
    A: Tensor,
    B: Tensor,
    *,
    activation: str,
    cu_seqlens_m: Tensor,
    A_idx: Tensor,
    store_preact: bool = True,
    tuned: bool = True,
    concat_layout: tuple[str, ...] | None = None,
) -> tuple[Tensor | None, Tensor]:
    assert activation == "swiglu"
    act = gemm(
        A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx, tuned=tuned, concat_layout=concat_layout
    )
    return act if store_preact else None, F.silu(act[:, ::2]) * act[:, 1::2]


def gemm_dgated(
    A: Tensor,
    B: Tensor,
    PreAct: Tensor,
    activation: str,
    *,
    colvec_scale: Tensor,
    colvec_reduce: bool,
    cu_seqlens_m: Tensor,
    A_idx: Tensor,
    dynamic_scheduler: bool = True,
    tuned: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient is scaled, and so are the hidden units; the sum over a row is of the two
    unscaled ones.
    """
    assert activation == "swiglu"
    assert colvec_reduce
    assert not dynamic_scheduler
    assert colvec_scale.dtype == torch.float32
    assert colvec_scale.shape == A_idx.shape
    grad = gemm(A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx, tuned=tuned)
    scale = colvec_scale.to(A.dtype).unsqueeze(1)
    gate, up = PreAct[:, ::2], PreAct[:, 1::2]
    hidden, sigmoid = F.silu(gate) * up, gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    d_act = torch.stack([grad * up * slope, grad * F.silu(gate)], dim=-1).flatten(-2)
    sums = (grad * hidden).sum(dim=1).float()
    return d_act * scale, hidden * scale, sums


STAND_IN = Kernels(gemm, gemm_gated, gemm_dgated)
