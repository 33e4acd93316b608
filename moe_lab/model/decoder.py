"""``Decoder``: a small causal language model whose feed-forwards are MoE layers.

One pass returns logits, loss and every ``Routing``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.document_pass import IGNORE
from moe_lab.errors import require
from moe_lab.model.blocks import build_block
from moe_lab.model.config import Amplification, DecoderConfig
from moe_lab.model.layer import MoELayer
from moe_lab.model.mtp import MTPModule
from moe_lab.model.ngram import GatedMemory, NgramTables
from moe_lab.model.rotary import Rotary, rotary_tables
from moe_lab.model.sparse_attention import Selection
from moe_lab.routing import RouterContext, Routing
from moe_lab.routing.losses import hidden_z_loss

"""Target id of positions that have no target."""


@dataclass(frozen=True)
class DecoderOutput:
    """
    Attributes:
        logits: [B, S, V].
        loss: mean nats per target, or None without targets.
        routings: one ``Routing`` per MoE layer over the B*S flattened tokens, in layer order.
        losses: what the model's own parts add to the training loss, by name, their coefficients
            included; empty without targets.
        hidden: [B, S, D] hidden states after the last layer, before the last norm.
    """

    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None
    routings: list[Routing] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)


class Decoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        d, ngram, mtp = config.d_model, config.ngram, config.mtp
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.embedding_norm = (
            nn.LayerNorm(d) if config.amplification is Amplification.NORM else None
        )
        self.ngram = (
            NgramTables(ngram, config.vocab_size, d) if ngram and not ngram.layers else None
        )
        places = ngram.layers if ngram else ()
        self.memories = nn.ModuleDict(
            {
                str(layer): GatedMemory(ngram, config.vocab_size, d, config.norm_eps)
                for layer in places
                if ngram is not None
            }
        )
        self.blocks = nn.ModuleList(
            build_block(config, layer) for layer in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(d, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            [MTPModule(config, mtp) for _ in range(mtp.num_modules)] if mtp else []
        )
        cos, sin = rotary_tables(config.context_length, config.rotary_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        std = self.config.initial_std
        to_residual = std / (2 * self.config.num_attentions) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(
                    parameter, std=to_residual if name.endswith(WRITES_TO_STREAM) else std
                )

    def moe_layers(self) -> dict[int, MoELayer]:
        """Layer index -> MoE layer."""
        return {index: self.blocks[index].moe for index in self.config.moe_layers}  # type: ignore[misc]

    def forward(
        self, ids_BS: Tensor, targets_BS: Tensor | None = None, valid_BS: Tensor | None = None
    ) -> DecoderOutput:
        """Args are int64 [B, S] (``targets`` -100 for tokens without a target) and bool [B, S]
        (False for padding, which is never counted).
        """
        length = ids_BS.shape[1]
        require(
            length <= self.config.context_length,
            f"at most {self.config.context_length} tokens (context_length)",
            length,
            field="context_length",
        )
        context = RouterContext(
            token_ids=ids_BS.reshape(-1),
            sequence_length=length,
            valid=None if valid_BS is None else valid_BS.reshape(-1),
        )
        rotary = Rotary(self.cos, self.sin).head(length)
        x = self.embed(ids_BS)
        routings: list[Routing] = []
        selection: Selection | None = None
        for layer, block in enumerate(self.blocks):
            if str(layer) in self.memories:
                x = self.memories[str(layer)](x, ids_BS)
            x, routing, selection = block(x, rotary, context, selection)
            if routing is not None:
                routings.append(routing)
                context = replace(context, previous=routing)
        logits = self.logits(self.norm(x))
        output = DecoderOutput(logits, x, routings=routings)
        if targets_BS is None:
            return output
        losses = self._losses(output, selection, ids_BS, targets_BS, valid_BS)
        return replace(output, loss=_cross_entropy(logits, targets_BS), losses=losses)

    def embed(self, ids_BS: Tensor) -> Tensor:
        """[B, S, D]: token embedding, averaged with the n-gram tables where the model has
        them, amplified.
        """
        x = self.embedding(ids_BS)
        if self.ngram is not None:
            x = (x + self.ngram(ids_BS)) / (self.ngram.config.num_tables + 1)
        if self.embedding_norm is not None:
            return self.embedding_norm(x)
        return (
            x * self.config.d_model**0.5 if self.config.amplification is Amplification.SQRT else x
        )

    def logits(self, normed: Tensor) -> Tensor:
        """[B, S, D] normed hidden states -> [B, S, V]."""
        return F.linear(normed, self.embedding.weight if self.head is None else self.head.weight)

    def drafts(self, hidden: Tensor, ids_BS: Tensor) -> Iterator[Tensor]:
        """For each MTP module k = 1, 2, ... below S: logits [B, S - k, V] whose entry i predicts
        the token at i + k + 1.

        Args:
            hidden: ``DecoderOutput.hidden`` of the same ids. ids_BS: token i + k is what module k
                reads at i.
        """
        for number, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            length = ids_BS.shape[1] - number
            if length < 1:
                return
            hidden = module(
                hidden[:, :length],
                self.embedding(ids_BS[:, number:]),
                Rotary(self.cos, self.sin).head(length),
            )
            yield self.logits(module.norm(hidden))

    def _losses(
        self,
        output: DecoderOutput,
        selection: Selection | None,
        ids_BS: Tensor,
        targets_BS: Tensor,
        valid_BS: Tensor | None,
    ) -> dict[str, Tensor]:
        """The losses of the decoder's own parts, their coefficients included."""
        config, losses = self.config, {}
        if config.mtp is not None:
            drafts = self.drafts(output.hidden, ids_BS)
            each = [
                _cross_entropy_or_zero(logits, targets_BS[:, number:])
                for number, logits in enumerate(drafts, start=1)
            ]
            if each:
                losses["mtp"] = config.mtp.loss_coef * torch.stack(each).mean()
        if config.sparse_attention is not None and selection is not None and selection.losses:
            each_BS = torch.stack(selection.losses).mean(dim=0)
            mean = (
                each_BS.mean()
                if valid_BS is None
                else torch.where(valid_BS, each_BS, 0.0).sum() / valid_BS.sum().clamp_min(1)
            )
            losses["indexer"] = config.sparse_attention.loss_coef * mean
        if config.hidden_z_loss_coef:
            valid = None if valid_BS is None else valid_BS.reshape(-1)
            losses["hidden_z"] = config.hidden_z_loss_coef * hidden_z_loss(
                output.hidden.flatten(0, 1).float(), valid
            )
        return losses


WRITES_TO_STREAM = (
    ".down",
    "attention.out.weight",
    "attentions.0.out.weight",
    "attentions.1.out.weight",
    "latent_up.weight",
)
"""Ends of the names of the matrices that write to the residual stream."""


def _cross_entropy(logits: Tensor, targets_BS: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets_BS.reshape(-1), ignore_index=IGNORE
    )


def _cross_entropy_or_zero(logits: Tensor, targets_BS: Tensor) -> Tensor:
    """The same; 0 without targets: the last tokens may all be padding."""
    total = F.cross_entropy(
        logits.float().flatten(0, 1), targets_BS.reshape(-1), ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets_BS != IGNORE).sum().clamp_min(1)
