"""``entropy_and_spread``: what a reading needs of a router's scores, in one pass on a CPU."""

import torch
from torch import Tensor

from moe_lab.cpu_kernels import DTYPES, available, integers, library, pointers
from moe_lab.measures import router_entropy

MIN_COLUMNS = 32
"""Experts from which a row fills a few vectors, whose lanes are then added up one by one."""


@torch.no_grad()
def entropy_and_spread(scores_TE: Tensor, values_TE: Tensor) -> tuple[Tensor, Tensor]:
    """[T] each: ``router_entropy(scores_TE)``, and the largest less the smallest of
    ``values_TE``. NaN stays NaN. Compiled entropies differ from torch's by rounding.
    """
    alike = values_TE.shape == scores_TE.shape and values_TE.dtype == scores_TE.dtype
    on_cpu = scores_TE.device.type == values_TE.device.type == "cpu"
    wide = scores_TE.shape[1] >= MIN_COLUMNS
    if not (alike and on_cpu and wide and scores_TE.dtype in DTYPES and available()):
        # ``aminmax`` of rows takes ten to twenty times as long on a CPU.
        return router_entropy(scores_TE), values_TE.amax(dim=1) - values_TE.amin(dim=1)
    scores_TE, values_TE = scores_TE.contiguous(), values_TE.contiguous()
    entropy_T, spread_T = scores_TE.new_empty(2, len(scores_TE))
    getattr(library(), f"moe_entropy_and_spread_{DTYPES[scores_TE.dtype]}")(
        *integers(torch.get_num_threads(), *scores_TE.shape),
        *pointers(scores_TE, values_TE, entropy_T, spread_T),
    )
    return entropy_T, spread_T
