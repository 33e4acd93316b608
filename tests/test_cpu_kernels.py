"""Products and the top k in the package's own code against torch's: every transposition, gradients
of any order, the same bits on any number of threads, and a router that uses them.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from moe_lab import compiled, cpu_kernels
from moe_lab.cpu_kernels import linear as module
from moe_lab.cpu_kernels.linear import linear
from moe_lab.cpu_kernels.row_statistics import entropy_and_spread
from moe_lab.cpu_kernels.top_k import top_k
from moe_lab.measures import router_entropy
from moe_lab.routing import RouterConfig, build_router
from moe_lab.worth.selection import Replayed, Selection

pytestmark = pytest.mark.skipif(
    not cpu_kernels.available(), reason=f"no compiled products: {cpu_kernels.problem()}"
)
FLAGS = [(ta, tb) for ta in (False, True) for tb in (False, True)]


def factors(m: int, n: int, depth: int, ta: bool, tb: bool, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(m + n + depth)
    a, b = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((m, depth), (depth, n))
    )
    return [a.t().contiguous() if ta else a, b.t().contiguous() if tb else b]


@pytest.mark.parametrize(("ta", "tb"), FLAGS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 70, 300), (801, 33, 5), (12, 64, 0), (0, 8, 4)])
def test_a_product_equals_torchs(shape: tuple[int, int, int], ta: bool, tb: bool) -> None:
    a, b = factors(*shape, ta, tb, torch.float64)
    wanted = (a.t() if ta else a) @ (b.t() if tb else b)
    torch.testing.assert_close(torch.ops.moe_lab.mm(a, b, ta, tb), wanted)
    single = torch.ops.moe_lab.mm(a.float(), b.float(), ta, tb).double()
    torch.testing.assert_close(single, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ta", "tb"), FLAGS)
def test_a_second_thread_changes_no_bit(ta: bool, tb: bool) -> None:
    a, b = factors(1000, 150, 600, ta, tb, torch.float32)
    before = torch.get_num_threads()
    products = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            products.append(torch.ops.moe_lab.mm(a, b, ta, tb))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


@pytest.mark.parametrize(("ta", "tb"), FLAGS)
def test_gradients_of_every_order_are_right(ta: bool, tb: bool) -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.moe_lab.mm(a, b, ta, tb)

    a, b = (value.requires_grad_() for value in factors(3, 4, 5, ta, tb, torch.float64))
    assert torch.autograd.gradcheck(product, (a, b))
    assert torch.autograd.gradgradcheck(product, (a, b))
    torch.library.opcheck(torch.ops.moe_lab.mm, (a, b, ta, tb))


@pytest.mark.parametrize("bias", [False, True])
def test_the_router_of_a_large_batch_runs_it_in_one_graph(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = build_router(
        RouterConfig(kind="topk_softmax", num_experts=64, top_k=4, router_bias=bias), 128
    )
    x_TD = torch.randn(700, 128)
    weighting = torch.randn(700, 64)

    def step(run) -> list[Tensor]:
        inside = x_TD.clone().requires_grad_()
        logits_TE = run(inside)
        inputs = [inside, *router.parameters()]
        return [logits_TE, *torch.autograd.grad(logits_TE, inputs, weighting)]

    plain = step(lambda x: torch.nn.functional.linear(x, router.weight, router.bias))
    graph = torch.compile(router.logits, backend="aot_eager", fullgraph=True)
    for run in (router.logits, graph):
        for got, wanted in zip(step(run), plain, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    selected = torch.compile(lambda x: router(x).indices, backend="aot_eager", fullgraph=True)
    assert torch.equal(selected(x_TD), router(x_TD).indices)
    monkeypatch.setattr(module, "MIN_TERMS", 2**62)
    for got, wanted in zip(step(router.logits), plain, strict=True):
        assert torch.equal(got, wanted)


def test_forward_mode_and_transforms_of_a_large_product_are_torchs() -> None:
    x_TD, weight_ED = torch.randn(700, 128), torch.randn(64, 128)
    plain = torch.nn.functional.linear
    with dual_level():
        tangent = unpack_dual(linear(make_dual(x_TD, x_TD), weight_ED)).tangent
    assert tangent is not None
    assert torch.equal(tangent, plain(x_TD, weight_ED))
    for transform in (torch.func.grad, torch.func.jacrev):
        got, wanted = (
            transform(lambda x, run=run: run(x, weight_ED).square().sum())(x_TD)
            for run in (linear, plain)
        )
        assert torch.equal(got, wanted)


def test_a_library_is_named_by_the_headers_beside_its_source_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    source, header = tmp_path / "one.cpp", tmp_path / "one.h"
    source.write_text('#include "one.h"\n')
    header.write_text("int one() { return 1; }\n")
    first = compiled.shared_library(source, ("-shared", "-fPIC"))
    header.write_text("int one() { return 2; }\n")
    assert compiled.shared_library(source, ("-shared", "-fPIC")) != first


def test_a_library_that_cannot_be_loaded_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    source, flags = tmp_path / "one.cpp", ("-shared", "-fPIC")
    source.write_text('extern "C" int one() { return 1; }')
    path = compiled.shared_library(source, flags)
    path.write_bytes(bytes(path.stat().st_size))  # a disk that lost what was written
    found = compiled.load(source, flags, "it")
    assert not isinstance(found, str), found
    assert found.one() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("experts", "k"), [(8, 8), (33, 1), (256, 8)])
def test_the_top_k_are_those_of_a_stable_sort(dtype: torch.dtype, experts: int, k: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    values_TE = torch.randn(5000, experts, generator=generator, dtype=dtype)
    values_TE[1000:2000] = values_TE[1000:2000].mul(2).round()  # equal ones, two zeros
    values_TE[2000:3000, ::2] = -torch.inf
    values_TE[3000:3500, 1::3] = torch.nan
    values_TE[3500:4000] = -torch.inf
    wanted_TK = values_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(torch.ops.moe_lab.topk(values_TE, k), wanted_TK)


def test_of_infinity_and_nan_the_one_that_is_not_a_number_is_larger() -> None:
    values_TE = torch.tensor([[1.0, torch.inf, torch.nan, torch.inf]]).expand(9000, 4).repeat(1, 2)
    assert top_k(values_TE, 4)[0].tolist() == [2, 6, 1, 3]
    with pytest.raises(ValueError, match="expected k from 0 to 8, got 9"):
        top_k(values_TE, 9)


def test_the_selection_of_a_large_batch_can_be_replaced() -> None:
    """``Selection`` finds the compiled top k by its name."""
    router = build_router(RouterConfig(num_experts=64, top_k=2), 128)
    x_TD, number_T = torch.randn(700, 128), torch.arange(700)
    ids_TK = torch.stack([number_T % 63, torch.full((700,), 63)], dim=1)
    known_T = number_T % 2 == 0
    own_TK = router(x_TD).indices
    with Selection(64, 64, [], Replayed(ids_TK, known_T)) as selection:
        got_TK = router(x_TD).indices
    assert selection.selected
    assert torch.equal(got_TK, torch.where(known_T[:, None], ids_TK, own_TK))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("experts", [33, 64, 250])
def test_entropies_and_spreads_are_torchs(experts: int, dtype: torch.dtype, within: float) -> None:
    generator = torch.Generator().manual_seed(experts)
    logits_TE = torch.randn(300, experts, generator=generator, dtype=dtype).mul(4)
    scores_TE = logits_TE.softmax(dim=1)
    scores_TE[:9] = 0.0  # nothing selected
    scores_TE[9:19] = torch.eye(experts, dtype=dtype)[:10]
    scores_TE[19:29] = logits_TE[19:29].relu()  # not normalised
    scores_TE[29], logits_TE[30, 5], logits_TE[31, 0] = torch.nan, torch.nan, torch.inf
    scores_TE[32, 1:] = torch.finfo(dtype).tiny / 8
    every_other = torch.stack([scores_TE, scores_TE], dim=2).flatten(1)[:, ::2]
    entropy_T, spread_T = entropy_and_spread(every_other, logits_TE)
    wanted_T = router_entropy(scores_TE.double()).to(dtype)
    torch.testing.assert_close(entropy_T, wanted_T, rtol=within, atol=within, equal_nan=True)
    wanted_T = logits_TE.amax(dim=1) - logits_TE.amin(dim=1)
    torch.testing.assert_close(spread_T, wanted_T, rtol=0, atol=0, equal_nan=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = entropy_and_spread(scores_TE, logits_TE)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(again, (entropy_T, spread_T), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
