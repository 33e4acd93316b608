"""The layers of a decoder: ``Block`` (attention, one feed-forward) and ``DoubleBlock``
(LongCat-Flash's two halves around one MoE).

``DoubleBlock``, N for RMSNorm (arXiv 2509.01322, section 2.2; transformers ``longcat_flash``)::

    h1 = x + Attn0(N0(x));  u = N1(h1);  s = MoE(u)
    h2 = h1 + FFN0(u);  h3 = h2 + Attn1(N2(h2));  y = h3 + FFN1(N3(h3)) + s

so the MoE runs beside the second half. Its sequential twin has the same parts and adds ``s`` to
``h2`` already.
"""

from torch import Tensor, nn

from moe_lab.model.attention import build_attention
from moe_lab.model.config import DecoderConfig, Wiring
from moe_lab.model.experts import SwiGLU
from moe_lab.model.layer import MoELayer
from moe_lab.model.rotary import Rotary
from moe_lab.model.sparse_attention import Selection
from moe_lab.routing import RouterContext, Routing

Passed = tuple[Tensor, Routing | None, Selection | None]
"""Stream [B, S, D], the layer's routing if it has a MoE, and the positions that the next attention
block may share.
"""


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = build_attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        moe = config.moe_of(layer)
        self.ffn = SwiGLU(config.d_model, config.dense_width) if moe is None else MoELayer(moe)

    @property
    def moe(self) -> MoELayer | None:
        return self.ffn if isinstance(self.ffn, MoELayer) else None

    @property
    def moe_norm(self) -> nn.RMSNorm:
        """Norm applied before the MoE layer."""
        return self.ffn_norm

    def forward(
        self, x: Tensor, rotary: Rotary, context: RouterContext, selection: Selection | None
    ) -> Passed:
        mixed, selection = self.attention(self.attention_norm(x), rotary, selection)
        x = x + mixed
        if isinstance(self.ffn, MoELayer):
            y, routing = self.ffn(self.ffn_norm(x), context, return_routing=True)
            return x + y, routing, selection
        return x + self.ffn(self.ffn_norm(x)), None, selection


class DoubleBlock(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norms = nn.ModuleList(
            nn.RMSNorm(config.d_model, eps=config.norm_eps) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            build_attention(config, 2 * layer + half) for half in range(2)
        )
        self.ffn_norms = nn.ModuleList(
            nn.RMSNorm(config.d_model, eps=config.norm_eps) for _ in range(2)
        )
        self.ffns = nn.ModuleList(SwiGLU(config.d_model, config.dense_width) for _ in range(2))
        moe = config.moe_of(layer)
        self.moe = None if moe is None else MoELayer(moe)
        self.shortcut = config.wiring is Wiring.SHORTCUT

    @property
    def moe_norm(self) -> nn.Module:
        """Norm applied before the MoE layer."""
        return self.ffn_norms[0]

    def forward(
        self, x: Tensor, rotary: Rotary, context: RouterContext, selection: Selection | None
    ) -> Passed:
        mixed, selection = self.attentions[0](self.attention_norms[0](x), rotary, selection)
        x = x + mixed
        u = self.ffn_norms[0](x)
        sparse, routing = (
            (None, None) if self.moe is None else self.moe(u, context, return_routing=True)
        )
        x = x + self.ffns[0](u)
        if sparse is not None and not self.shortcut:
            x = x + sparse
        mixed, selection = self.attentions[1](self.attention_norms[1](x), rotary, selection)
        x = x + mixed
        x = x + self.ffns[1](self.ffn_norms[1](x))
        return (x + sparse if sparse is not None and self.shortcut else x), routing, selection


def build_block(config: DecoderConfig, layer: int) -> Block | DoubleBlock:
    return Block(config, layer) if config.wiring is Wiring.PLAIN else DoubleBlock(config, layer)
