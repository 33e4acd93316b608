"""The compiled backend: where it is chosen, what it says when it cannot be had, and that threads
and the size of vectors change nothing but the time.
"""

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import refused
from torch import Tensor

from moe_lab import compiled, cpu_kernels
from moe_lab.model import ExpertBank, MoEConfig, MoELayer
from moe_lab.model.dispatch import BACKENDS, choose, native
from moe_lab.routing import RouterConfig, Routing

needs_library = pytest.mark.skipif(
    not native.available(), reason=f"no compiled experts: {native.problem()}"
)


def routing_of(indices_TK: Tensor, num_experts: int) -> Routing:
    weights = torch.rand(indices_TK.shape, generator=torch.Generator().manual_seed(3)) * (
        indices_TK >= 0
    )
    scores = torch.full((indices_TK.shape[0], num_experts), 1 / num_experts)
    return Routing(indices_TK, weights, scores.log(), scores, num_experts)


def outputs(tokens: int, indices_TK: Tensor, num_experts: int, threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        bank, x_TD = ExpertBank(num_experts, 32, 48), torch.randn(tokens, 32, requires_grad=True)
        y_TD = native.experts(x_TD, routing_of(indices_TK, num_experts), bank)
        return [y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, bank.gate_up, bank.down])]
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("kind", ["even", "one expert has nearly all", "more rows than a block"])
def test_a_second_thread_changes_no_result(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, experts = 700, 6
    indices = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :2]
    if kind == "one expert has nearly all":
        indices = torch.where(
            torch.rand(tokens, 2, generator=generator) < 0.95, torch.tensor([4, 1]), -1
        )
    if kind == "more rows than a block":
        indices, experts = indices % 2, 2
        indices[:, 1] = 1 - indices[:, 0]
    for one, two in zip(
        outputs(tokens, indices, experts, 1), outputs(tokens, indices, experts, 2), strict=True
    ):
        assert torch.equal(one, two)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["", "-mno-avx512f", "-mno-avx"])
@pytest.mark.parametrize(("width", "hidden"), [(33, 7), (128, 64), (270, 72)])
def test_any_width_equals_the_oracle_with_vectors_of_any_size(
    vectors: str, width: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths that are no multiple of a vector, sums longer than a panel, experts of more rows than
    a block; 64, 32 and 16 bytes a vector where the processor has them.
    """
    if vectors:
        if platform.machine() != "x86_64":
            pytest.skip("the options are those of compilers for x86")
        monkeypatch.setattr(cpu_kernels, "FLAGS", (*cpu_kernels.FLAGS, vectors))
        search = functools.cache(cpu_kernels._search.__wrapped__)
        monkeypatch.setattr(cpu_kernels, "_search", search)
    torch.manual_seed(0)
    indices = torch.rand(600, 5).argsort(dim=1)[:, :2]
    indices[:, 0] = torch.where(torch.rand(600) < 0.7, 3, -1)
    indices[:, 1][indices[:, 1] == 3] = -1
    bank = ExpertBank(5, width, hidden)
    x_TD, weighting = torch.randn(600, width), torch.randn(600, width)
    results = []
    for run, dtype in ((native.experts, torch.float32), (BACKENDS["cpu"], torch.float64)):
        bank, inside = bank.to(dtype), x_TD.to(dtype).requires_grad_()
        y_TD = run(inside, routing_of(indices, 5), bank)
        inputs = [inside, bank.gate_up, bank.down]
        results.append([y_TD, *torch.autograd.grad(y_TD, inputs, weighting.to(dtype))])
    for got, wanted in zip(*results, strict=True):
        scale = float(wanted.detach().abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6 * scale)


@needs_library
def test_the_same_call_gives_the_same_bits() -> None:
    indices = torch.rand(900, 16, generator=torch.Generator().manual_seed(2)).argsort(dim=1)[:, :4]
    for first, second in zip(
        outputs(900, indices, 16, 2), outputs(900, indices, 16, 2), strict=True
    ):
        assert torch.equal(first, second)


@needs_library
def test_the_gate_is_exact_over_its_whole_range() -> None:
    """One unit, F = D = 1: y = silu(g x) u x d with known weights, against float64, up to where the
    exponential over- and underflows.
    """
    x_TD = torch.cat(
        [torch.linspace(-120, 120, 4001), torch.tensor([-1e4, 1e4, 0.0, -0.0, 88.0, -88.0])]
    ).unsqueeze(1)
    bank = ExpertBank(1, 1, 1)
    torch.nn.init.ones_(bank.gate_up)
    torch.nn.init.ones_(bank.down)
    routing = routing_of(torch.zeros(x_TD.shape[0], 1, dtype=torch.int64), 1)
    wide = x_TD.double()
    expected = routing.weights.double() * torch.nn.functional.silu(wide) * wide
    torch.testing.assert_close(
        native.experts(x_TD, routing, bank).double(), expected, rtol=1e-6, atol=1e-29
    )


@needs_library
def test_nan_tokens_stay_nan_and_touch_no_other_token() -> None:
    x_TD = torch.randn(8, 32)
    x_TD[3] = float("nan")
    indices = torch.arange(8).unsqueeze(1) % 2
    y_TD = native.experts(x_TD, routing_of(indices, 2), ExpertBank(2, 32, 8))
    assert y_TD.isnan().any(dim=1).tolist() == [
        False,
        False,
        False,
        True,
        False,
        False,
        False,
        False,
    ]


def test_auto_takes_what_can_run_the_dtype() -> None:
    bank = ExpertBank(2, 16, 8)
    best = "native" if native.available() else "cpu"
    assert choose(torch.zeros(1, 16), bank).name == best
    assert choose(torch.zeros(1, 16, dtype=torch.float64), bank).name == best
    assert choose(torch.zeros(1, 16, dtype=torch.bfloat16), bank).name == "cpu"


def test_half_precision_is_refused_by_name() -> None:
    bank = ExpertBank(2, 16, 8).bfloat16()
    with refused("dispatch"):
        native.experts(
            torch.zeros(1, 16, dtype=torch.bfloat16),
            routing_of(torch.zeros(1, 1, dtype=torch.int64), 2),
            bank,
        )


SCRIPT = """
import torch
from moe_lab.model import MoEConfig, MoELayer
from moe_lab.model.dispatch import choose, native
layer = MoELayer(MoEConfig(d_model=8, d_expert=4))
x = torch.randn(5, 8)
print(native.available(), choose(x, layer.experts).name, native.problem(), layer(x).shape)
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MOE_LAB_NATIVE": "0"}, "MOE_LAB_NATIVE=0"),
        ({"PATH": "/nonexistent", "CXX": ""}, "no C++ compiler found (set CXX, or install g++)"),
        ({"CXX": "false"}, "the experts could not be compiled"),
    ],
)
def test_without_a_compiler_the_layer_works_and_says_why(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    full = {**os.environ, "MOE_LAB_CACHE": str(tmp_path), **environment}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=full, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("False cpu")
    assert reason in result.stdout
    assert "torch.Size([5, 8])" in result.stdout


@needs_library
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    full = {**os.environ, "MOE_LAB_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=full, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.communicate(timeout=300)[0].startswith("True native")
    folder = tmp_path / f"native-{os.geteuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 1


def test_a_library_that_others_could_write_is_not_loaded(tmp_path: Path) -> None:
    code = "from moe_lab.model.dispatch import native; print(native.available(), native.problem())"
    folder = tmp_path / f"native-{os.geteuid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    environment = {**os.environ, "MOE_LAB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("False the experts could not be compiled: expected a folder of")
    assert not list(folder.iterdir())


def test_an_unknown_processor_of_a_shared_home_gets_its_own_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``-march=native`` code of one machine may be illegal on another with the same cache."""
    if not native.available():
        pytest.skip(f"no compiled experts: {native.problem()}")
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path))
    first = compiled.shared_library(cpu_kernels.SOURCE, cpu_kernels.FLAGS)
    monkeypatch.setattr(compiled, "processor", lambda: "another processor")
    assert compiled.shared_library(cpu_kernels.SOURCE, cpu_kernels.FLAGS) != first


def test_the_layer_compiles_into_one_graph() -> None:
    if not native.available():
        pytest.skip(f"no compiled experts: {native.problem()}")
    layer = MoELayer(MoEConfig(16, 8, RouterConfig(num_experts=4, top_k=2, norm_topk_prob=True)))
    x = torch.randn(2, 6, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    plain, fast = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(plain).square().sum().backward()
    expected = {
        name: parameter.grad.clone()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }
    layer.zero_grad()
    compiled(fast).square().sum().backward()
    torch.testing.assert_close(fast.grad, plain.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
