"""``monitor`` around any loop: what is counted once and what is not, in models of moe_lab,
torchtitan and Megatron; its folder, its alarms.
"""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from refusals import refused
from registries import registries_as_before
from torch import Tensor, nn
from trainer_layouts import VOCABULARY, D, E, K, Model, megatron, titan

from moe_lab.errors import (
    AlarmError,
    BusyError,
    CheckpointError,
    ConfigError,
    RunError,
    TraceError,
    TraceExistsError,
)
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, ControllerKind, RouterConfig
from moe_lab.runs import read_run
from moe_lab.runs.layout import RunState
from moe_lab.runs.tables import read_tables
from moe_lab.training import monitor
from moe_lab.training.alarms import ALARMS, AlarmRule, Alarms
from moe_lab.training.monitoring import SCALARS, Monitor
from moe_lab.training.readings import LayerReading, read_layers
from moe_lab.watch import Board, open_place
from moe_lab.watch.board import View

CONTROLLER = ControllerConfig(ControllerKind.PROPORTIONAL, 0.1, 2.0)
ZERO = RouterConfig(
    kind="longcat", num_experts=E, num_zero_experts=2, top_k=3, controller=CONTROLLER
)


def decoder(router: RouterConfig = ZERO, **options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(
            vocab_size=VOCABULARY,
            num_layers=2,
            d_model=D,
            num_heads=2,
            context_length=12,
            moe=MoEConfig(D, 4, router),
            num_dense_layers=0,
            **options,
        )
    )


def batches(number: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (3, 11), generator=generator) for _ in range(number)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    if isinstance(model, Decoder):
        loss = model(ids[:, :-1], ids[:, 1:]).loss
        assert loss is not None
        return loss
    return model(ids)


def train_steps(
    model: nn.Module, ids: list[Tensor], watch: Monitor | None = None, accumulate: int = 1
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for start in range(0, len(ids), accumulate):
        for part in ids[start : start + accumulate]:
            loss = loss_of(model, part)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch.step(loss=losses[-1])
    return losses


def counts_of(watch: Monitor) -> list[list[int]]:
    return [reading.counts.tolist() for reading in watch.readings]


@pytest.mark.parametrize(
    "router", [ZERO, RouterConfig(kind="remoe", num_experts=E, top_k=2, max_slots=E)]
)
def test_a_reading_of_our_own_model_is_that_of_a_run(router: RouterConfig) -> None:
    model, (ids, more) = decoder(router), batches(2)
    with monitor(model, every=1) as watch:
        first, second = (model(part[:, :-1], part[:, 1:]) for part in (ids, more))
        watch.step()
    outputs = zip(first.routings, second.routings, strict=True)
    routings = [[one.detach(), other.detach()] for one, other in outputs]
    readings = read_layers(1, model.moe_layers(), routings)
    for found, expected in zip(watch.readings, readings, strict=True):
        for name, value in vars(expected).items():
            seen = getattr(found, name)
            same = torch.equal(seen, value) if isinstance(value, Tensor) else seen == value
            assert same, name


def test_passes_of_evaluation_and_of_unobserved_steps_are_not_counted() -> None:
    model, (ids,) = titan(), batches(1)
    with monitor(model, every=2) as watch:
        loss_of(model, ids)
        assert watch.step() == {}
        loss_of(model, ids)
        model.eval()
        loss_of(model, ids)
        model.train()
        with torch.no_grad():
            loss_of(model, ids)
        assert set(watch.step()) == set(SCALARS)
        assert [reading.tokens for reading in watch.readings] == [33, 33]
        assert [sum(counts) for counts in counts_of(watch)] == [33 * K] * 2
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
@pytest.mark.parametrize("build", [titan, megatron])
def test_accumulation_adds_and_what_checkpointing_repeats_does_not(
    build: Callable[..., Model], checkpointing: str
) -> None:
    ids, found = batches(4), []
    for options in ({}, {"checkpointing": checkpointing}):
        model = build(**options)
        with monitor(model, every=2) as watch:
            train_steps(model, ids, watch, accumulate=2)
            found.append(watch.readings)
    for plain, repeated in zip(*found, strict=True):
        assert plain.tokens == 2 * 33
        assert torch.equal(plain.counts, repeated.counts)
        assert plain.entropy == pytest.approx(repeated.entropy)


def test_a_whole_model_that_is_repeated_in_the_backward_pass_is_counted_once() -> None:
    model, (ids,) = titan(), batches(1)
    with monitor(model, every=1) as watch:
        loss = torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False)
        assert isinstance(loss, Tensor)
        loss.backward()
        watch.step()
    assert [reading.tokens for reading in watch.readings] == [33, 33]


@pytest.mark.parametrize("build", [decoder, titan, megatron])
def test_a_monitored_training_has_the_losses_of_a_plain_one_to_the_bit(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    ids = batches(6)
    plain = train_steps(build(), ids)
    model = build()
    with monitor(model, tmp_path / "run", every=1) as watch:
        assert train_steps(model, ids, watch) == plain


def direct(model: Model, ids: Tensor) -> tuple[list[Tensor], list[float]]:
    """Selected ids [T, K] of each layer, and the entropies, by hooks of this test's own."""
    chosen, entropies = [], []
    handles = []
    for layer in model.layers:
        router = layer["moe"].router

        def hook(router: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0].reshape(-1, D)
            titan = hasattr(router, "gate")
            logits = router.gate(x) if titan else router.gating(x)
            name = router.score_func if titan else router.score_function
            scores = logits.softmax(1) if name == "softmax" else logits.sigmoid()
            shares = scores / scores.sum(dim=1, keepdim=True)
            entropies.append(-(shares * shares.log()).sum(dim=1).detach())
            chosen.append(output[1].detach())

        handles.append(router.register_forward_hook(hook, with_kwargs=True))
    loss_of(model, ids)
    for handle in handles:
        handle.remove()
    return chosen, entropies


@pytest.mark.parametrize("new", [False, True])
def test_torchtitans_layout_is_read(new: bool) -> None:
    model, (ids,) = titan(new), batches(1)
    chosen, entropies = direct(model, ids)
    with monitor(model, every=1) as watch:
        loss_of(model, ids)
        watch.step()
    padded = 3 if new else 0  # the first tokens of the newer layout are padding
    for place, reading in enumerate(watch.readings):
        expected = torch.bincount(chosen[place][padded:].flatten(), minlength=E)
        assert torch.equal(reading.counts, expected)
        assert (reading.layer, reading.tokens) == (place, 33 - padded)
        assert reading.entropy == pytest.approx(float(entropies[place][padded:].mean()), rel=1e-5)
        assert reading.entropy_max == math.log(E)
        assert reading.bias is not None
        assert reading.bias.tolist() == pytest.approx(torch.linspace(0, 0.5, E).tolist())
        assert reading.expert_norms is not None
        assert (reading.expert_norms > 0).all()
        assert reading.router_norm == pytest.approx(
            float(model.layers[place]["moe"].router.gate.weight.detach().norm())
        )


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_megatrons_layout_is_read(score_function: str, drop: bool) -> None:
    model, (ids,) = megatron(score_function, drop), batches(1)
    maps, entropies = direct(model, ids)
    with monitor(model, every=1) as watch:
        loss_of(model, ids)
        watch.step()
    for place, reading in enumerate(watch.readings):
        assert torch.equal(reading.counts, maps[place].sum(dim=0))
        assert (reading.layer, reading.tokens) == (place, 33)
        assert reading.mean_ffn_count == pytest.approx(K * (32 if drop else 33) / 33)
        assert reading.entropy == pytest.approx(float(entropies[place].mean()), rel=1e-5)
        assert reading.bias is not None


def test_an_expert_of_zeros_shows_in_the_norms() -> None:
    model = titan()
    model.layers[1]["moe"].experts.w2.data[4] = 0
    with monitor(model, every=1) as watch:
        loss_of(model, batches(1)[0])
        watch.step()
    norms = [reading.expert_norms for reading in watch.readings]
    assert [norm is not None and (norm == 0).nonzero().flatten().tolist() for norm in norms] == [
        [],
        [4],
    ]


@pytest.mark.parametrize(
    "model",
    [decoder(RouterConfig(num_experts=4, top_k=1)), decoder(), titan(), megatron("sigmoid", True)],
    ids=["one slot", "zero-compute", "torchtitan", "megatron"],
)
def test_every_model_gives_the_same_scalars(model: nn.Module) -> None:
    with monitor(model, every=1) as watch:
        loss_of(model, batches(1)[0])
        scalars = watch.step()
    assert tuple(scalars) == SCALARS
    assert all(math.isfinite(value) for value in scalars.values())
    share = [reading.num_zero_experts for reading in watch.readings]
    assert (scalars["moe/zero_share"] > 0) == any(share)


class Odd(nn.Module):
    """A block of experts behind a router that nobody knows."""

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.selector: nn.Module = MyRouter() if known else nn.Linear(D, E)

    def forward(self, x: Tensor) -> Tensor:
        self.selector(x)
        return self.experts[0](x)


class MyRouter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(D, E)


def test_a_model_that_cannot_be_read_is_refused_and_its_routers_are_named() -> None:
    with refused("readers", TraceError) as caught:
        monitor(Model(Odd(known=False)))
    assert "readers={" in str(caught.value)
    model = Model(Odd(known=True))
    with monitor(model, every=100), pytest.raises(TraceError, match=r"layers\.0\.moe\.selector"):
        loss_of(model, batches(1)[0])  # the first pass, observed or not
    ids = torch.arange(33 * K).reshape(33, K) % E
    readers = {r"layers\.0\.moe\.selector": lambda module, seen: (ids, ids.float(), seen["output"])}
    with monitor(model, every=1, readers=readers) as watch:
        loss_of(model, batches(1)[0])
        watch.step()
    assert counts_of(watch) == [[11] * E]


def test_a_step_in_which_no_router_ran_is_refused() -> None:
    model = titan()
    with monitor(model, every=1) as watch, refused("model", TraceError) as caught:
        watch.step()
    assert "layers.0.moe.router" in str(caught.value)


class Odder(AlarmRule):
    """Raised by the third observation of layer 1."""

    threshold = 2.5
    advice = "Look at the clock."

    def measure(self, reading: LayerReading) -> float:
        self.memory["seen"] = self.memory.get("seen", 0) + reading.layer
        return float(self.memory["seen"])

    def seen(self, reading: LayerReading, value: float) -> str:
        return "three"


def test_a_folder_is_continued_at_a_step_and_never_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lab.training.monitoring.WRITE_SECONDS", -1.0)
    with registries_as_before():
        ALARMS.register("third")(Odder)
        rules = {"alarms": Alarms(["third"]), "every": 2}
        model, ids = titan(), batches(12)
        watch = monitor(model, tmp_path / "run", **rules)
        with refused("", BusyError):
            monitor(model, tmp_path / "run")
        assert read_run(tmp_path / "run").state is RunState.RUNNING
        train_steps(model, ids[:4], watch)
        state = watch.state_dict()
        train_steps(model, ids[4:6], watch)
        assert [alarm.step for alarm in watch.alarms] == [6]
        assert read_tables(tmp_path / "run").layers["step"].to_list() == [2, 2, 4, 4, 6, 6]
        watch.close()
        with pytest.raises(TraceExistsError):
            monitor(model, tmp_path / "run")
        continued = {"alarms": Alarms(["third"]), "every": 2, "state": state}
        with monitor(model, tmp_path / "run", **continued) as watch:
            train_steps(model, ids[4:], watch)
    tables = read_tables(tmp_path / "run")
    assert tables.layers["step"].unique().sort().to_list() == [2, 4, 6, 8, 10, 12]
    assert tables.alarms.select("step", "layer", "sentence").rows() == [
        (6, 1, "Step 6, layer 1: three.")
    ]
    assert tables.metrics.columns[:3] == ["step", "loss", "load_cv"]
    assert "moe-lab: Step 6, layer 1: three. Look at the clock." in capsys.readouterr().err
    progress = read_run(tmp_path / "run").progress
    assert (progress.step, progress.alarms) == (12, 1)
    with monitor(titan(), tmp_path / "run", overwrite=True):
        assert read_tables(tmp_path / "run").metrics.is_empty()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"seed": 1}')
    with refused("folder", RunError):
        monitor(titan(), tmp_path / "other", overwrite=True)


def test_scalars_are_numbers_under_names_of_their_own(tmp_path: Path) -> None:
    model = titan()
    with monitor(model, tmp_path, every=1) as watch:
        loss_of(model, batches(1)[0])
        watch.step(loss=torch.tensor([2.5]), tokens=7)
        wrong: dict[str, Any] = {"loss": torch.zeros(2), "phase": "warm", "step": 3, "load_cv": 0.5}
        for name, value in wrong.items():
            with refused(name, ConfigError):
                watch.step(**{name: value})
    assert read_tables(tmp_path).metrics.select("step", "loss", "tokens").rows() == [(1, 2.5, 7)]


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"every": 2.5}, {"on_alarm": "halt"}], ids=lambda item: str(item)
)
def test_an_option_that_does_not_fit_is_refused(options: dict[str, Any]) -> None:
    with refused(*options, ConfigError):
        monitor(titan(), **options)


def test_a_state_of_something_else_is_refused() -> None:
    with refused("state", CheckpointError):
        monitor(titan(), state={"model": {}, "epoch": 3})


def test_a_training_is_finished_where_it_ended_by_itself(tmp_path: Path) -> None:
    """The page of runs says so, with its step."""
    model = titan()
    for name in ("done", "failed"):
        with suppress(ZeroDivisionError), monitor(model, tmp_path / name, every=1) as watch:
            for ids in batches(3):
                loss_of(model, ids)
                watch.step(loss=2.5)
            assert 1 / (name == "done")
    board = Board(open_place(tmp_path))
    assert {run: record.state for run, record in board.runs.items()} == {
        "done": RunState.FINISHED,
        "failed": RunState.INTERRUPTED,
    }
    alone = json.loads(Board(open_place(tmp_path / "done")).changes("", "", View()))["parts"]
    sentence = "done is finished at step 3; its training loss is 2.500. No alarm."
    assert alone["answer"]["sentence"] == sentence
    assert alone["table"]["rows"][0][:4] == ["done", "finished", "3", "2.500"]
    assert alone["curves"]["unit"] == "steps"


def test_an_alarm_can_stop_the_loop() -> None:
    with registries_as_before():
        ALARMS.register("third")(Odder)
        model = titan()
        watch = monitor(model, every=1, on_alarm="stop", alarms=Alarms(["third"]))
        with watch, refused("third", AlarmError):
            train_steps(model, batches(5), watch)
    assert watch.steps == 3


def test_the_committed_measurement_of_its_cost_is_below_one_percent() -> None:
    """``experiments/benchmarks/monitor_cost.py``; docs/guides/trainer.md has its numbers."""
    results = Path(__file__).parents[2] / "experiments" / "benchmarks" / "results"
    rows = {
        row["name"]: row for row in pl.read_parquet(results / "monitor_cost.parquet").to_dicts()
    }
    assert rows["every 10"]["ratio_high"] < 1.01
    assert rows["not observed"]["ratio_low"] < 1 < rows["not observed"]["ratio_high"]
    page = (results.parents[2] / "docs" / "guides" / "trainer.md").read_text()
    for name, digits in (("every 10", 4), ("observed", 3)):
        assert f"{rows[name]['ratio']:.{digits}f} (" in page
