"""Hash layers (arXiv 2106.04426): the token id decides, by a fixed table [V, k]; every selected
expert weighs 1/k.

``hash_table``: "random" draws k different experts for each id; "balanced" goes through the ids from
the most frequent to the rarest and gives each to the least loaded experts, so that expected loads
are even (call ``balance(frequencies)``; until then all ids count alike).
"""

import torch
from torch import Tensor

from moe_lab.errors import ConfigError, expected
from moe_lab.routing.config import HashTable, RouterConfig
from moe_lab.routing.router import Router, RouterContext, register, working_dtype
from moe_lab.routing.routing import Routing


class TableRouter(Router):
    """A router whose experts come from a table of token ids."""

    table: Tensor

    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        size = config.vocab_size
        assert size is not None
        seed: int = self.setting("hash_seed")
        if self.setting("hash_table") == HashTable.BALANCED:
            table = balanced_table(torch.ones(size), config.num_experts, config.top_k)
        else:
            table = random_table(size, config.num_experts, config.top_k, seed)
        self.register_buffer("table", table)

    def balance(self, frequencies: Tensor) -> None:
        """Rebuild the table so that loads are even under token ``frequencies`` [V]."""
        if frequencies.shape != self.table.shape[:1]:
            raise ConfigError(
                expected(f"frequencies of shape [{self.table.shape[0]}]", list(frequencies.shape)),
                field="frequencies",
            )
        self.table.copy_(balanced_table(frequencies, self.config.num_experts, self.config.top_k))

    def look_up(self, context: RouterContext, tokens: int) -> Tensor:
        """[T, K] ids. Raises ``ConfigError`` where the context has no token ids."""
        return self.table[context.ids_of(tokens, self.kind)]


@register("hash")
class Hash(TableRouter):
    learned = False

    def decide(self, x_TD: Tensor, context: RouterContext) -> Routing:
        return equal_weights(self, x_TD, self.look_up(context, x_TD.shape[0]), context)


def equal_weights(
    router: Router, x_TD: Tensor, indices_TK: Tensor, context: RouterContext
) -> Routing:
    """Selected experts with equal weights; scores are the selection itself, logits are zero."""
    used_TK, dtype = indices_TK >= 0, working_dtype(x_TD)
    weights_TK = used_TK.to(dtype) / used_TK.sum(dim=1, keepdim=True).clamp_min(1)
    zeros_TE = torch.zeros(
        x_TD.shape[0], router.config.num_choices, dtype=dtype, device=x_TD.device
    )
    scores_TE = zeros_TE.scatter_add(1, indices_TK.clamp_min(0), weights_TK)
    return router.routing(indices_TK, weights_TK, zeros_TE, scores_TE, context)


def random_table(vocab_size: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """[V, k]: k different experts for every token id, uniformly at random."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(vocab_size, num_experts, generator=generator)
        .argsort(dim=1)[:, :top_k]
        .contiguous()
    )


def balanced_table(frequencies: Tensor, num_experts: int, top_k: int) -> Tensor:
    """[V, k]: ids in order of frequency, each given to the k least loaded experts
    (longest-processing-time rule).
    """
    load = torch.zeros(num_experts, dtype=torch.float64)
    table = torch.empty(frequencies.shape[0], top_k, dtype=torch.int64)
    for token in frequencies.argsort(descending=True, stable=True).tolist():
        # A stable sort breaks ties by the lower id.
        chosen = load.argsort(stable=True)[:top_k]
        table[token] = chosen
        load[chosen] += float(frequencies[token])
    return table
