"""One run: ``train(config, folder)`` takes a ``RunConfig`` to a finished run directory, from wherever an earlier attempt stopped.

The folder holds ``config.json``, ``status.json`` (live), ``metrics.jsonl`` (live) and ``metrics.parquet``, ``checkpoint.safetensors``
(while it trains), ``model.safetensors``, ``tokenizer.json``, ``trace/``, ``result.json`` and, written last, ``done``. Nothing in it is
trusted without ``done``.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from moe_lab.errors import ConfigError, MoELabError, RunError, expected
from moe_lab.files import atomic_path, write_json, write_text
from moe_lab.model import Decoder
from moe_lab.routing import Routing
from moe_lab.routing.losses import load_balancing_loss, z_loss
from moe_lab.text import Split, TokenizedText, load_tokens
from moe_lab.training.branching import branch_steps, forget, leave, take_up
from moe_lab.training.checkpoint import load_checkpoint, save_checkpoint, save_tensors
from moe_lab.training.config import Dtype, RunConfig
from moe_lab.training.data import Batches
from moe_lab.training.evaluate import evaluate, excerpts_of
from moe_lab.training.metrics import routing_metrics
from moe_lab.training.optimizer import build_optimizer, clip_gradients, lr_factor
from moe_lab.training.record import run_record, trace_meta

STATUS_SECONDS = 0.5


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and the content of ``result.json``."""

    folder: Path
    record: dict[str, Any]


def train(
    config: RunConfig,
    folder: Path | str,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    cache_dir: Path | None = None,
) -> RunResult:
    """Train, evaluate, trace; resume from the checkpoint in ``folder`` if there is one; return at once if the run is done.

    On a CPU the result is a function of the configuration and the number of threads, to the bit, interruptions included.

    Args:
        on_step: called with the metrics row of each logged step.
        cache_dir: of tokenizers and token ids.

    Raises:
        ConfigError, CorpusError: the configuration cannot be run.
        CheckpointError: the folder's checkpoint is damaged or of another configuration.
        RunError: the folder cannot be written or belongs to another configuration, or the loss is no longer finite.
    """
    folder = Path(folder)
    _claim(config, folder)
    if (folder / "done").exists():
        return RunResult(folder, json.loads((folder / "result.json").read_text()))
    text = load_tokens(config.text, cache_dir)
    if text.tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(expected(f"model.vocab_size equal to the tokenizer's {text.tokenizer.vocab_size}", config.model.vocab_size))
    return _Run(config, folder, text, on_step).finish()


def _claim(config: RunConfig, folder: Path) -> None:
    path = folder / "config.json"
    if path.exists():
        try:
            found = RunConfig.from_dict(json.loads(path.read_text())).hash()
        except (ValueError, MoELabError) as error:
            raise RunError(f"cannot read {path}: {error}; try another folder") from error
        if found != config.hash():
            raise RunError(expected(f"a folder of run {config.hash()}", f"run {found} in {folder}", "another folder"))
        return
    write_json(path, config.to_dict())


class _Run:
    """The moving parts of one run; ``finish`` drives them."""

    def __init__(self, config: RunConfig, folder: Path, text: TokenizedText, on_step: Callable[[dict[str, Any]], None] | None) -> None:
        self.config, self.folder, self.text, self.on_step = config, folder, text, on_step
        self.device = _device(config.device)
        torch.manual_seed(config.seed)
        self.model = Decoder(config.model).to(self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.batches = Batches(text.train, config.batch_size, config.seq_length, config.seed)
        self.branches = branch_steps(config)
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0

    def finish(self) -> RunResult:
        self._resume()
        self._train()
        trace = None
        if self.config.model.moe_layers:
            meta = trace_meta(self.config, self.text.tokenizer.hash, self.text.config.corpus_hash or "")
            trace = (self.folder / "trace", meta)
        self._write_status("evaluating")
        documents = self.text.documents(Split.VALIDATION)
        lengths = [len(document.ids) for document in documents]
        evaluation = evaluate(
            self.model,
            documents,
            self.text.tokenizer,
            seq_length=self.config.seq_length,
            excerpts=excerpts_of(lengths, self.config.eval_excerpt_tokens, self.config.eval_tokens),
            reference_counts=self.text.counts(Split.REFERENCE),
            trace=trace,
        )
        self.text.tokenizer.save(self.folder / "tokenizer.json")
        save_tensors(self.folder / "model.safetensors", self.model.state_dict(), {"config": self.config.hash()})
        metrics = pl.DataFrame(self.rows, infer_schema_length=None)
        with atomic_path(self.folder / "metrics.parquet") as path:
            metrics.write_parquet(path)
        record = run_record(self.config, self.text, evaluation, metrics, self.seconds, self.folder if trace else None)
        record["dispatch"] = self._dispatch()
        write_json(self.folder / "result.json", record)
        self._write_status("finished")
        write_text(self.folder / "done", "")
        self._checkpoint.unlink(missing_ok=True)
        forget(self.config, self.folder)
        return RunResult(self.folder, record)

    def _train(self) -> None:
        self.model.train()
        last_status = 0.0
        pending: list[dict[str, Any]] = []
        while self.step < self.config.steps:
            began = time.perf_counter()
            logged = (self.step + 1) % self.config.log_every == 0 or self.step + 1 == self.config.steps
            try:
                row = self._one_step(logged)
            except MoELabError as error:
                raise RunError(f"step {self.step + 1} of {self.config.name}: {error}") from error
            self.step += 1
            self.seconds += time.perf_counter() - began
            if row is not None:
                pending.append(row)
                self.rows.append(row)
                if self.on_step is not None:
                    self.on_step(row)
                if time.monotonic() - last_status > STATUS_SECONDS:
                    self._append(pending)
                    self._write_status("training")
                    last_status = time.monotonic()
            if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                self._append(pending)
                save_checkpoint(self._checkpoint, self.model, self.optimizer, self.step, self.config.hash())
            if self.step in self.branches:
                leave(self.config, self.folder, self.model, self.optimizer, self.step, self.rows)

    def _one_step(self, logged: bool) -> dict[str, Any] | None:
        """One optimiser step; its metrics row if this step is logged."""
        began = time.perf_counter()
        config, layers = self.config, list(self.model.moe_layers().values())
        lr = config.optimizer.lr * lr_factor(self.step, config.steps, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        routings: list[list[Routing]] = [[] for _ in layers]
        language, auxiliary = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for micro_batch in self.batches(self.step).to(self.device).chunk(config.grad_accumulation):
            nats, balance, found = self._forward(micro_batch)
            ((nats + balance) / config.grad_accumulation).backward()
            language += nats.detach() / config.grad_accumulation
            auxiliary += balance.detach() / config.grad_accumulation
            for kept, routing in zip(routings, found, strict=True):
                kept.append(routing.detach())
        grad_norm = clip_gradients(self.model, config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for layer, seen in zip(layers, routings, strict=True):
            layer.router.update(seen)
        if not logged:
            return None
        loss = float(language)
        if not math.isfinite(loss):
            raise RunError(expected("a finite loss", loss, f"a lower learning rate than {config.optimizer.lr:g}"))
        row = {
            "step": self.step + 1,
            "tokens": (self.step + 1) * config.tokens_per_step,
            "loss": loss,
            "aux_loss": float(auxiliary),
            "lr": lr,
            "grad_norm": float(grad_norm),
        }
        row |= {name: float(value) for name, value in routing_metrics(routings).items()}
        return row | {"tokens_per_second": config.tokens_per_step / (time.perf_counter() - began)}

    def _forward(self, batch: Tensor) -> tuple[Tensor, Tensor, list[Routing]]:
        """Language-model loss, weighted auxiliary losses, and the routings of one micro-batch."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == Dtype.BFLOAT16):
            output = self.model(batch[:, :-1], batch[:, 1:])
        assert output.loss is not None
        auxiliary = torch.zeros((), device=self.device)
        for routing in output.routings:
            auxiliary = auxiliary + self.config.router_aux_loss_coef * load_balancing_loss(routing)
            auxiliary = auxiliary + self.config.router_z_loss_coef * z_loss(routing)
            for own in routing.losses.values():
                auxiliary = auxiliary + self.config.router_own_loss_coef * own
        auxiliary = auxiliary / max(len(output.routings), 1)
        for part in output.losses.values():
            auxiliary = auxiliary + part
        return output.loss, auxiliary, output.routings

    def _dispatch(self) -> str | None:
        """The dispatch backend that the run's layers used; its sums are ordered in its own way, so the last bits depend on it."""
        layers = self.model.moe_layers().values()
        x = torch.empty(1, self.config.model.d_model, device=self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == Dtype.BFLOAT16):
            return next((layer.backend_name(x) for layer in layers), None)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _resume(self) -> None:
        """Take up the checkpoint, and forget the metrics of steps after it: they will be trained again. A run that branches off a longer
        one begins where that one left its state."""
        log = self.folder / "metrics.jsonl"
        if self._checkpoint.exists():
            self.step = load_checkpoint(self._checkpoint, self.model, self.optimizer, self.config.hash())
            lines = log.read_text().splitlines() if log.exists() else []
            self.rows = [row for row in map(_parse, lines) if row is not None and row["step"] <= self.step]
        else:
            self.step, self.rows = take_up(self.config, self.folder, self.model, self.optimizer)
        write_text(log, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _append(self, pending: list[dict[str, Any]]) -> None:
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                log.writelines(json.dumps(row) + "\n" for row in pending)
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror}; try another folder or free some space") from error
        pending.clear()

    def _write_status(self, state: str) -> None:
        last = self.rows[-1] if self.rows else {}
        write_json(
            self.folder / "status.json",
            {
                "state": state,
                "step": self.step,
                "steps": self.config.steps,
                "loss": last.get("loss"),
                "tokens_per_second": last.get("tokens_per_second"),
                "updated_at": time.time(),
            },
        )


def _parse(line: str) -> dict[str, Any] | None:
    """A metrics row, or None for a line cut short by a kill."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(expected("a device that torch can use", f"{name!r} ({str(error).splitlines()[0]})", "cpu")) from error
    return device
