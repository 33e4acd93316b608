"""Backend ``quack`` around its kernels: index arithmetic, layouts and the backward pass, with plain
functions of the same contract in place of the kernels. ``experiments/kernels_on_cpu.py`` runs it on
quack-kernels' own reference functions and compiles its kernels.
"""

import inspect
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_gradients import check_second_order_is_refused, gradients_of_a_layer
from quack_stand_in import STAND_IN
from refusals import refused
from test_dispatch import random_routing, run
from torch import Tensor

from moe_lab.model import ExpertBank
from moe_lab.model.dispatch import BACKENDS, choose, oracle, quack
from moe_lab.model.dispatch.bank import Gating, Weights
from moe_lab.model.dispatch.quack import Kernels, kernels, obstacle

RESULTS = Path(__file__).parents[2] / "experiments" / "gpu"
MODULE = sys.modules["moe_lab.model.dispatch.quack"]


def assert_near(got: Tensor, wanted: Tensor) -> None:
    """The kernels take and give gate weights in float32."""
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "kernels", lambda: STAND_IN)
    monkeypatch.setattr(MODULE, "obstacle", lambda x_TD, bank: "")


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 6),
    zero=st.integers(0, 3),
    slots=st.integers(1, 4),
    unused=st.sampled_from([0.0, 0.3, 1.0]),
    on_input=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_quack_equals_the_oracle_with_all_gradients(
    tokens: int,
    experts: int,
    zero: int,
    slots: int,
    unused: float,
    on_input: bool,
    seed: int,
) -> None:
    slots = min(slots, experts + zero)
    routing = random_routing(tokens, slots, experts, zero, unused, seed, on_input)
    torch.manual_seed(seed)
    bank = ExpertBank(experts, 6, 5).double()
    x_TD = torch.randn(tokens, 6, dtype=torch.float64)
    for got, wanted in zip(
        run("quack", x_TD, routing, bank), run("oracle", x_TD, routing, bank), strict=True
    ):
        assert_near(got, wanted)


def test_tensors_need_not_be_contiguous() -> None:
    routing = random_routing(12, 2, 4, 0, 0.0, seed=1)
    bank = ExpertBank(4, 6, 5).double()
    turned = Weights(bank.gate_up.mT.contiguous().mT, bank.down.mT.contiguous().mT)
    x_TD = torch.randn(6, 12, dtype=torch.float64).T.requires_grad_()
    grads = []
    for backend, weights in ((quack, turned), (oracle, bank)):
        y_TD = backend(x_TD, routing, weights)
        grads.append((y_TD, *torch.autograd.grad(y_TD.sum(), [x_TD, bank.gate_up, bank.down])))
    for got, wanted in zip(*grads, strict=True):
        assert_near(got, wanted)


def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    calls: list[str] = []

    def counted(name: str) -> Any:
        def call(*args: Tensor, **options: Any) -> Any:
            calls.append(f"{name}{'' if options.get('store_preact', True) else ', nothing kept'}")
            return getattr(STAND_IN, name)(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "kernels", lambda: Kernels(*map(counted, Kernels._fields)))
        routing = random_routing(5, 2, 3, 0, 0.0, seed=1)
        bank = ExpertBank(3, 6, 5).double().requires_grad_(False)
        x_TD = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            quack(x_TD, routing, bank)
        assert calls == ["gemm_gated, nothing kept", "gemm"]
        calls.clear()
        quack(x_TD, routing, bank).sum().backward()
    assert calls == ["gemm_gated", "gemm", "gemm_dgated", "gemm"]


@pytest.mark.parametrize("zero", [0, 2])
def test_gradients_of_gradients_are_refused(zero: int) -> None:
    check_second_order_is_refused("quack", zero)


@pytest.mark.parametrize("zero", [0, 2])
def test_checkpointing_and_autocast_change_no_gradient_beyond_rounding(zero: int) -> None:
    exact, checkpointed, half = gradients_of_a_layer("quack", zero)
    torch.testing.assert_close(checkpointed, exact)
    assert half.dtype == torch.float32
    assert float((half - exact).norm() / exact.norm()) < 0.05


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


@pytest.mark.usefixtures("real")
def test_what_quack_cannot_run_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = random_routing(3, 1, 2, 0, 0.0, seed=1)
    x_TD = torch.randn(3, 16).bfloat16()
    plain, whole = ExpertBank(2, 16, 8).bfloat16(), ExpertBank(2, 16, 8)
    gpt_oss = ExpertBank(2, 16, 8, Gating(limit=7.0, alpha=1.702, offset=1.0), bias=True)
    for x, bank, why in (
        (x_TD, gpt_oss.bfloat16(), "without a limit"),
        (x_TD.float(), whole, "both bfloat16"),
        (x_TD, whole, "both bfloat16"),
        (x_TD[:, :12], ExpertBank(2, 12, 8).bfloat16(), "16 bytes"),
        (x_TD, plain, "CUDA"),
    ):
        with refused("dispatch") as error:
            BACKENDS["quack"](x, routing, bank)
        assert why in str(error.value)
        assert "\n" not in str(error.value)

    class OnCuda(Tensor):  # a CPU has no such tensor
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    on_cuda = x_TD.as_subclass(OnCuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert "older than compute capability 9.0" in obstacle(on_cuda, plain)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(MODULE, "kernels", lambda: None)
    assert "pip install 'moe_lab[gpu]'" in obstacle(on_cuda, plain)
    monkeypatch.setattr(MODULE, "kernels", lambda: STAND_IN)
    assert obstacle(on_cuda, plain) == ""
    assert choose(on_cuda, plain).name != "quack"  # nobody measured it


@pytest.mark.usefixtures("real")
@pytest.mark.skipif(find_spec("quack") is None, reason="quack-kernels is not installed")
def test_quack_kernels_has_the_arguments_in_the_order_that_the_backend_gives() -> None:
    found = kernels()
    if found is None:
        pytest.skip("quack-kernels lacks CUTLASS, is older, or takes other arguments")
    for name, function in STAND_IN._asdict().items():
        theirs = list(inspect.signature(getattr(found, name)).parameters)
        ours = inspect.signature(function).parameters
        plain = [key for key, value in ours.items() if value.kind != value.KEYWORD_ONLY]
        assert theirs[: len(plain)] == plain or name == "gemm_dgated"


@pytest.mark.usefixtures("real")
def test_a_version_that_takes_other_arguments_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing argument, a missing function, a missing module."""

    def newer(A: Tensor, B: Tensor) -> None: ...

    monkeypatch.setattr(MODULE, "older_than", lambda name, oldest: False)
    for module, accepted in (
        (SimpleNamespace(**STAND_IN._asdict()), True),
        (SimpleNamespace(**STAND_IN._asdict() | {"gemm": newer}), False),
        (SimpleNamespace(gemm=STAND_IN.gemm), False),
        (None, False),
    ):
        monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
        assert (kernels.__wrapped__() is not None) == accepted


@pytest.mark.parametrize("name", ["liger", "quack"])
def test_the_committed_check_of_the_kernels_found_no_difference(name: str) -> None:
    table = pl.read_parquet(RESULTS / f"{name}_on_cpu.parquet")
    assert table["error"].max() < 1e-5  # type: ignore[operator]
    compared = table.filter(~pl.col("case").str.starts_with("compiled"))
    assert compared["case"].n_unique() == 6
    assert compared["what"].n_unique() == 5
    if name == "quack":
        compiled = table.filter(pl.col("case").str.starts_with("compiled for sm_90a"))
        assert len(compiled) == 8
        assert set(compiled["what"]) == set(Kernels._fields)
