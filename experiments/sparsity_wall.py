"""How far can total experts grow over active ones before it stops paying?

The main arm, ``topk``, has the same active shape in every run (d_model, layers, k experts of the
same width per token) and the same tokens; only the number of experts to choose from changes. The
other arms are there to tell a wall from what looks like one:

    zero        zero-computation experts (LongCat's router): the same mean number of real experts,
                a varying one per token
    hash        a fixed table of token ids instead of a learned router: what experts are worth when
                nothing is routed well
    lr          topk-short (topk, where there is one budget) with the learning rate a factor sqrt 2
                lower and higher: is the best bracketed?
    per_expert  topk with the same tokens per expert at every ratio (tokens grow with the ratio up
                to those of topk)
    total       the same total parameters and training FLOPs at every ratio: fewer experts per
                token, more tokens
    topk-short  topk at a quarter of the tokens, branched off its long runs where it begins to
                decay: does a wall move with the tokens?

``--alternative`` asks instead whether something else beats more experts. Arm ``experts`` is topk
with an amplified embedding (arXiv 2601.21204: without it tables lose half a nat, see longcat_mini/,
and experts a little, so all arms have it). At each ratio from 2 an alternative takes the model of
half the ratio and spends what the other half of the experts would have cost on n-gram tables
(``ngram``), layers (``depth``) or channels (``width``): the same total parameters as experts at
that ratio, and for depth and width, which run more of them per token, fewer tokens, so that
training costs the same. Alternatives in one folder share the runs with experts.

Runs of one seed see the same batches in the same order, so arms can be compared in pairs; losses
are of held-out text. Committed results: the folder ``sparsity_wall/`` beside this file.

    moe-lab sweep plan experiments/sparsity_wall.py --preset small --power
    moe-lab sweep run  experiments/sparsity_wall.py --preset small --out runs/small
    moe-lab scaling verdict runs/small --out experiments/sparsity_wall
    moe-lab sweep run  experiments/sparsity_wall.py --alternative ngram --out runs/instead
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from moe_lab.accounting import count, flops
from moe_lab.model import Amplification, DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, ControllerKind, HashTable, RouterConfig
from moe_lab.scaling import SHORT
from moe_lab.scaling.equal_totals import Alternative, at_total
from moe_lab.sweeps import SweepConfig
from moe_lab.text import TextConfig
from moe_lab.text.corpus import PACKAGES, STDLIB
from moe_lab.training import Dtype, OptimizerConfig, RunConfig

INSTEAD = "At the same total parameters, are more experts better than {}?"
QUESTION = "Does the loss still fall as experts are added at fixed active parameters?"


@dataclass(frozen=True)
class Shape:
    """What a preset fixes for all its runs. Ratios are experts over active experts (E/k), one tuple
    per arm; ``short_tokens`` is the budget that branches off the long runs (None: there is one
    budget); ``total_tokens`` those of arm total at ``total_experts`` / k. ``fewer_seeds`` maps a
    ratio to its number of seeds where that is below ``seeds``: the last doublings decide, so the
    runs belong there. ``num_heads`` of None takes heads of 32
    channels. With ``short_control`` arm hash is trained for ``short_tokens``. ``further_rates``:
    (ratio, factor of ``lr``) beside the factors root one half and root two.
    """

    ratios: tuple[int, ...]
    seeds: int
    num_layers: int
    d_model: int
    d_expert: int
    seq_length: int
    batch_size: int
    train_tokens: int
    lr: float
    zero_ratios: tuple[int, ...] = ()
    hash_ratios: tuple[int, ...] = ()
    lr_ratios: tuple[int, ...] = ()
    per_expert_ratios: tuple[int, ...] = ()
    total_ratios: tuple[int, ...] = ()
    total_experts: int = 32
    total_tokens: int = 0
    short_tokens: int | None = None
    vocab_size: int = 2048
    corpus: str = STDLIB
    fewer_seeds: Mapping[int, int] = field(default_factory=dict)
    short_control: bool = False
    further_rates: tuple[tuple[int, float], ...] = ()
    top_k: int = 2
    num_heads: int | None = None
    eval_tokens: int = 60_000
    dtype: Dtype = Dtype.FLOAT32
    checkpoint_every: int = 50


SHAPES = {
    "demo": Shape(
        ratios=(1, 2, 4, 8, 16),
        zero_ratios=(8,),
        seeds=2,
        num_layers=3,
        d_model=64,
        d_expert=64,
        seq_length=128,
        batch_size=8,
        train_tokens=204_800,
        lr=4e-3,
    ),
    "small": Shape(
        ratios=(1, 2, 4, 8, 16, 32, 64),
        zero_ratios=(8,),
        hash_ratios=(8, 64),
        lr_ratios=(1, 8, 64),
        per_expert_ratios=(8, 16, 32),
        total_ratios=(2, 4, 8, 16),
        total_tokens=81_920,
        short_tokens=40_960,
        seeds=3,
        num_layers=4,
        d_model=96,
        d_expert=96,
        seq_length=128,
        batch_size=8,
        train_tokens=163_840,
        lr=3e-3,
        eval_tokens=50_000,
    ),
    # The smallest sweep that can decide: 1M tokens an expert at the largest ratio, on a text that
    # is not repeated much (24M training tokens of Python sources). Four heads: with one
    # of 32 channels, seeds settle in better or worse states, and the gain from ratio 16 to 32 was
    # .03, .07 and -.02 nats for three seeds at 33M tokens.
    "decisive": Shape(
        ratios=(1, 2, 4, 8, 16, 32),
        hash_ratios=(8, 32),
        lr_ratios=(1, 32),
        further_rates=((1, 2.0), (1, 2.83)),
        short_tokens=8_192_000,
        short_control=True,
        seeds=3,
        fewer_seeds={1: 1, 2: 1, 4: 1, 8: 2},
        num_layers=2,
        d_model=32,
        d_expert=64,
        num_heads=4,
        seq_length=128,
        batch_size=32,
        train_tokens=32_768_000,
        lr=5e-3,
        vocab_size=512,
        corpus=PACKAGES,
        eval_tokens=300_000,
        checkpoint_every=500,
    ),
    # Router rows grow with the experts and count as active: a wide residual stream and few, large
    # experts keep that under a tenth. Seeds are placed where the verdict is made: the power of this
    # design is in docs/scaling.md.
    "gpu": Shape(
        ratios=(1, 2, 4, 8, 16, 32, 64, 128),
        zero_ratios=(32,),
        hash_ratios=(8, 64),
        lr_ratios=(1, 8, 64, 128),
        per_expert_ratios=(16, 32, 64),
        total_ratios=(2, 4, 8, 16, 32, 64),
        total_experts=128,
        total_tokens=300_000_000,
        short_tokens=300_000_000,
        seeds=3,
        fewer_seeds={1: 2, 2: 2, 4: 2, 8: 2, 16: 2},
        num_layers=6,
        d_model=256,
        d_expert=192,
        seq_length=256,
        batch_size=64,
        train_tokens=1_200_000_000,
        lr=2e-3,
        vocab_size=4096,
        dtype=Dtype.BFLOAT16,
        eval_tokens=500_000,
        checkpoint_every=500,
    ),
    # What 45 minutes of one GPU pay for: its power is in docs/scaling.md.
    "pilot": Shape(
        ratios=(1, 4, 16, 32, 64, 128),
        lr_ratios=(1, 16, 128),
        seeds=3,
        fewer_seeds={1: 1, 4: 2, 16: 2},
        num_layers=6,
        d_model=256,
        d_expert=192,
        seq_length=256,
        batch_size=64,
        train_tokens=200_000_000,
        lr=2e-3,
        vocab_size=4096,
        dtype=Dtype.BFLOAT16,
        eval_tokens=500_000,
        checkpoint_every=500,
    ),
}
PRESETS = tuple(SHAPES)
ALTERNATIVES = tuple(Alternative)


def sweep(
    preset: str, *, seed: int = 0, device: str = "cpu", alternative: str | None = None
) -> SweepConfig:
    """The designed grid of ``preset``: every ratio and arm at seeds ``seed``, ``seed + 1``, ...;
    arm lr at the first seed alone.

    With ``alternative``, arm experts at every ratio and that alternative to it.
    """
    shape = SHAPES[preset]
    if alternative is not None:
        kind = Alternative(alternative)
        runs = [
            run
            for offset in range(shape.seeds)
            for run in _against_experts(shape, kind, seed + offset, device)
        ]
        return SweepConfig(
            name=f"sparsity_wall_{preset}_{kind}",
            question=INSTEAD.format(kind),
            preset=preset,
            runs=tuple(runs),
        )
    runs = [
        run
        for offset in range(shape.seeds)
        for arm in ARMS.values()
        for run in arm(shape, seed + offset, device)
        if offset < shape.fewer_seeds.get(round(run.ratio), shape.seeds)
    ]
    runs += list(_rates(shape, seed, device))
    return SweepConfig(
        name=f"sparsity_wall_{preset}", question=QUESTION, preset=preset, runs=tuple(runs)
    )


def _fixed_active(shape: Shape, seed: int, device: str) -> Iterator[RunConfig]:
    for ratio in shape.ratios:
        run = _run(shape, "topk", ratio, _topk(shape, ratio), seed, device)
        if shape.short_tokens is None:
            yield run
        else:
            budgets = (shape.short_tokens, shape.train_tokens)
            yield run.replace(budgets=budgets)
            short = f"topk{SHORT}"
            yield run.replace(
                budgets=budgets,
                train_tokens=shape.short_tokens,
                arm=short,
                name=run.name.replace("topk", short, 1),
            )


def _zero_experts(shape: Shape, seed: int, device: str) -> Iterator[RunConfig]:
    for ratio in shape.zero_ratios:
        yield _run(shape, "zero", ratio, _zero(shape, ratio), seed, device)


def _hash_control(shape: Shape, seed: int, device: str) -> Iterator[RunConfig]:
    for ratio in shape.hash_ratios:
        router = RouterConfig(
            kind="hash",
            num_experts=ratio * shape.top_k,
            top_k=shape.top_k,
            vocab_size=shape.vocab_size,
            hash_table=HashTable.RANDOM,
        )
        run = _run(shape, "hash", ratio, router, seed, device)
        if shape.short_control and shape.short_tokens is not None:
            yield run.replace(
                budgets=(shape.short_tokens, shape.train_tokens), train_tokens=shape.short_tokens
            )
        else:
            yield run


def _per_expert(shape: Shape, seed: int, device: str) -> Iterator[RunConfig]:
    for ratio in shape.per_expert_ratios:
        tokens = shape.train_tokens * ratio // max(shape.ratios)
        yield _run(shape, "per_expert", ratio, _topk(shape, ratio), seed, device).replace(
            train_tokens=tokens
        )


def _fixed_total(shape: Shape, seed: int, device: str) -> Iterator[RunConfig]:
    """Fewer experts per token at larger ratios; the tokens make up for it, so that parameters and
    FLOPs stay what they are.
    """
    if not shape.total_ratios:
        return
    runs = {
        ratio: _run(
            shape,
            "total",
            ratio,
            RouterConfig(
                num_experts=shape.total_experts,
                top_k=shape.total_experts // ratio,
                norm_topk_prob=True,
            ),
            seed,
            device,
        )
        for ratio in shape.total_ratios
    }
    work = {
        ratio: flops(run.model, context=run.seq_length, phase="train").total
        for ratio, run in runs.items()
    }
    reference = work[min(work, key=lambda ratio: abs(ratio - shape.total_experts // shape.top_k))]
    for ratio, run in runs.items():
        yield run.replace(train_tokens=round(shape.total_tokens * reference / work[ratio]))


def _against_experts(
    shape: Shape, alternative: Alternative, seed: int, device: str
) -> Iterator[RunConfig]:
    def amplified(ratio: int) -> RunConfig:
        run = _run(shape, Alternative.EXPERTS.value, ratio, _topk(shape, ratio), seed, device)
        return run.replace(model=run.model.replace(amplification=Amplification.SQRT))

    for ratio in shape.ratios:
        experts = amplified(ratio)
        yield experts
        if alternative is not Alternative.EXPERTS and ratio > 1:
            yield instead(experts, amplified(ratio // 2).model, alternative)


def instead(experts: RunConfig, smaller: DecoderConfig, alternative: Alternative) -> RunConfig:
    """``smaller`` brought to the parameters of the run ``experts`` by an alternative, at no more
    than its training FLOPs.
    """
    model = at_total(smaller, count(experts.model).total, alternative)
    spent, work = (
        flops(one, context=experts.seq_length, phase="train").total
        for one in (experts.model, model)
    )
    tokens = round(experts.train_tokens * min(1.0, spent / work))
    name = experts.name.replace(experts.arm, alternative.value, 1)
    return experts.replace(name=name, arm=alternative.value, model=model, train_tokens=tokens)


def _rates(shape: Shape, seed: int, device: str) -> Iterator[RunConfig]:
    factors = [(ratio, math.sqrt(0.5)) for ratio in shape.lr_ratios]
    factors += [(ratio, math.sqrt(2)) for ratio in shape.lr_ratios]
    for ratio, factor in sorted(factors) + list(shape.further_rates):
        run = _run(shape, "lr", ratio, _topk(shape, ratio), seed, device)
        run = run.replace(
            name=f"{run.name}-x{factor:.2f}", optimizer=OptimizerConfig(lr=shape.lr * factor)
        )
        if shape.short_tokens is not None:
            run = run.replace(
                budgets=(shape.short_tokens, shape.train_tokens), train_tokens=shape.short_tokens
            )
        yield run


ARMS: dict[str, Callable[[Shape, int, str], Iterator[RunConfig]]] = {
    "topk": _fixed_active,
    "zero": _zero_experts,
    "hash": _hash_control,
    "per_expert": _per_expert,
    "total": _fixed_total,
}


def _topk(shape: Shape, ratio: int) -> RouterConfig:
    return RouterConfig(num_experts=ratio * shape.top_k, top_k=shape.top_k, norm_topk_prob=True)


def _zero(shape: Shape, ratio: int) -> RouterConfig:
    """Half as many zero-computation experts as real ones and K = 1.5 k slots: K_e = k is uniform
    load, as in LongCat-Flash.
    """
    real, slots = ratio * shape.top_k, shape.top_k + shape.top_k // 2
    zero = real // 2
    return RouterConfig(
        kind="longcat",
        num_experts=real,
        num_zero_experts=zero,
        top_k=slots,
        routed_scaling_factor=(real + zero)
        / slots,  # the weights of a token sum to about 1 at the start, when scores are uniform
        controller=ControllerConfig(
            kind=ControllerKind.PROPORTIONAL,
            rate=0.1,
            target_ffn_count=slots * real / (real + zero),
        ),
    )


def _run(
    shape: Shape, arm: str, ratio: int, router: RouterConfig, seed: int, device: str
) -> RunConfig:
    moe = MoEConfig(d_model=shape.d_model, d_expert=shape.d_expert, router=router)
    model = DecoderConfig(
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        d_model=shape.d_model,
        num_heads=shape.num_heads or max(1, shape.d_model // 32),
        context_length=shape.seq_length,
        moe=moe,
    )
    return RunConfig(
        name=f"{arm}-r{ratio}-s{seed}",
        arm=arm,
        seed=seed,
        model=model,
        text=TextConfig(corpus=shape.corpus, vocab_size=shape.vocab_size),
        optimizer=OptimizerConfig(lr=shape.lr),
        batch_size=shape.batch_size,
        seq_length=shape.seq_length,
        train_tokens=shape.train_tokens,
        eval_tokens=shape.eval_tokens,
        checkpoint_every=shape.checkpoint_every,
        device=device,
        dtype=shape.dtype,
    )
