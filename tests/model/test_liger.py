"""Backend ``liger`` around its kernels: what goes in and how it comes back, with a plain function
in place of the Triton kernels; and the kernels themselves in Triton's interpreter, where
liger-kernel and Triton are installed.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from gpu_session import FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_gradients import check_second_order_is_refused, gradients_of_a_layer
from refusals import refused
from test_dispatch import random_routing, run
from torch import Tensor

from moe_lab.model import ExpertBank, MoEConfig, MoELayer
from moe_lab.model.dispatch import BACKENDS, Choice, choose, liger, oracle
from moe_lab.model.dispatch.bank import Gating
from moe_lab.model.dispatch.liger import kernels as liger_kernels
from moe_lab.model.experts import swiglu
from moe_lab.routing import RouterConfig

MODULE = sys.modules["moe_lab.model.dispatch.liger"]
SCRIPT = Path(__file__).parents[2] / "experiments" / "kernels_on_cpu.py"


def plain_kernels(
    x_TD: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, w: Tensor
) -> Tensor:
    """liger-kernel's contract: [T, K] int32 ids of real experts, one weight each."""
    assert (experts.dtype, experts.shape) == (torch.int32, w.shape)
    assert (len(experts), w.dtype) == (len(x_TD), x_TD.dtype)
    assert len(x_TD)
    assert set(experts.flatten().tolist()) <= set(range(len(gate_up)))
    rows = [
        sum(
            w[t, k] * swiglu(x_TD[t], gate_up[int(e)], down[int(e)])
            for k, e in enumerate(experts[t])
        )
        for t in range(len(x_TD))
    ]
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "kernels", lambda: plain_kernels)
    monkeypatch.setattr(MODULE, "obstacle", lambda x_TD, bank: "")


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 6),
    zero=st.integers(0, 3),
    slots=st.integers(1, 4),
    unused=st.sampled_from([0.0, 0.3, 1.0]),
    on_input=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_liger_equals_the_oracle_with_all_gradients(
    tokens: int, experts: int, zero: int, slots: int, unused: float, on_input: bool, seed: int
) -> None:
    slots = min(slots, experts + zero)
    routing = random_routing(tokens, slots, experts, zero, unused, seed, on_input)
    torch.manual_seed(seed)
    bank = ExpertBank(experts, d_model=6, d_expert=5).double()
    x_TD = torch.randn(tokens, 6, dtype=torch.float64)
    for got, wanted in zip(
        run("liger", x_TD, routing, bank), run("oracle", x_TD, routing, bank), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_tokens_need_not_be_contiguous() -> None:
    routing = random_routing(12, 2, 4, 0, 0.0, seed=1)
    bank = ExpertBank(4, 6, 5).double()
    x_TD = torch.randn(6, 12, dtype=torch.float64).T
    torch.testing.assert_close(liger(x_TD, routing, bank), oracle(x_TD, routing, bank))


@pytest.mark.parametrize("zero", [0, 2])
def test_gradients_of_gradients_are_refused(zero: int) -> None:
    """They would lack the kernels' part: a router and zero-compute experts have theirs."""
    check_second_order_is_refused("liger", zero)


@pytest.mark.parametrize("zero", [0, 2])
def test_checkpointing_and_autocast_change_no_gradient_beyond_rounding(zero: int) -> None:
    exact, checkpointed, half = gradients_of_a_layer("liger", zero)
    torch.testing.assert_close(checkpointed, exact)
    assert half.dtype == torch.float32
    assert float((half - exact).norm() / exact.norm()) < 0.05


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


@pytest.mark.usefixtures("real")
def test_what_liger_cannot_run_is_named() -> None:
    routing = random_routing(3, 1, 2, 0, 0.0, seed=1)
    x_TD = torch.randn(3, 6)
    clamped = ExpertBank(2, 6, 5, Gating(limit=7.0))
    plain = ExpertBank(2, 6, 5)
    for x, bank, why in (
        (x_TD, clamped, "without a limit"),
        (x_TD.double(), ExpertBank(2, 6, 5).double(), "bfloat16"),
        (x_TD, plain, "CUDA"),
    ):
        with refused("dispatch") as error:
            BACKENDS["liger"](x, routing, bank)
        assert why in str(error.value)


@pytest.mark.usefixtures("real")
def test_auto_says_what_it_picked_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = ExpertBank(2, 16, 8)
    assert choose(torch.zeros(1, 16, dtype=torch.bfloat16), bank) == (
        "cpu",
        "the compiled backend takes float32 and float64",
    )
    on_meta = choose(torch.zeros(1, 16, device="meta"), bank)
    assert on_meta == ("grouped", "on the meta device nothing is computed")

    class OnCuda(Tensor):  # a CPU has no such tensor
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    def chosen(dtype: torch.dtype, capability: tuple[int, int]) -> Choice:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return choose(torch.zeros(1, 16, dtype=dtype).as_subclass(OnCuda), bank.to(dtype))

    assert chosen(torch.bfloat16, (9, 0)).name == "grouped"
    assert "no figure" in chosen(torch.bfloat16, (9, 0)).reason
    assert "TF32" in chosen(torch.float32, (9, 0)).reason
    assert "older than compute capability 8.0" in chosen(torch.float16, (7, 5)).reason
    monkeypatch.setattr(MODULE, "kernels", lambda: None)
    assert "pip install 'moe_lab[gpu]'" in chosen(torch.float16, (9, 0)).reason
    monkeypatch.setattr(MODULE, "kernels", lambda: plain_kernels)
    for device in ((8, 0), (11, 0), (12, 0)):  # where grouped_mm is a loop
        assert chosen(torch.bfloat16, device).name == "liger"
    assert chosen(torch.bfloat16, (10, 0)).name == "grouped"
    assert chosen(torch.float64, (9, 0)).name == "cpu"
    layer = MoELayer(MoEConfig(16, 8, RouterConfig(num_experts=2, top_k=1), dispatch="grouped"))
    assert layer.backend_choice(torch.zeros(1, 16)) == ("grouped", "it is configured")


@pytest.mark.usefixtures("real")
def test_a_version_that_takes_other_arguments_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, gate_up_proj, down_proj, top_k_index, top_k_weights): ...  # type: ignore[override]

    class Newer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weights): ...  # type: ignore[override]

    monkeypatch.setattr(MODULE, "older_than", lambda name, oldest: False)
    monkeypatch.setattr(MODULE, "find_spec", lambda name: True)
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
    for module, accepted in (
        (SimpleNamespace(LigerFusedMoEFunction=Known), True),
        (SimpleNamespace(LigerFusedMoEFunction=Newer), False),
        (SimpleNamespace(), False),
        (None, False),
    ):
        monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe", module)
        found = liger_kernels.__wrapped__()
        assert (found is not None) == accepted


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("liger_kernel") is None or find_spec("triton") is None,
    reason="liger-kernel and Triton are not installed (extra gpu)",
)
def test_the_triton_kernels_equal_the_oracle_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "liger", "--cases", "1"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_kernels_fit_a_block_and_spill_nothing() -> None:
    """``kernels_on_cpu.py liger --cases 0``, for the shapes of ``gpu.py``."""
    table = pl.read_parquet(SCRIPT.parent / "gpu" / "liger_compiled.parquet")
    assert set(table["case"]) == {"compiled for sm_90a", "compiled for sm_100a"}
    assert table["shared_bytes"].max() <= 227 * 1024  # type: ignore[operator]
    assert table["registers"].max() <= 255  # type: ignore[operator]
    assert table["spilled_bytes"].sum() == 0
    products = table.filter(pl.col("what") == "_fused_up_proj_swiglu_kernel")
    widths = {(d_model, d_expert) for _, d_model, _, _, d_expert in FULL.shapes}
    assert set(zip(products["d_model"], products["d_expert"], strict=True)) == widths
