"""Controllers against everything that makes counters count twice: accumulation, checkpointing,
evaluation, ranks, saving, casting.
"""

import io

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from process_groups import free_port, unless_aborted
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moe_lab.routing import (
    ControllerConfig,
    ControllerKind,
    Router,
    RouterConfig,
    RouterContext,
    build_router,
)

Kind = ControllerKind


def config(kind: ControllerKind, **fields) -> ControllerConfig:
    return ControllerConfig(kind=kind, **fields)


RULES = {
    "sigmoid_topk": [Kind.SIGN, Kind.CENTRED_SIGN, Kind.PROPORTIONAL, Kind.PID, Kind.QUANTILE],
    "expert_threshold": [Kind.THRESHOLD_EMA, Kind.QUANTILE_EMA, Kind.BUDGET_SIGN],
    "dtop_p": [Kind.TOP_P],
    "remoe": [Kind.RELU_LAMBDA],
}
CASES = [(kind, rule) for kind, rules in RULES.items() for rule in rules]


def router_of(kind: str, rule: ControllerKind) -> Router:
    torch.manual_seed(5)
    return build_router(
        RouterConfig(kind=kind, num_experts=6, top_k=2, controller=config(rule, rate=0.1)), 4
    )


def state(router: Router) -> dict[str, torch.Tensor]:
    assert router.controller is not None
    return {name: buffer.clone() for name, buffer in router.controller.named_buffers()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_gradient_accumulation_is_one_step(kind, rule):
    split, whole = router_of(kind, rule), router_of(kind, rule)
    # Expert Threshold warms up with the batch's own cut-offs: start both from the same ones.
    x = torch.randn(48, 4)
    for router in (split, whole):
        router.update([router(x)])
    y = torch.randn(48, 4)
    split.update([split(part) for part in y.chunk(4)])
    whole.update([whole(y)])
    assert_same(state(split), state(whole))


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_a_forward_pass_changes_nothing(kind, rule):
    router = router_of(kind, rule)
    before = state(router)
    router(torch.randn(48, 4))
    router.eval()
    router(torch.randn(48, 4))
    assert_same(before, state(router))


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_activation_checkpointing_runs_forward_twice_and_counts_once(kind, rule):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = router_of(kind, rule)
            self.seen = []

        def forward(self, x):
            routing = self.router(x)
            self.seen.append(routing)
            return routing.weights.sum()

    plain, checkpointed = Layer(), Layer()
    x = torch.randn(48, 4, requires_grad=True)
    plain(x).backward()
    with set_checkpoint_early_stop(False):
        checkpoint(checkpointed, x, use_reentrant=False).backward()  # type: ignore[union-attr]
    assert len(checkpointed.seen) == 2
    assert torch.equal(checkpointed.seen[0].indices, checkpointed.seen[1].indices)
    plain.router.update(plain.seen[:1])
    checkpointed.router.update(checkpointed.seen[:1])
    assert_same(state(plain.router), state(checkpointed.router))


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_an_update_in_evaluation_mode_is_ignored(kind, rule):
    router = router_of(kind, rule).eval()
    before = state(router)
    router.update([router(torch.randn(48, 4))])
    assert_same(before, state(router))


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_a_step_without_valid_tokens_changes_nothing(kind, rule):
    router = router_of(kind, rule)
    router.update([router(torch.randn(48, 4))])
    before = state(router)
    router.update(
        [router(torch.randn(8, 4), RouterContext(valid=torch.zeros(8, dtype=torch.bool)))]
    )
    router.update([])
    assert_same(before, state(router))


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_controllers_are_saved_and_resumed_with_the_model(kind, rule):
    trained, x = router_of(kind, rule), torch.randn(48, 4)
    for _ in range(3):
        trained.update([trained(x)])
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    resumed = router_of(kind, rule)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for router in (trained, resumed):
        router.update([router(x)])
    assert_same(state(trained), state(resumed))


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_half_precision_models_keep_their_controllers_in_float32(kind, rule):
    router = router_of(kind, rule)
    router.update([router(torch.randn(48, 4))])
    before = state(router)
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert_same(before, state(router))
    assert router(torch.randn(3, 4, dtype=torch.bfloat16)).scores.dtype == torch.float32


def _rank(rank: int, world: int, port: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(7))
    found = {}
    for kind, rule in CASES:
        router = router_of(kind, rule)
        router.update([router(part) for part in x.chunk(world)[rank].chunk(2)])
        found[kind, rule] = {name: buffer.tolist() for name, buffer in state(router).items()}
    results[rank] = found
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_ranks_are_counted_once_and_agree():
    """Two processes with half of the batch each reach the state of one process with all of it."""
    with mp.Manager() as manager:
        results = manager.dict()
        unless_aborted(lambda _: mp.spawn(_rank, args=(2, free_port(), results), nprocs=2))
        ranks = [
            {
                case: {name: torch.tensor(values) for name, values in buffers.items()}
                for case, buffers in results[rank].items()
            }
            for rank in range(2)
        ]
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(7))
    for kind, rule in CASES:
        assert_same(ranks[0][kind, rule], ranks[1][kind, rule])
        alone = router_of(kind, rule)
        routings = (
            [alone(part) for part in x.chunk(2)] if kind == "expert_threshold" else [alone(x)]
        )
        alone.update(routings)
        assert_same(state(alone), ranks[0][kind, rule])
