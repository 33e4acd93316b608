"""LongCat-Flash, LongCat-Flash-Lite and LongCat-2.0: two attention blocks and two dense
feed-forwards beside one MoE in each layer.

Zero-computation experts return their input, so a token runs between 0 and K real experts. n-gram
tables: arXiv 2601.21204 section 3.
"""

from moe_lab.accounting.architecture import Architecture, mtp_module
from moe_lab.accounting.block_factories import Block, dense, join, mla, norms, top, width
from moe_lab.cost import attention_cost, layer_cost
from moe_lab.cost.parts import ExpertsRun, Part, Piece, Pieces, linear, norm, prefixed, times
from moe_lab.errors import require
from moe_lab.hf.fields import MOST, Fields

K_E = "expected_ffn_experts_K_e"
"""The mean of real experts per token that training aims at: published beside the configuration, not
in it.
"""


def real_experts(f: Fields) -> tuple[int, int, ExpertsRun]:
    """(real experts, zero-computation experts, real ones that a token runs).

    Without a published mean K_e every expert is taken to be equally loaded, which gives ``K * N /
    (N + Z)``.
    """
    real, zero, k = (
        f.size("num_experts"),
        f.size_or("zero_expert_num", 0),
        f.size("num_experts_per_tok"),
    )
    require(
        k <= real + zero,
        f"num_experts_per_tok of at most num_experts + zero_expert_num = {real + zero}",
        f"num_experts_per_tok = {k}",
    )
    least, most = max(k - zero, 0), min(k, real)
    if f.find(K_E) is None:
        mean = k * real / (real + zero)
        if zero:
            f.note(
                K_E,
                f"{mean:g} real experts a token on average, as if all {real + zero} experts were "
                f"equally loaded (a field {K_E} gives the mean that was trained for)",
            )
    else:
        mean = f.number(K_E)
    require(least <= mean <= most, f"{K_E} between {least} and {most}", mean)
    return real, zero, ExpertsRun(least, mean, most)


def zero_moe(f: Fields) -> Pieces:
    real, zero, run = real_experts(f)
    if "num_layers" not in f.values:
        f.note(
            "num_hidden_layers",
            f"{f.num_layers} layers by num_hidden_layers (no num_layers; transformers saves twice "
            "as many there)",
        )
    d, size = width(f), f.size("moe_intermediate_size")
    router = linear(Part.ROUTER, "router", d, real + zero, f.truth("router_bias"))
    experts = times(layer_cost.gated_ffn(Part.ROUTED, d, size), real, run)
    # transformers 5.23 allocates the gate and up rows of the zero-computation experts too
    phantom = experts[0]._replace(phantom=zero * 2 * d * size)
    k = f.size("num_experts_per_tok")
    idle = (
        Piece(
            Part.ZERO_EXPERT,
            "identity",
            copies=zero,
            used=ExpertsRun(k - run.most, k - run.mean, k - run.least),
        )
        if zero
        else None
    )
    return (router, phantom, *experts[1:], *((idle,) if idle else ()))


def twice(block: Block) -> Block:
    return lambda f: (*prefixed("0", block(f)), *prefixed("1", block(f)))


def index_once(f: Fields) -> Pieces:
    """LongCat-2.0: the first attention block selects tokens, the second uses its selection."""
    dim = f.size("index_head_dim")
    pieces = attention_cost.indexer(width(f), f.size("q_lora_rank"), f.size("index_n_heads"), dim)
    return prefixed(
        "0", tuple(norm(piece.name, dim) if piece.part is Part.NORM else piece for piece in pieces)
    )


def sparse_mla(f: Fields) -> Pieces:
    top_k = f.size("index_topk")
    f.note("index", f"index_topk = {top_k} tokens include the initial and the local ones")
    return tuple(attention_cost.sparse(piece, top_k) for piece in mla()(f))


def dense_module(architecture: Architecture, f: Fields, index: int) -> Pieces:
    """LongCat's MTP module has one attention block and one dense feed-forward."""
    f.note(
        "mtp",
        "an MTP module is one attention block, one dense feed-forward, three norms and a "
        "projection",
    )
    return mtp_module(f, join(f.at(0), (mla(), dense(), norms(2))))


def ngram(neighbours: str, splits: str, ratio: str) -> Block:
    """(N - 1) * K tables of about ``ratio * vocab_size`` rows, sharing ``hidden_size`` channels,
    each with a projection to full width.

    Table i (from 0) has ``int(ratio * vocab_size + 2 i + 1)`` rows.
    """

    def block(f: Fields) -> Pieces:
        d, vocab, factor = width(f), f.size("vocab_size"), f.number(ratio)
        count = (f.size(neighbours, 2, MOST) - 1) * f.size(splits, most=MOST)
        require(
            count <= MOST and not (d % count),
            f"hidden_size divisible by the {count} n-gram tables ({neighbours}, {splits})",
            d,
        )
        rows = [int(factor * vocab + 2 * table + 1) for table in range(count)]
        return layer_cost.ngram_tables(rows, d)

    return block


longcat_flash = Architecture(
    blocks=(twice(mla()), twice(dense()), twice(norms(2)), zero_moe),
    defaults={"tie_word_embeddings": False, "attention_bias": False},
    mtp=dense_module,
)

ROWS = {
    "longcat_flash": longcat_flash,
    "longcat_flash_ngram": longcat_flash.variant(
        top=top(extra=(ngram("emb_neighbor_num", "emb_split_num", "ngram_vocab_size_ratio"),))
    ),
    "longcat2": longcat_flash.variant(
        blocks=(twice(sparse_mla), index_once, *longcat_flash.blocks[1:]),
        top=top(extra=(ngram("oe_neighbor_num", "oe_split_num", "oe_vocab_size_ratio"),)),
    ),
}
