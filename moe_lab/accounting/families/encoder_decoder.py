"""Encoder-decoder translation and span models: Switch Transformers (arXiv 2101.03961) and NLLB-MoE
(arXiv 2207.04672).

Layers are numbered through the encoder first. One token here is one source token and one target
token: flops are those of the pair.
"""

from collections.abc import Callable

from moe_lab.accounting.architecture import Architecture, Layer
from moe_lab.accounting.block_factories import used
from moe_lab.cost import attention_cost, layer_cost
from moe_lab.cost.parts import (
    Attend,
    Part,
    Piece,
    Pieces,
    linear,
    norm,
    prefixed,
    times,
    vector,
)
from moe_lab.errors import require
from moe_lab.hf.architectures import sparse
from moe_lab.hf.fields import Fields


def sparse_ffn(f: Fields, expert: Pieces) -> Pieces:
    experts, run = used(f)
    router = linear(Part.ROUTER, "router", f.size("hidden_size"), experts, f.truth("router_bias"))
    return (router, *times(expert, experts, run))


def stacks(f: Fields, encoder: int, *layers: Callable[[int, bool], Pieces]) -> list[Layer]:
    """The layers of the encoder, then of the decoder, each made from its index and whether it is
    sparse.
    """
    marks = sparse(f)
    halves = zip(layers, (marks[:encoder], marks[encoder:]), (0, encoder), strict=True)
    return [
        Layer(first + index, layer(index, mark))
        for layer, half, first in halves
        for index, mark in enumerate(half)
    ]


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
        def pieces(index: int, has_experts: bool) -> Pieces:
            attention = attention_cost.gqa(
                d, heads, heads, dim, Attend(heads, dim, dim, causal=crossed)
            )
            cross = attention_cost.gqa(
                d, heads, heads, dim, Attend(heads, dim, dim, causal=False, cached=2 * heads * dim)
            )
            bias = (
                (vector(Part.ATTENTION, "relative_attention_bias", buckets * heads),)
                if index == 0
                else ()
            )
            expert = layer_cost.plain_ffn(Part.DENSE, d, ff)
            return (
                *prefixed("self", attention),
                *(prefixed("cross", cross) if crossed else ()),
                *bias,
                *(sparse_ffn(f, expert) if has_experts else expert),
                *(norm(f"norm_{place}", d) for place in range(3 if crossed else 2)),
            )

        return pieces

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
        *stacks(f, f.num_layers, layer(False), layer(True)),
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
        require(not (d % heads), f"d_model divisible by {side}_attention_heads = {heads}", d)
        dim = d // heads

        def pieces(index: int, has_experts: bool) -> Pieces:
            attention = attention_cost.gqa(
                d,
                heads,
                heads,
                dim,
                Attend(heads, dim, dim, causal=crossed),
                bias=True,
                out_bias=True,
            )
            cross = attention_cost.gqa(
                d,
                heads,
                heads,
                dim,
                Attend(heads, dim, dim, causal=False, cached=2 * heads * dim),
                bias=True,
                out_bias=True,
            )
            expert = layer_cost.plain_ffn(Part.DENSE, d, ff, bias=True)
            return (
                *prefixed("self", attention),
                *(prefixed("cross", cross) if crossed else ()),
                *(sparse_ffn(f, expert) if has_experts else expert),
                *(norm(f"norm_{place}", d, bias=True) for place in range(3 if crossed else 2)),
            )

        return pieces

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
        *stacks(f, f.size("encoder_layers"), layer("encoder", False), layer("decoder", True)),
    ]


ROWS = {
    "switch_transformers": Architecture(
        layers=switch,
        defaults={
            "tie_word_embeddings": True,
            "relative_attention_num_buckets": 32,
        },
    ),
    "nllb-moe": Architecture(layers=nllb, defaults={"tie_word_embeddings": True}),
}
