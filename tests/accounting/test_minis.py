"""The minis against their originals: the ratios that make an architecture, the command that shows
both, what a mini is not.
"""

import json
import subprocess
import sys

import pytest
from refusals import refused

from moe_lab.accounting import count
from moe_lab.accounting.model_names import find_model, named_config
from moe_lab.accounting.ratios import ratios
from moe_lab.model.minis import MINIS, find_mini, mini_config

WITHIN = 0.02


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_has_the_ratios_of_its_original(name: str) -> None:
    entry = find_model(find_mini(name).original)
    assert entry is not None
    mini, original = ratios(count(mini_config(name))), ratios(count(entry["config"]))
    found = {key: (mini[key], original[key]) for key in mini}
    for key, (mine, original) in found.items():
        if (
            key != "embedding_share"
        ):  # a vocabulary does not shrink with the width: embeddings are told apart
            assert mine == pytest.approx(original, rel=WITHIN), key
    for key in ("experts_per_active", "zero_share", "shared_share"):
        assert found[key][0] == pytest.approx(found[key][1], rel=1e-12), key


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_has_the_experts_and_the_granularity_of_its_original(name: str) -> None:
    """The numbers of experts themselves, and d_expert / d_model and d_dense / d_model, from the two
    configurations.
    """
    mine, entry = mini_config(name), find_model(find_mini(name).original)
    assert entry is not None
    theirs, router = entry["config"], mine["moe"]["router"]
    first = {
        key: next(theirs[alias] for alias in aliases if alias in theirs)
        for key, aliases in ALIASES.items()
    }
    assert (router["num_experts"], router["top_k"]) == (first["experts"], first["top_k"])
    assert mine["moe"]["d_expert"] / mine["d_model"] == pytest.approx(
        first["d_expert"] / theirs["hidden_size"], rel=1e-9
    )
    assert mine["moe"]["num_shared_experts"] == theirs.get("n_shared_experts", 0)
    assert router.get("num_zero_experts", 0) == theirs.get("zero_expert_num", 0)
    if mine.get("wiring") == "shortcut":
        assert mine["d_dense"] / mine["d_model"] == pytest.approx(
            theirs["ffn_hidden_size"] / theirs["hidden_size"], rel=1e-9
        )
    assert bool(mine.get("num_dense_layers")) == bool(theirs.get("first_k_dense_replace"))


ALIASES = {
    "experts": ("n_routed_experts", "num_experts"),
    "top_k": ("moe_topk", "num_experts_per_tok"),
    "d_expert": ("expert_ffn_hidden_size", "moe_intermediate_size", "intermediate_size"),
}


def test_ratios_by_hand() -> None:
    """One MoE layer of width 8: 6 of 12 experts...

    2 zero-compute ones beside 10 real ones, 3 slots, one shared expert.
    """
    config = {
        "vocab_size": 20, "num_layers": 1, "d_model": 8, "num_heads": 2, "context_length": 4,
        "tie_embeddings": False,
        "moe": {"d_model": 8, "d_expert": 4, "num_shared_experts": 1,
                "router": {"kind": "longcat", "num_experts": 10, "num_zero_experts": 2,
                    "top_k": 3}},
    }  # fmt: skip
    expert, attention, router, norms, ends = 3 * 8 * 4, 4 * 8 * 8, 12 * 8, 3 * 8, 2 * 20 * 8
    run, counted = 3 * 10 / 12, count(config)
    assert counted.total == 11 * expert + attention + router + norms + ends
    assert ratios(counted) == pytest.approx(
        {
            "experts_per_active": 10 / run,
            "zero_share": 2 / 12,
            "shared_share": 1 / (1 + run),
            "layer_active": ((run + 1) * expert + attention) / (11 * expert + attention),
            "sparsity": 1
            - ((run + 1) * expert + attention + router + norms) / (counted.total - ends),
            "table_share": 0.0,
            "embedding_share": ends / counted.total,
        }
    )
    with refused("model"):
        ratios(count({**config, "moe": None, "d_dense": 16}))


def test_the_command_shows_a_mini_beside_its_original_without_torch() -> None:
    code = (
        "import sys; from moe_lab.cli import main; main(['count', 'kimi_k2_mini', '--json']); "
        "assert 'torch' not in sys.modules"
    )
    shown = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert [one["name"] for one in shown] == ["kimi_k2_mini", "moonshotai/Kimi-K2-Instruct"]
    assert shown[1]["total"] == 1_026_408_209_408
    code = "from moe_lab.cli import main; main(['count', 'longcat_2_mini'])"
    text = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "n-gram share" in text
    assert "38 layers are 2" in text


def test_an_unknown_mini_is_named() -> None:
    with refused("mini"):
        find_mini("gpt_mini")
    with refused("name"):
        named_config("LongCat_Flash_Mini")
