"""One small decoder for each option of ``DecoderConfig``, and one with most of them together."""

from moe_lab.model import (
    Amplification,
    DecoderConfig,
    LatentAttentionConfig,
    MoEConfig,
    MTPConfig,
    NgramConfig,
    QKNorm,
    SparseAttentionConfig,
    Wiring,
)
from moe_lab.routing import ControllerConfig, ControllerKind, RouterConfig

PLAIN = DecoderConfig(
    vocab_size=61,
    num_layers=2,
    d_model=24,
    num_heads=4,
    num_kv_heads=2,
    context_length=32,
    d_dense=20,
    moe=MoEConfig(24, 8, RouterConfig(num_experts=6, top_k=2, norm_topk_prob=True)),
)
ZERO = RouterConfig(
    kind="longcat",
    num_experts=6,
    num_zero_experts=3,
    top_k=3,
    routed_scaling_factor=3.0,
    controller=ControllerConfig(kind=ControllerKind.PROPORTIONAL, rate=0.1, target_ffn_count=2),
)
LATENT = LatentAttentionConfig(
    kv_rank=10, q_rank=12, nope_dim=6, rope_dim=4, value_dim=5, scale_latents=True
)
SPARSE = SparseAttentionConfig(top_k=6, num_heads=2, head_dim=8, initial=1, local=2)
V4 = RouterConfig(
    kind="sqrt_softplus_topk",
    num_experts=6,
    top_k=2,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    controller=ControllerConfig(),
)
assert PLAIN.moe is not None

OPTIONS = {
    "plain": PLAIN,
    "shortcut": PLAIN.replace(wiring=Wiring.SHORTCUT, moe=PLAIN.moe.replace(router=ZERO)),
    "sequential": PLAIN.replace(wiring=Wiring.SEQUENTIAL, moe=PLAIN.moe.replace(router=ZERO)),
    "shortcut after a dense layer": PLAIN.replace(wiring=Wiring.SHORTCUT, num_dense_layers=1),
    "hash layers": PLAIN.replace(moe=PLAIN.moe.replace(router=V4), num_hash_layers=1),
    "latent experts": PLAIN.replace(moe=PLAIN.moe.replace(d_latent=10, num_shared_experts=1)),
    "queries and keys normed by head": PLAIN.replace(qk_norm=QKNorm.HEAD),
    "queries and keys normed together": PLAIN.replace(qk_norm=QKNorm.WIDTH),
    "latent attention": PLAIN.replace(num_kv_heads=None, latent_attention=LATENT),
    "latent attention without a query latent": PLAIN.replace(
        num_kv_heads=None, latent_attention=LATENT.replace(q_rank=None)
    ),
    "sparse attention": PLAIN.replace(sparse_attention=SPARSE),
    "sparse attention shared by two halves": PLAIN.replace(
        wiring=Wiring.SHORTCUT, sparse_attention=SPARSE.replace(share=2)
    ),
    "n-gram tables": PLAIN.replace(ngram=NgramConfig()),
    "n-gram tables before a layer": PLAIN.replace(ngram=NgramConfig(layers=(1,))),
    "multi-token prediction": PLAIN.replace(mtp=MTPConfig(2)),
    "embedding times sqrt(d)": PLAIN.replace(amplification=Amplification.SQRT),
    "embedding normed": PLAIN.replace(amplification=Amplification.NORM),
    "hidden z-loss": PLAIN.replace(hidden_z_loss_coef=1e-3),
    "head of its own": PLAIN.replace(tie_embeddings=False),
    "most at once": PLAIN.replace(
        wiring=Wiring.SHORTCUT,
        moe=MoEConfig(24, 8, ZERO, num_shared_experts=1, d_latent=10),
        num_kv_heads=None,
        latent_attention=LATENT,
        sparse_attention=SPARSE.replace(share=2),
        ngram=NgramConfig(4, 2, 2.37),
        mtp=MTPConfig(1, d_hidden=9),
        tie_embeddings=False,
        amplification=Amplification.SQRT,
        hidden_z_loss_coef=1e-4,
        rope_theta=1e6,
        norm_eps=1e-5,
    ),
}
