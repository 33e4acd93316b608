"""``Decoder``: a small causal language model whose feed-forwards are MoE layers. One pass returns logits, loss and every ``Routing``."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.errors import ConfigError, expected
from moe_lab.model.attention import Attention, rotary_tables
from moe_lab.model.config import DecoderConfig
from moe_lab.model.experts import SwiGLU
from moe_lab.model.layer import MoELayer
from moe_lab.routing import RouterContext, Routing

IGNORE = -100
"""Target id of positions that have no target."""


@dataclass(frozen=True)
class DecoderOutput:
    """
    Attributes:
        logits: [B, S, V].
        loss: mean nats per target, or None without targets.
        routings: one ``Routing`` per MoE layer over the B*S flattened tokens, in layer order.
        losses: what the model's own parts add to the training loss, by name, their coefficients included.
    """

    logits: Tensor
    loss: Tensor | None = None
    routings: list[Routing] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        sparse = layer in config.moe_layers and config.moe is not None
        self.ffn = MoELayer(config.moe) if sparse and config.moe else SwiGLU(config.d_model, config.dense_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: RouterContext) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        if isinstance(self.ffn, MoELayer):
            y, routing = self.ffn(self.ffn_norm(x), context, return_routing=True)
            return x + y, routing
        return x + self.ffn(self.ffn_norm(x)), None


class Decoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config.context_length, config.dim_per_head, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        std = self.config.initial_std
        to_residual = std / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                writes_to_residual = name.endswith((".down", "attention.out.weight"))
                nn.init.normal_(parameter, std=to_residual if writes_to_residual else std)

    def moe_layers(self) -> dict[int, MoELayer]:
        """Layer index -> MoE layer."""
        return {index: self.blocks[index].ffn for index in self.config.moe_layers}  # type: ignore[misc]

    def forward(self, ids_BS: Tensor, targets_BS: Tensor | None = None, valid_BS: Tensor | None = None) -> DecoderOutput:
        """Args are int64 [B, S] (``targets`` -100 where there is none) and bool [B, S] (False for padding, which is never counted)."""
        length = ids_BS.shape[1]
        if length > self.config.context_length:
            raise ConfigError(expected(f"at most {self.config.context_length} tokens (context_length)", length))
        context = RouterContext(
            token_ids=ids_BS.reshape(-1), sequence_length=length, valid=None if valid_BS is None else valid_BS.reshape(-1)
        )
        x = self.embedding(ids_BS)
        routings: list[Routing] = []
        for block in self.blocks:
            x, routing = block(x, self.cos, self.sin, context)
            if routing is not None:
                routings.append(routing)
                context = replace(context, previous=routing)
        logits = F.linear(self.norm(x), self.embedding.weight if self.head is None else self.head.weight)
        loss = None
        if targets_BS is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets_BS.reshape(-1), ignore_index=IGNORE)
        return DecoderOutput(logits, loss, routings)
