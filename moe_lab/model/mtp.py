"""Multi-token prediction: small modules that predict tokens after the next one from the decoder's
last hidden state.

Module k (from 1): ``h^k_i = Layer_k(M_k [rms(h^{k-1}_i) ; rms(E(t_{i+k}))])`` predicts
``t_{i+k+1}`` through the decoder's own embedding and head (DeepSeek-V3, arXiv 2412.19437, eq. 21 to
23). The layer is one attention and one dense feed-forward (LongCat-Flash).
"""

import torch
from torch import Tensor, nn

from moe_lab.model.attention import build_attention
from moe_lab.model.config import DecoderConfig, MTPConfig
from moe_lab.model.experts import SwiGLU
from moe_lab.model.rotary import Rotary


class MTPModule(nn.Module):
    def __init__(self, config: DecoderConfig, mtp: MTPConfig) -> None:
        super().__init__()
        d, eps = config.d_model, config.norm_eps
        self.hidden_norm, self.embedding_norm = nn.RMSNorm(d, eps=eps), nn.RMSNorm(d, eps=eps)
        self.join = nn.Linear(2 * d, d, bias=False)
        self.attention_norm = nn.RMSNorm(d, eps=eps)
        self.attention = build_attention(config, None)
        self.ffn_norm = nn.RMSNorm(d, eps=eps)
        self.ffn = SwiGLU(d, config.dense_width if mtp.d_hidden is None else mtp.d_hidden)
        self.norm = nn.RMSNorm(d, eps=eps)

    def forward(self, hidden: Tensor, embedded: Tensor, rotary: Rotary) -> Tensor:
        """[B, S, D] hidden states and the embeddings of the tokens k places after -> [B, S, D],
        before the module's last norm.
        """
        x = self.join(torch.cat((self.hidden_norm(hidden), self.embedding_norm(embedded)), dim=2))
        mixed, _ = self.attention(self.attention_norm(x), rotary)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x))
