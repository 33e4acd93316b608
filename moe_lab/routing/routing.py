"""``Routing``: what every router returns and everything else reads.

Shape letters: T tokens, K slots, E experts (real ones first, then zero-compute ones), D d_model.
"""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from moe_lab.config import require
from moe_lab.errors import TraceError
from moe_lab.html_table import html_table
from moe_lab.measures import router_entropy, score_margin

UNUSED = -1


def valid_rows(values: Tensor, valid: Tensor | None, fill: float = 0.0) -> Tensor:
    """``values`` [T, ...] with ``fill`` in the rows that are not ``valid`` [T].

    A product with a mask would keep NaN (0 * NaN), in the value and in the gradient; so whatever
    works on rows takes them through here first, not last.
    """
    if valid is None:
        return values
    return torch.where(valid.view(-1, *(1,) * (values.dim() - 1)), values, fill)


@dataclass(frozen=True)
class Routing:
    """One layer's decisions for T tokens.

    Attributes:
        indices: [T, K] int64, the expert that runs in each slot; -1 where the slot runs nothing.
            Ids ``0..num_experts-1`` are real experts, ``num_experts..`` zero-compute ones. A token
            never names one expert twice.
        weights: [T, K], the gate weight of each slot; 0 where ``indices`` is -1. Carries the
            gradient of the router.
        logits: [T, E], the router's raw outputs, E = num_experts + num_zero_experts.
        scores: [T, E], the scores from which weights are taken (softmax, sigmoid, ... of the
            logits), before any selection bias.
        num_experts: number of real experts, from the configuration (never max id + 1).
        num_zero_experts: number of zero-compute experts.
        selected: [T, K] int64, what was selected before capacity dropping, or None where nothing
            can be dropped.
        valid: [T] bool, False for padding (routed, never counted), or None where every token is
            real.
        weights_on_input: True where the weight multiplies the expert's input, not its output
            (Llama-4).
        losses: the router's own training losses by name, scalars without coefficient (entropy of
            top-p, L1 of ReMoE with its lambda).
        shared_weights: [T, S], gates of shared experts, where the router makes them (Inkling).
        state: [T, R], what the next layer's router continues from (ZAYA).
    """

    indices: Tensor
    weights: Tensor
    logits: Tensor
    scores: Tensor
    num_experts: int
    num_zero_experts: int = 0
    selected: Tensor | None = None
    valid: Tensor | None = None
    weights_on_input: bool = False
    losses: dict[str, Tensor] = field(default_factory=dict)
    shared_weights: Tensor | None = None
    state: Tensor | None = None

    @classmethod
    def from_scores(
        cls, scores_TE: Tensor, indices_TK: Tensor, weights_TK: Tensor | None = None
    ) -> "Routing":
        """The decisions of any other router, for the losses and monitors here.

        Args:
            scores_TE: [T, E], the scores from which weights are taken (such as the softmax of the
                logits); gradients flow through them.
            indices_TK: [T, K] int64, the expert of each slot; -1 where a slot runs nothing.
            weights_TK: [T, K]; None takes the scores of the chosen experts.

        Example::

            load_balancing_loss(Routing.from_scores(logits.softmax(-1), indices))

        Raises ``ConfigError`` where shapes do not fit or an index is not an expert.
        """
        experts = scores_TE.shape[-1]
        fits = scores_TE.dim() == indices_TK.dim() == 2 and len(scores_TE) == len(indices_TK)
        got = f"{list(scores_TE.shape)} and {list(indices_TK.shape)}"
        require(fits, "scores of shape [T, E] and indices of shape [T, K]", got)
        indices_TK = indices_TK.long()
        known = bool(((indices_TK >= UNUSED) & (indices_TK < experts)).all())
        require(known, f"expert indices from {UNUSED} to {experts - 1}", "others")
        if weights_TK is None:
            weights_TK = scores_TE.gather(1, indices_TK.clamp_min(0)) * (indices_TK >= 0)
        return cls(indices_TK, weights_TK, scores_TE.log(), scores_TE, experts)

    def __repr__(self) -> str:
        zero = f" + {self.num_zero_experts} zero-compute" if self.num_zero_experts else ""
        given = [
            name
            for name in ("selected", "valid", "shared_weights", "state")
            if getattr(self, name) is not None
        ]
        return (
            f"Routing({self.num_tokens} tokens x {self.top_k} slots over {self.num_experts}{zero}"
            f" experts, {self.weights.dtype}, {self.weights.device}"
            + "".join(f", {name}" for name in [*given, *self.losses])
            + ")"
        )

    def _repr_html_(self) -> str:
        """The slots of each expert, the busiest first."""
        counts = self.counts().tolist()
        order = sorted(range(len(counts)), key=lambda expert: -counts[expert])
        used = max(sum(counts), 1)
        rows = [
            (
                f"{expert}" + " (zero-compute)" * (expert >= self.num_experts),
                counts[expert],
                counts[expert] / used,
            )
            for expert in order
        ]
        dead = sum(count == 0 for count in counts)
        return html_table(
            ("expert", "slots", "of all slots"), rows, repr(self), f"experts that never ran: {dead}"
        )

    @property
    def num_tokens(self) -> int:
        return self.indices.shape[0]

    @property
    def top_k(self) -> int:
        """Number of slots K, used or not."""
        return self.indices.shape[1]

    def counts(self) -> Tensor:
        """[E] int64: how many slots of valid tokens each expert runs.

        Sums to the number of used slots.
        """
        return self._count(self.indices)

    def selected_counts(self) -> Tensor:
        """[E] int64: how many slots of valid tokens selected each expert, dropped ones included:
        the demand that balancing steers.
        """
        return self._count(self.indices if self.selected is None else self.selected)

    def num_valid(self) -> Tensor:
        """[] int64: tokens that are not padding."""
        return (
            torch.full((), self.num_tokens, device=self.indices.device)
            if self.valid is None
            else self.valid.sum()
        )

    def grouped_counts(self, groups: int) -> Tensor:
        """[groups, E] int64: the selected counts of each of ``groups`` equal runs of tokens
        (sequences).
        """
        total = self.num_experts + self.num_zero_experts
        group_T = torch.arange(self.num_tokens, device=self.indices.device) // max(
            self.num_tokens // groups, 1
        )
        selected_TK = self.indices if self.selected is None else self.selected
        return self._bins(selected_TK, group_T.unsqueeze(1) * total, groups * total).view(
            groups, total
        )

    def _count(self, indices_TK: Tensor) -> Tensor:
        return self._bins(indices_TK, 0, self.num_experts + self.num_zero_experts)

    def _bins(self, indices_TK: Tensor, offset: Tensor | int, total: int) -> Tensor:
        counted = (
            indices_TK >= 0 if self.valid is None else (indices_TK >= 0) & self.valid.unsqueeze(1)
        )
        # What is not counted falls into an extra bin that is cut off; and ``bincount`` waits for a
        # CUDA device, ``scatter_add_`` does not.
        bins = torch.where(counted, indices_TK + offset, total).reshape(-1)
        if bins.device.type == "cpu":
            return torch.bincount(bins, minlength=total + 1)[:total]
        return bins.new_zeros(total + 1).scatter_add_(0, bins, torch.ones_like(bins))[:total]

    def ffn_count(self) -> Tensor:
        """[T] int64: real experts executed for each token; never includes a zero-compute expert."""
        return ((self.indices >= 0) & (self.indices < self.num_experts)).sum(dim=1)

    def zero_count(self) -> Tensor:
        """[T] int64: zero-compute experts chosen by each token."""
        return (self.indices >= self.num_experts).sum(dim=1)

    def dropped(self) -> Tensor:
        """[T, K] bool: slots that selected an expert and lost it to its capacity (distinguished
        from slots never used).
        """
        if self.selected is None:
            return torch.zeros_like(self.indices, dtype=torch.bool)
        return (self.selected >= 0) & (self.indices < 0)

    def entropy(self) -> Tensor:
        """[T]: entropy in nats of the scores, normalised to sum to one over the experts."""
        return router_entropy(self.scores)

    def valid_mask(self) -> Tensor:
        """[T] bool: ``valid``, all True where there is no padding."""
        if self.valid is not None:
            return self.valid
        return torch.ones_like(self.indices[:, 0], dtype=torch.bool)

    def margin(self) -> Tensor:
        """[T]: the K-th largest score less the next one (how close the token was to another set);
        inf where K = E.
        """
        return score_margin(self.scores, self.top_k)

    def detach(self) -> "Routing":
        """The same decisions without the autograd graph (and without ``losses``)."""
        changes = {
            item.name: getattr(self, item.name).detach()
            for item in fields(self)
            if isinstance(getattr(self, item.name), Tensor)
        }
        return replace(self, **changes, losses={})

    def check(self) -> "Routing":
        """Raise ``TraceError`` unless ids are in range, no token names an expert twice and weights
        are finite. Synchronises.
        """
        total = self.num_experts + self.num_zero_experts
        if self.indices.numel() == 0:
            return self
        low, high = int(self.indices.min()), int(self.indices.max())
        require(
            low >= UNUSED and high < total,
            f"expert ids between -1 and {total - 1}",
            f"{low}..{high}",
            error=TraceError,
        )
        ordered = self.indices.sort(dim=1).values
        require(
            not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()),
            "each token to name an expert at most once",
            "a repeated id",
            error=TraceError,
        )
        require(
            bool(torch.isfinite(self.weights).all()),
            "finite gate weights",
            "NaN or infinity",
            "lowering the learning rate",
            error=TraceError,
            field="weights",
        )
        return self
