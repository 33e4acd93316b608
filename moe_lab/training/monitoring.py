"""``monitor``: how the MoE layers of a model route while any loop trains it, with alarms.

    with monitor(model, "runs/mine", every=20) as watch:
        for batch in batches:
            loss = model(batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.log(watch.step(loss=loss.item()))

``step`` is called once after each optimiser step. Every ``every``-th step is observed: hooks on
the routers count all its forward passes, and nothing is counted in between. The routers are those
that ``moe_lab.trace.capture`` finds (moe_lab, transformers, torchtitan, Megatron, or ``readers``).

Counted are forward passes of training: the model is in training mode and gradients are enabled. A
pass that activation checkpointing repeats in the backward pass is not counted again.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    RunError,
    TraceError,
    TraceExistsError,
    expected,
    require,
)
from moe_lab.files import write_json
from moe_lab.measures import dead_experts, load_cv, max_violation
from moe_lab.routing import Router, Routing
from moe_lab.routing.config import ScoreFunc
from moe_lab.runs.folder_claims import Claim, acquire
from moe_lab.runs.layout import CONFIG, STATUS
from moe_lab.runs.record import ENDED, read_object
from moe_lab.runs.tables import TABLES
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.hooks import Hooks, Pass
from moe_lab.trace.capturing.router_output import Reader, Reading, are_probabilities
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.trace.score_spread import scores_of
from moe_lab.training.alarms import Alarm, Alarms
from moe_lab.training.config import OnAlarm
from moe_lab.training.metrics import MEANS, layer_means
from moe_lab.training.observer import Observer
from moe_lab.training.readings import (
    LayerReading,
    expert_norms,
    ffn_target,
    moved_bias,
    on_cpu,
    parameter_norm,
    reading_of_sums,
    routing_sums,
    selects_by_logits,
)
from moe_lab.training.run_log import RunLog

BIASES = ("expert_bias", "expert_bias_E", "e_score_correction_bias")
"""Names of a selection bias [E], of the router or of the block around it (Megatron, torchtitan,
DeepSeek-V3).
"""
_TOKENS = -4
"""Place of the number of tokens in ``routing_sums``."""
WRITE_SECONDS = 0.5
"""At most so often the files are written."""
BANKS = ("experts", "routed_experts")
"""Names of the experts beside a router."""
SCALARS = (
    "moe/load_cv",
    "moe/load_cv_worst",
    "moe/max_violation",
    "moe/max_violation_worst",
    "moe/dead_experts",
    "moe/entropy",
    "moe/ffn_count",
    "moe/zero_share",
    "moe/tokens",
    "moe/alarms",
)
"""What ``Monitor.step`` returns, whatever the model: docs/guides/trainer.md says what each is."""


def monitor(
    model: nn.Module,
    folder: Path | str | None = None,
    *,
    every: int = 10,
    on_alarm: OnAlarm | str = OnAlarm.RECORD,
    alarms: Alarms | None = None,
    readers: Mapping[str, Reader] | None = None,
    only: str | None = None,
    state: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    group: Any = None,
) -> "Monitor":
    """Observe the routing of a model that is trained.

    Args:
        model: the module whose forward pass is called; DistributedDataParallel around it or not.
        folder: where the tables ``metrics``, ``layers``, ``loads`` and ``alarms`` of a run go
            (docs/training.md); None: nowhere.
        every: steps from one observed step to the next.
        on_alarm: "record", or "stop": ``step`` then raises ``AlarmError``.
        alarms: those to raise; None: all, with their default thresholds.
        readers, only: as for ``capture``, for routers that it does not know.
        state: ``Monitor.state_dict()`` of the checkpoint that the training continues from; what
            the folder holds of later steps is forgotten.
        overwrite: replace the tables of an earlier training in ``folder``.
        group: process group of the ranks that hold the same layers and see other tokens; None: all
            ranks. Their counts are summed, and the first of them writes.

    Raises:
        TraceError: the model has no routers, or some that cannot be read; it names them.
        TraceExistsError: ``folder`` holds the tables of an earlier training.
        RunError: ``folder`` is that of a run of ``train``.
        BusyError: another process writes into ``folder``.
        ConfigError: ``every`` or ``on_alarm`` does not fit.
        CheckpointError: ``state`` is not of ``Monitor.state_dict()``.
    """
    choices = [choice.value for choice in OnAlarm]
    require(on_alarm in choices, " or ".join(choices), repr(on_alarm), field="on_alarm")
    return Monitor(
        model, folder, every, OnAlarm(on_alarm), alarms, readers, only, state, overwrite, group
    )


class Monitor:
    """An open monitor; a context manager that closes itself.

    Attributes:
        steps: optimiser steps so far.
        readings: those of the last observed step, one per layer.
        alarms: all that were raised.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path | str | None,
        every: int,
        on_alarm: OnAlarm,
        alarms: Alarms | None,
        readers: Mapping[str, Reader] | None,
        only: str | None,
        state: Mapping[str, Any] | None,
        overwrite: bool,
        group: Any,
    ) -> None:
        fits = isinstance(every, int) and every >= 1
        require(fits, "every as a whole number of at least 1", every, "every=10", field="every")
        replicas = nn.DataParallel | nn.parallel.DistributedDataParallel
        self.model: nn.Module = model.module if isinstance(model, replicas) else model  # pyright: ignore[reportAttributeAccessIssue]
        self.every, self.group = every, group
        if state and not {"step", "alarms"} <= set(state):
            got = f"the keys {', '.join(map(repr, list(state)[:4]))}"
            what = "state of Monitor.state_dict(), with step and alarms"
            raise CheckpointError(expected(what, got), "state")
        self.steps = int(state["step"]) if state else 0
        self.readings: list[LayerReading] = []
        sites, _ = find_sites(self.model, readers, only)
        named = dict(self.model.named_modules())
        self._layers = [_Layer(site, named) for site in sites]
        first = not _distributed() or torch.distributed.get_rank(group) == 0
        write = folder is not None and first
        self._log = RunLog(Path(folder or "."), every, write=write)
        self._observer = Observer(self._log, on_alarm, first, alarms)
        self._observer.alarms.load_state_dict(state["alarms"] if state else {})
        self._claim = self._open(overwrite) if write else None
        self._lock = threading.Lock()  # replicas of DataParallel run in threads
        self._checked, self._written = False, 0.0
        self._hooks = Hooks(self.model, sites, self._count, ratio=False, wanted=self._wanted)

    @property
    def alarms(self) -> list[Alarm]:
        return self._observer.raised

    def step(self, **scalars: float | Tensor) -> dict[str, float]:
        """Call this once after each optimiser step, on all ranks.

        Args:
            scalars: numbers of your own, such as the loss, for the table ``metrics`` (a tensor of
                one element becomes its number); those of steps that are not observed are not kept.

        Returns:
            The ``SCALARS`` of an observed step; empty after any other step.

        Raises:
            AlarmError: an alarm, with ``on_alarm="stop"``.
            ConfigError: a scalar is no number, or has the name of a column of the monitor's own.
            TraceError: no router ran in an observed step.
        """
        self.steps += 1
        if self.steps % self.every:
            return {}
        numbers = {name: _number(name, value) for name, value in scalars.items()}
        self.readings, zero_share = self._read()
        row = {"step": self.steps, **numbers, **layer_means(self.readings)}
        self._log.add("metrics", row)
        alarms = self._observer.observe(self.readings)
        due = time.monotonic() - self._written > WRITE_SECONDS
        if self._log.write and (alarms or due):
            self._log.flush()
            self._write_status("training")
            self._written = time.monotonic()
        self._observer.stop(alarms)
        return _scalars(self.readings, zero_share, len(self._observer.alarms.active))

    def state_dict(self) -> dict[str, Any]:
        """The step and the state of the alarms, JSON values only, for a checkpoint."""
        return {"step": self.steps, "alarms": self._observer.state_dict()}

    def close(self) -> None:
        """Remove the hooks; write the Parquet files. The training counts as finished."""
        self._end(ENDED)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._end(ENDED if error is None else "stopped")

    def _end(self, state: str) -> None:
        self._hooks.remove()
        if self._claim is not None:
            self._log.finish()
            self._write_status(state)
            self._claim.release()
            self._claim = None

    # --------------------------------------------------------------------------------------------
    # counting

    def _wanted(self) -> bool:
        """Whether the forward pass that begins is to be read: those of a step that is observed,
        and the very first, so that a router that cannot be read raises at once.
        """
        observed = (self.steps + 1) % self.every == 0
        return (
            (observed or not self._checked)
            and self.model.training
            and torch.is_grad_enabled()
            and torch._C._current_graph_task_id() < 0  # else within a backward pass
        )

    @torch.no_grad()
    def _count(self, running: Pass, output: Any) -> None:
        real = running.inputs.real()
        valid = None if real is None else torch.from_numpy(real)
        observed = (self.steps + 1) % self.every == 0
        for place, calls in running.calls.items():
            layer = self._layers[place]
            for reading in layer.site.readings_of_calls(calls):
                sums = layer.sums_of(reading, valid)
                if observed:
                    with self._lock:
                        layer.add(sums)
        self._checked = True

    def _read(self) -> tuple[list[LayerReading], float]:
        """The readings of the step that ends, over all ranks, and the share of slots that
        zero-compute experts have.
        """
        together = _distributed()
        # A layer that did not run on this rank may have run on another.
        ran = [layer for layer in self._layers if together or layer.sums is not None]
        sums = [layer.taken() for layer in ran]
        if together:
            total = torch.cat(sums)
            torch.distributed.all_reduce(total, group=self.group)
            sums = total.cpu().split([len(vector) for vector in sums])
        counted = [(layer, each.cpu()) for layer, each in zip(ran, sums, strict=True)]
        counted = [(layer, each) for layer, each in counted if each[_TOKENS] > 0]
        if not counted:
            names = ", ".join(str(layer.site) for layer in self._layers[:3])
            what = f"routers that ran in step {self.steps} ({names}, ...)"
            hint = "the module that is called in training mode, and before torch.compile runs it"
            raise TraceError(expected(what, "none", hint), field="model")
        readings = [layer.reading(self.steps, each) for layer, each in counted]
        if together:  # norms may be of a rank's own shard; alarms must be the same everywhere
            shared = [readings]
            torch.distributed.broadcast_object_list(shared, group=self.group, group_src=0)
            readings = shared[0]
        slots = sum(float(each[:_TOKENS].sum()) for _, each in counted)
        real = sum(int(reading.counts.sum()) for reading in readings)
        return readings, 1 - real / max(slots, 1.0)

    # --------------------------------------------------------------------------------------------
    # files

    def _open(self, overwrite: bool) -> Claim:
        folder = self._log.folder
        claim = acquire(folder)
        if claim is None:
            what = "a folder that no other process writes into"
            raise BusyError(expected(what, str(folder), "another folder"))
        try:
            old = read_object(folder / CONFIG) if (folder / CONFIG).exists() else {"monitored": ""}
            require(
                "monitored" in old,
                "a folder of its own for a monitor",
                f"another run's: {folder}",
                error=RunError,
                field="folder",
            )
            logs = [table.log for table in TABLES.values() if (folder / table.log).exists()]
            if logs and not self.steps and not overwrite:
                option = "state= from its checkpoint, overwrite=True"
                raise TraceExistsError(f"the tables of an earlier training at {folder}", option)
            self._log.begin(self._log.read(self.steps))
            name = {"name": folder.absolute().name, "monitored": type(self.model).__name__}
            write_json(folder / CONFIG, name | {"every": self.every})
        except BaseException:
            claim.release()
            raise
        return claim

    def _write_status(self, state: str) -> None:
        rows, alarms = self._log.lines["metrics"], self._log.lines["alarms"]
        status = {
            "state": state,
            "step": self.steps,
            "steps": 0,
            "loss": rows[-1].get("loss") if rows else None,
            "alarms": len(alarms),
            "alarm": alarms[-1]["sentence"] if alarms else "",
            "updated_at": time.time(),
        }
        write_json(self._log.folder / STATUS, status)


class _Layer:
    """One router of the model, and what was counted of the running step.

    Attributes:
        sums: ``routing_sums`` of the step so far; None: the router has not run.
    """

    def __init__(self, site: TracedRouter, named: Mapping[str, nn.Module]) -> None:
        self.site = site
        module = site.module
        self.block = named.get(site.name.rpartition(".")[0], module)
        self.own = module if isinstance(module, Router) else None
        self.by_logits = self.own is not None and selects_by_logits(self.own)
        self.are_probabilities: bool | None = None
        self.sums: Tensor | None = None

    def sums_of(self, reading: Reading, valid: Tensor | None) -> Tensor:
        """The ``routing_sums`` of one call; ``valid`` [T] are the tokens that are not padding."""
        indices = reading.indices.long()
        if valid is not None and len(valid) != len(indices):
            valid = None
        if reading.valid is not None:
            valid = reading.valid if valid is None else valid.to(indices.device) & reading.valid
        valid = None if valid is None else valid.to(indices.device)
        scores = self._scores(reading)
        routing = Routing(
            indices,
            indices,
            scores if reading.logits is None else reading.logits,
            scores,
            self.site.num_experts or 0,
            self.site.num_zero_experts,
            valid=valid,
        )
        sums = routing_sums(routing, self.by_logits)
        if reading.spread is not None:
            entropy = reading.spread.entropy.double()
            sums[_TOKENS + 1] = entropy.where(routing.valid_mask(), 0.0).sum()
        return sums

    def add(self, sums: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums.to(self.sums.device)

    def _scores(self, reading: Reading) -> Tensor:
        """[T, E] scores; NaN where the router does not say them."""
        if reading.scores is not None:
            return reading.scores.float()
        if reading.logits is None:
            return torch.full((len(reading.indices), 1), torch.nan, device=reading.indices.device)
        logits = reading.logits.float()
        if self.are_probabilities is None:
            self.are_probabilities = are_probabilities(logits)
        if self.are_probabilities:
            return logits
        return scores_of(logits, self.site.score_func or ScoreFunc.SOFTMAX)

    def taken(self) -> Tensor:
        """The sums of the step, which begin again."""
        sums, self.sums = self.sums, None
        if sums is None:
            size = self.site.num_choices
            if size is None:
                raise TraceError(expected(f"a rank on which {self.site} runs", "one without it"))
            device = next(self.site.module.parameters(), torch.zeros(())).device
            sums = torch.zeros(size - _TOKENS, dtype=torch.float64, device=device)
        return sums

    def reading(self, step: int, sums: Tensor) -> LayerReading:
        """The reading of the step from its sums over all ranks."""
        parameters = list(self.site.module.parameters())  # empty ones: another rank holds them
        norm = parameter_norm(parameters) if all(p.numel() for p in parameters) else None
        bias, norms, norm = on_cpu([self._bias(), self._norms(), norm])
        return reading_of_sums(
            sums,
            step=step,
            layer=self.site.layer,
            sparse_scores=self.own is not None and self.own.facts.sparse_scores,
            ffn_target=None if self.own is None else ffn_target(self.own.config),
            num_zero_experts=self.site.num_zero_experts,
            bias=bias,
            expert_norms=norms,
            router_norm=None if norm is None else float(norm),
        )

    def _bias(self) -> Tensor | None:
        if self.own is not None:
            return moved_bias(self.own)
        places = (self.site.module, self.block)
        values = [getattr(place, name, None) for place in places for name in BIASES]
        bias = next((value for value in values if isinstance(value, Tensor)), None)
        return None if bias is None else bias.detach().float()

    def _norms(self) -> Tensor | None:
        """Of experts that lie beside the router as tensors [E, ...] or as a list of E modules."""
        children = dict(self.block.named_children())
        bank = next((children[name] for name in BANKS if name in children), None)
        if bank is None:
            return None
        experts = self.site.num_experts
        if isinstance(bank, nn.ModuleList):
            matrices = [[p[None] for p in one.parameters() if p.dim() > 1] for one in bank]
            if len(bank) != experts or not all(matrices):
                return None
            return torch.cat([expert_norms(each) for each in matrices])
        stacked = [p for p in bank.parameters() if p.dim() >= 3 and p.shape[0] == experts]
        return expert_norms(stacked) if stacked else None


def _scalars(
    readings: list[LayerReading], zero_share: float, active_alarms: int
) -> dict[str, float]:
    """The ``SCALARS`` of the readings of one step."""
    cv = [float(load_cv(reading.counts)) for reading in readings]
    violation = [float(max_violation(reading.counts)) for reading in readings]
    values = (
        *(fmean(cv), max(cv)),
        *(fmean(violation), max(violation)),
        float(sum(int(dead_experts(reading.counts)) for reading in readings)),
        fmean(reading.entropy for reading in readings),
        fmean(reading.mean_ffn_count for reading in readings),
        zero_share,
        float(max(reading.tokens for reading in readings)),
        float(active_alarms),
    )
    return dict(zip(SCALARS, values, strict=True))


def _number(name: str, value: Any) -> float:
    own = ("step", *MEANS)
    taken = f"{name!r}, a column that the monitor writes"
    require(name not in own, "scalars under other names", taken, f"my_{name}", field=name)
    if isinstance(value, int | float):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(value).__name__} ({str(error).splitlines()[0]})"
        raise ConfigError(expected(f"{name} as a number", got, f"{name}=2.5"), name) from error


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
