"""Do the ideas of LongCat-Flash pay, each beside what it replaces? Five questions at one size,
paired by seed.

    topk         the base: shortcut wiring, k of E experts, amplified embedding; every ratio E/k
    zero         1  zero-computation experts at the base's mean: half as many as real ones, 1.5 k
                    slots of which k are real on average
    sequential   2  the zero arm without shortcut: the MoE's output joins the stream at once
    ngram        3  about half the experts, and n-gram tables for what the other half would have
                    cost (under half of the total)
    ngram-plain  4  ngram without amplification
    ngram-norm   4  ngram with a LayerNorm instead of the factor sqrt(d_model)
    topk-plain   4  the base without amplification: does it help without tables?
    mtp          5  the base with one multi-token-prediction module
    topk-short      the base at half the tokens, branched off: a difference in loss as compute

Runs of one seed see the same batches. ``judge.py`` beside this file reads the folder and writes the
comparisons; what is committed here is the ``small`` preset, ``gpu`` is the same design for one GPU.

    moe-lab sweep run experiments/longcat_mini/recipe.py --preset small --out runs/longcat_mini
    python experiments/longcat_mini/judge.py runs/longcat_mini --out experiments/longcat_mini
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_lab.accounting import count
from moe_lab.model import Amplification, DecoderConfig, MoEConfig, MTPConfig, NgramConfig, Wiring
from moe_lab.routing import ControllerConfig, ControllerKind, RouterConfig
from moe_lab.scaling import SHORT
from moe_lab.scaling.equal_totals import BETWEEN, Alternative, at_total
from moe_lab.sweeps import SweepConfig
from moe_lab.text import TextConfig
from moe_lab.training import Dtype, OptimizerConfig, RunConfig

QUESTION = (
    "Which of LongCat-Flash's ideas pay at this size: zero experts, shortcut, n-gram tables, "
    "amplification, multi-token prediction?"
)


@dataclass(frozen=True)
class Shape:
    """``base_ratio`` is where every question but the third is asked; ``ratios`` are those of the
    third.
    """

    ratios: tuple[int, ...]
    base_ratio: int
    seeds: int
    num_layers: int
    d_model: int
    d_expert: int
    d_dense: int
    top_k: int
    seq_length: int
    batch_size: int
    train_tokens: int
    lr: float
    vocab_size: int = 2048
    eval_tokens: int = 60_000
    dtype: Dtype = Dtype.FLOAT32
    checkpoint_every: int = 50


SHAPES = {
    "demo": Shape(
        ratios=(4, 16),
        base_ratio=16,
        seeds=1,
        num_layers=2,
        d_model=64,
        d_expert=32,
        d_dense=128,
        top_k=4,
        seq_length=128,
        batch_size=8,
        train_tokens=20_480,
        lr=4e-3,
        eval_tokens=20_000,
    ),
    "small": Shape(
        ratios=(4, 8, 16, 32, 64),
        base_ratio=16,
        seeds=3,
        num_layers=2,
        d_model=64,
        d_expert=32,
        d_dense=128,
        top_k=4,
        seq_length=128,
        batch_size=8,
        train_tokens=204_800,
        lr=4e-3,
    ),
    "gpu": Shape(
        ratios=(4, 8, 16, 32, 64, 128),
        base_ratio=32,
        seeds=3,
        num_layers=4,
        d_model=384,
        d_expert=128,
        d_dense=768,
        top_k=8,
        seq_length=256,
        batch_size=128,
        train_tokens=1_000_000_000,
        lr=2e-3,
        vocab_size=8192,
        dtype=Dtype.BFLOAT16,
        eval_tokens=500_000,
        checkpoint_every=500,
    ),
}
PRESETS = tuple(SHAPES)


def sweep(preset: str, *, seed: int = 0, device: str = "cpu") -> SweepConfig:
    """Every arm at seeds ``seed``, ``seed + 1``, ..., the questions at one ratio first."""
    shape = SHAPES[preset]
    runs = [run for offset in range(shape.seeds) for run in _at_base(shape, seed + offset, device)]
    runs += [
        run for offset in range(shape.seeds) for run in _over_ratios(shape, seed + offset, device)
    ]
    return SweepConfig(
        name=f"longcat_mini_{preset}", question=QUESTION, preset=preset, runs=tuple(runs)
    )


def _at_base(shape: Shape, seed: int, device: str) -> Iterator[RunConfig]:
    ratio = shape.base_ratio
    base = _run(
        shape, "topk", ratio, _decoder(shape, _topk(shape, ratio * shape.top_k)), seed, device
    )
    budgets = (shape.train_tokens // 2, shape.train_tokens)
    yield base.replace(budgets=budgets)
    yield base.replace(
        budgets=budgets,
        train_tokens=budgets[0],
        arm=f"topk{SHORT}",
        name=f"topk{SHORT}-r{ratio}-s{seed}",
    )
    zero = _decoder(shape, _zero(shape, ratio))
    tables = _ngram(shape, ratio)
    for arm, model in {
        "zero": zero,
        "sequential": zero.replace(wiring=Wiring.SEQUENTIAL),
        "ngram": tables,
        "ngram-plain": tables.replace(amplification=Amplification.NONE),
        "ngram-norm": tables.replace(amplification=Amplification.NORM),
        "topk-plain": base.model.replace(amplification=Amplification.NONE),
        "mtp": base.model.replace(mtp=MTPConfig(num_modules=1)),
    }.items():
        yield _run(shape, arm, ratio, model, seed, device)


def _over_ratios(shape: Shape, seed: int, device: str) -> Iterator[RunConfig]:
    for ratio in shape.ratios:
        if ratio != shape.base_ratio:
            yield _run(
                shape,
                "topk",
                ratio,
                _decoder(shape, _topk(shape, ratio * shape.top_k)),
                seed,
                device,
            )
            yield _run(shape, "ngram", ratio, _ngram(shape, ratio), seed, device)


def _topk(shape: Shape, experts: int) -> RouterConfig:
    return RouterConfig(num_experts=experts, top_k=shape.top_k, norm_topk_prob=True)


def _zero(shape: Shape, ratio: int) -> RouterConfig:
    """Half as many zero-computation experts as real ones and 1.5 k slots: k real experts are
    uniform load, as in LongCat-Flash.
    """
    real, slots = ratio * shape.top_k, shape.top_k * 3 // 2
    controller = ControllerConfig(
        kind=ControllerKind.PROPORTIONAL, rate=0.1, target_ffn_count=float(shape.top_k)
    )
    return RouterConfig(
        kind="longcat",
        num_experts=real,
        num_zero_experts=real // 2,
        top_k=slots,
        routed_scaling_factor=real
        * 1.5
        / slots,  # the weights of a token sum to about 1 at the start, when scores are uniform
        controller=controller,
    )


def _ngram(shape: Shape, ratio: int) -> DecoderConfig:
    """The parameters of ``topk`` at ``ratio`` with about half of its experts: as near to half as
    leaves tables that do not collide.
    """
    total, half = (
        count(_decoder(shape, _topk(shape, ratio * shape.top_k))).total,
        ratio * shape.top_k // 2,
    )
    found = {
        experts: at_total(
            _decoder(shape, _topk(shape, experts)).replace(ngram=TABLES), total, Alternative.NGRAM
        )
        for experts in range(half - half // 8, half + half // 8 + 1)
    }
    return found[min(found, key=lambda experts: (_collides(found[experts]), abs(experts - half)))]


TABLES = NgramConfig(max_n=3, num_splits=2, table_ratio=0.5)


def _collides(model: DecoderConfig) -> bool:
    """Are the tables' rows near a whole or half multiple of the vocabulary (docs/decoder.md)?"""
    assert model.ngram is not None
    return (
        model.ngram.table_ratio > 1
        and min(abs(model.ngram.table_ratio % 1 - part) for part in BETWEEN) > 0.03
    )


def _decoder(shape: Shape, router: RouterConfig) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        d_model=shape.d_model,
        num_heads=max(1, shape.d_model // 32),
        context_length=shape.seq_length,
        moe=MoEConfig(shape.d_model, shape.d_expert, router),
        d_dense=shape.d_dense,
        wiring=Wiring.SHORTCUT,
        amplification=Amplification.SQRT,
    )


def _run(
    shape: Shape, arm: str, ratio: int, model: DecoderConfig, seed: int, device: str
) -> RunConfig:
    return RunConfig(
        name=f"{arm}-r{ratio}-s{seed}",
        arm=arm,
        seed=seed,
        model=model,
        text=TextConfig(vocab_size=shape.vocab_size),
        optimizer=OptimizerConfig(lr=shape.lr),
        batch_size=shape.batch_size,
        seq_length=shape.seq_length,
        train_tokens=shape.train_tokens,
        eval_tokens=shape.eval_tokens,
        checkpoint_every=shape.checkpoint_every,
        device=device,
        dtype=shape.dtype,
    )
