"""``sees_later_tokens`` against what routers do: in evaluation, are earlier tokens routed alike
when later ones change? And the losses of those that are not carry a note.
"""

import json
from pathlib import Path

import pytest
import torch
from routing.test_router_properties import VOCABULARY, config_of

from moe_lab.report.run_tables import later_token_note, sees_later_tokens
from moe_lab.routing import ROUTERS, RouterConfig, RouterContext, build_router
from moe_lab.runs import RunRecord, RunState

WITH_CAPACITY = [
    RouterConfig(kind="switch", num_experts=4, top_k=1, capacity_factor=0.6),
    RouterConfig(kind="switch", num_experts=4, top_k=2, capacity_factor=0.6),
    RouterConfig(
        kind="switch", num_experts=4, top_k=1, capacity_factor=0.6, batch_prioritized=True
    ),
    RouterConfig(kind="gshard_top2", num_experts=4, top_k=2, capacity_factor=0.6),
    RouterConfig(kind="gshard_top2", num_experts=4, top_k=2, eval_capacity_fraction=0.2),
    RouterConfig(kind="gshard_top2", num_experts=4, top_k=2, eval_capacity_fraction=1.0),
    RouterConfig(
        kind="moepp", num_experts=4, top_k=2, num_zero_experts=3, capacity_factor=0.6
    ),
]  # fmt: skip


def sees(config: RouterConfig) -> bool:
    """Whether, in any of 20 draws, other later tokens change the routing of the first half."""
    torch.manual_seed(0)
    router = build_router(config, 6)
    router.update([router(torch.randn(24, 6), context())])
    router.eval()
    for seed in range(20):
        torch.manual_seed(seed)
        x, other = torch.randn(24, 6), torch.randn(24, 6)
        other[:12] = x[:12]
        routed = []
        for tokens in (x, other):
            torch.manual_seed(1)  # of routers that draw
            routing = router(tokens, context())
            routed.append((routing.indices[:12], routing.weights[:12]))
        if not all(torch.equal(one, two) for one, two in zip(*routed, strict=True)):
            return True
    return False


def context() -> RouterContext:
    return RouterContext(token_ids=torch.arange(24) % VOCABULARY, sequence_length=24)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_the_fact_is_what_the_router_does(kind: str) -> None:
    config = config_of(kind, 4, 2)
    if kind in ("switch", "gshard_top2"):
        config = config.replace(capacity_factor=0.6)
    assert sees(config) == config.sees_later_tokens


@pytest.mark.parametrize("config", WITH_CAPACITY)
def test_a_capacity_sees_later_tokens_where_it_drops_for_them(config: RouterConfig) -> None:
    """First choices of later tokens come before second ones of earlier tokens."""
    assert sees(config) == config.sees_later_tokens


def run(folder: Path, kind: str, result: dict) -> RunRecord:
    folder.mkdir()
    router = {"kind": kind, "num_experts": 4, "top_k": 2}
    (folder / "config.json").write_text(json.dumps({"model": {"moe": {"router": router}}}))
    return RunRecord(folder, RunState.FINISHED, {"arm": kind, "loss": 1.0, **result})


def test_a_run_of_before_the_fact_was_recorded_is_read_from_its_configuration(
    tmp_path: Path,
) -> None:
    old = run(tmp_path / "a", "expert_choice", {})
    new = run(tmp_path / "b", "seq_topk", {"sees_later_tokens": True})
    causal = run(tmp_path / "c", "softmax_topk", {})
    assert [sees_later_tokens(one) for one in (old, new, causal)] == [True, True, False]
    note = later_token_note([old, new, causal])
    assert note.startswith("expert_choice and seq_topk: later tokens ")
    assert later_token_note([causal]) == ""
    broken = RunRecord(tmp_path / "none", RunState.FINISHED, {"arm": "x"})
    assert not sees_later_tokens(broken)
