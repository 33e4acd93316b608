"""Encoder-decoder translation and span models: Switch Transformers (arXiv 2101.03961) and NLLB-MoE
(arXiv 2207.04672).

Layers are numbered through the encoder first. One token here is one source token and one target
token: flops are those of the pair.
"""

from collections.abc import Callable

from moe_lab.accounting.architecture import Architecture, Layer
from moe_lab.cost import formulas
from moe_lab.cost.parts import (
    Attend,
    ExpertsRun,
    Part,
    Piece,
    Pieces,
    linear,
    norm,
    prefixed,
    times,
    vector,
)
from moe_lab.errors import ConfigError, expected
from moe_lab.hf.fields import MOST, Fields


def top_k_of(f: Fields, k: int) -> tuple[int, ExpertsRun]:
    """The routers of both have a fixed k, which no field says."""
    experts = f.size("num_experts")
    if k > experts:
        raise ConfigError(
            expected(f"num_experts of at least {k} (the router's fixed top-k)", experts)
        )
    f.note("top_k", f"num_experts_per_tok = {k} (fixed by the router of {f.family})")
    return experts, ExpertsRun(k, k, k)


def sparse_ffn(f: Fields, expert: Pieces, k: int) -> Pieces:
    experts, run = top_k_of(f, k)
    router = linear(Part.ROUTER, "router", f.size("hidden_size"), experts, f.truth("router_bias"))
    return (router, *times(expert, experts, run))


def stack(
    f: Fields,
    count: int,
    sparse: Callable[[int], bool],
    layer: Callable[[int, bool], Pieces],
    first: int,
) -> list[Layer]:
    return [Layer(first + index, layer(index, sparse(index))) for index in range(count)]


def switch(f: Fields) -> list[Layer]:
    """T5 layers: relative position biases in the first layer of each stack, RMSNorm, ReLU
    feed-forwards without biases, top-1.
    """
    d, heads, dim, ff = (
        f.size("hidden_size"),
        f.size("num_attention_heads"),
        f.size("head_dim"),
        f.size("d_ff"),
    )
    buckets, vocab = f.size("relative_attention_num_buckets"), f.size("vocab_size")

    def layer(crossed: bool) -> Callable[[int, bool], Pieces]:
        def pieces(index: int, sparse: bool) -> Pieces:
            attention = formulas.gqa(d, heads, heads, dim, Attend(heads, dim, dim, causal=crossed))
            cross = formulas.gqa(d, heads, heads, dim, Attend(heads, dim, dim, causal=False))
            bias = (
                (vector(Part.ATTENTION, "relative_attention_bias", buckets * heads),)
                if index == 0
                else ()
            )
            expert = formulas.plain_ffn(Part.DENSE, d, ff)
            return (
                *prefixed("self", attention),
                *(prefixed("cross", cross) if crossed else ()),
                *bias,
                *(sparse_ffn(f, expert, 1) if sparse else expert),
                *(norm(f"norm_{place}", d) for place in range(3 if crossed else 2)),
            )

        return pieces

    def every(layers: int, sparse_layers: int) -> Callable[[int], bool]:
        step = layers // sparse_layers if sparse_layers > 0 else layers
        return lambda index: step > 0 and (index % step == 1 or step == 1)

    encoder, decoder = f.num_layers, f.size("num_decoder_layers", most=MOST)
    tied = f.flag("tie_word_embeddings")
    ends = (
        Piece(Part.EMBEDDING, "shared", vocab * d),
        Piece(
            Part.HEAD, "lm_head (tied)" if tied else "lm_head", 0 if tied else vocab * d, vocab * d
        ),
        norm("encoder.norm", d),
        norm("decoder.norm", d),
    )
    return [
        Layer(None, ends if tied else (*ends, *untied_inputs(vocab, d))),
        *stack(f, encoder, every(encoder, f.size("num_sparse_encoder_layers", 0)), layer(False), 0),
        *stack(
            f, decoder, every(decoder, f.size("num_sparse_decoder_layers", 0)), layer(True), encoder
        ),
    ]


def untied_inputs(vocab: int, d: int) -> Pieces:
    """Untied, each stack has an input embedding of its own beside the shared one."""
    return (
        Piece(Part.EMBEDDING, "encoder.embed_tokens", vocab * d),
        Piece(Part.EMBEDDING, "decoder.embed_tokens", vocab * d),
    )


def nllb(f: Fields) -> list[Layer]:
    """BART-like layers with biases everywhere, sinusoidal positions, every ``sparse_step``-th layer
    sparse, top-2.
    """
    d, vocab, tied = f.size("hidden_size"), f.size("vocab_size"), f.flag("tie_word_embeddings")

    def layer(side: str, crossed: bool) -> Callable[[int, bool], Pieces]:
        heads, ff = f.size(f"{side}_attention_heads"), f.size(f"{side}_ffn_dim")
        if d % heads:
            raise ConfigError(expected(f"d_model divisible by {side}_attention_heads = {heads}", d))
        dim = d // heads

        def pieces(index: int, sparse: bool) -> Pieces:
            attention = formulas.gqa(
                d,
                heads,
                heads,
                dim,
                Attend(heads, dim, dim, causal=crossed),
                bias=True,
                out_bias=True,
            )
            cross = formulas.gqa(
                d,
                heads,
                heads,
                dim,
                Attend(heads, dim, dim, causal=False),
                bias=True,
                out_bias=True,
            )
            expert = formulas.plain_ffn(Part.DENSE, d, ff, bias=True)
            return (
                *prefixed("self", attention),
                *(prefixed("cross", cross) if crossed else ()),
                *(sparse_ffn(f, expert, 2) if sparse else expert),
                *(norm(f"norm_{place}", d, bias=True) for place in range(3 if crossed else 2)),
            )

        return pieces

    def every(side: str) -> Callable[[int], bool]:
        step = f.size(f"{side}_sparse_step", 0)
        return lambda index: step > 0 and (index + 1) % step == 0

    encoder, decoder = f.size("encoder_layers", most=MOST), f.size("decoder_layers", most=MOST)
    ends = (
        Piece(Part.EMBEDDING, "shared", vocab * d),
        Piece(
            Part.HEAD, "lm_head (tied)" if tied else "lm_head", 0 if tied else vocab * d, vocab * d
        ),
        norm("encoder.norm", d, bias=True),
        norm("decoder.norm", d, bias=True),
    )
    return [
        Layer(None, ends if tied else (*ends, *untied_inputs(vocab, d))),
        *stack(f, encoder, every("encoder"), layer("encoder", False), 0),
        *stack(f, decoder, every("decoder"), layer("decoder", True), encoder),
    ]


ROWS = {
    "switch_transformers": Architecture(
        layers=switch,
        defaults={
            "tie_word_embeddings": True,
            "relative_attention_num_buckets": 32,
            "num_decoder_layers": lambda f: f.num_layers,
        },
    ),
    "nllb-moe": Architecture(layers=nllb, defaults={"tie_word_embeddings": True}),
}
