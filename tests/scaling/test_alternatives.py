"""Alternatives to experts at the same total: what is kept, what grows, what cannot be had; and the
arms of the recipe.
"""

from pathlib import Path

import pytest
from refusals import refused

from moe_lab.accounting import count, flops
from moe_lab.errors import RunError
from moe_lab.model import Amplification, DecoderConfig, LatentAttentionConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.scaling.equal_totals import Alternative, at_total
from moe_lab.sweeps import load_recipe

RECIPE = Path(__file__).parents[2] / "experiments" / "sparsity_wall.py"


def decoder(experts: int, d_model: int = 64, layers: int = 3) -> DecoderConfig:
    moe = MoEConfig(d_model, d_model, RouterConfig(num_experts=experts, top_k=2))
    return DecoderConfig(
        num_layers=layers, d_model=d_model, num_heads=d_model // 32, context_length=128, moe=moe
    )


@pytest.mark.parametrize("alternative", Alternative)
@pytest.mark.parametrize(
    ("experts", "d_model", "layers"), [(8, 64, 3), (32, 64, 3), (64, 96, 4), (256, 256, 6)]
)
def test_half_the_experts_and_something_else_make_the_same_total(
    alternative: Alternative, experts: int, d_model: int, layers: int
) -> None:
    whole, half = decoder(experts, d_model, layers), decoder(experts // 2, d_model, layers)
    found = at_total(half, count(whole).total, alternative)
    assert count(found).total == pytest.approx(count(whole).total, rel=0.02)
    assert sum(parameter.numel() for parameter in found.build().parameters()) == count(found).total
    if alternative is Alternative.EXPERTS:
        assert found == whole
    else:
        assert found.moe is not None
        assert found.moe.router == half.moe.router  # type: ignore[union-attr]
    if alternative is Alternative.NGRAM:
        assert found.ngram is not None
        assert count(found).by_part["ngram_table"] <= count(found).total / 2
        assert found.replace(ngram=None) == half
        assert flops(found, 128).total == pytest.approx(flops(half, 128).total, rel=0.03)
    if alternative is Alternative.DEPTH:
        assert found.num_layers > half.num_layers
        assert found.d_model == half.d_model
    if alternative is Alternative.WIDTH:
        assert found.d_model > half.d_model
        assert found.num_layers == half.num_layers
        assert found.dim_per_head == half.dim_per_head


def test_what_cannot_be_had_is_said() -> None:
    with refused("total"):
        at_total(decoder(8), 1000, "ngram")
    with refused("moe"):
        at_total(decoder(8).replace(moe=None, d_dense=64), 10**6, "depth")
    latent = decoder(8).replace(latent_attention=LatentAttentionConfig(kv_rank=8))
    with refused("latent_attention"):
        at_total(latent, 2 * count(latent).total, "width")


@pytest.mark.parametrize("alternative", ["ngram", "depth", "width"])
def test_the_recipe_pairs_each_ratio_with_an_alternative_of_the_same_total_and_no_more_work(
    alternative: str,
) -> None:
    sweep = load_recipe(RECIPE, "small", alternative=alternative)
    assert {run.arm for run in sweep.runs} == {"experts", alternative}
    assert {run.model.amplification for run in sweep.runs} == {Amplification.SQRT}, (
        "no arm has it to itself"
    )
    for seed in {run.seed for run in sweep.runs}:
        arms = {
            arm: [run for run in sweep.runs if run.seed == seed and run.arm == arm]
            for arm in ("experts", alternative)
        }
        assert len(arms[alternative]) == len(arms["experts"]) - 1  # nothing smaller than ratio 1
        for experts, other in zip(arms["experts"][1:], arms[alternative], strict=True):
            assert count(other.model).total == pytest.approx(count(experts.model).total, rel=0.02)
            work = [
                flops(run.model, run.seq_length, "train").total * run.train_tokens
                for run in (experts, other)
            ]
            assert 0.95 * work[0] < work[1] < 1.001 * work[0]
    alone = {run.hash() for run in load_recipe(RECIPE, "small", alternative="experts").runs}
    assert alone == {run.hash() for run in sweep.runs if run.arm == "experts"}, (
        "alternatives share the runs with experts"
    )


def test_alternatives_that_a_recipe_does_not_have_are_named(tmp_path: Path) -> None:
    with refused("alternative", RunError):
        load_recipe(RECIPE, "demo", alternative="luck")
    (tmp_path / "own.py").write_text(
        "PRESETS = ('demo',)\ndef sweep(preset, *, seed, device): ...\n"
    )
    with refused("alternative", RunError):
        load_recipe(tmp_path / "own.py", "demo", alternative="ngram")
