"""One run: ``train(config, folder)`` takes a ``RunConfig`` to a finished run directory, from
wherever an earlier attempt stopped.

The files of the folder stand in ``moe_lab.runs.layout``. Nothing in it is trusted without ``done``.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lab import cpu_kernels
from moe_lab.accounting import count
from moe_lab.document_pass import Excerpt, excerpts_of
from moe_lab.errors import MoELabError, RunError, require
from moe_lab.files import (
    json_text,
    remove_temporaries,
    write_json,
    write_text,
)
from moe_lab.model import Decoder
from moe_lab.progress import say
from moe_lab.routing import Routing
from moe_lab.runs import RunStore
from moe_lab.runs.done_file import seal
from moe_lab.runs.layout import (
    CHECKPOINT,
    CONFIG,
    DONE,
    MODEL,
    RESULT,
    STATUS,
    TOKENIZER,
    TRACE,
)
from moe_lab.text import Split, TokenizedDocument, TokenizedText, load_tokens
from moe_lab.training.branching import branch_steps, forget, leave, take_up, tidy
from moe_lab.training.checkpoint import (
    load_checkpoint,
    read_metadata,
    save_checkpoint,
    save_tensors,
    whole_state,
)
from moe_lab.training.config import Dtype, RunConfig
from moe_lab.training.data import Batches
from moe_lab.training.devices import device_of, moved
from moe_lab.training.evaluate import Evaluation, evaluate_together, validation_loss
from moe_lab.training.finished_run import finished_record, read_config, run_record, trace_meta
from moe_lab.training.metrics import gradient_ratios, layer_means
from moe_lab.training.objective import Objective, average_gradients, check_shareable, spread
from moe_lab.training.observer import Observer
from moe_lab.training.optimizer import build_optimizer, clip_gradients, lr_factor
from moe_lab.training.ranks import Parallel, Ranks, join, local_device
from moe_lab.training.readings import LayerReading, read_layers
from moe_lab.training.run_log import Lines, RunLog
from moe_lab.training.tracking import Logger, Tracking, chosen
from moe_lab.versions import versions

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
    *,
    parallel: Parallel | str | None = None,
    loggers: Sequence[Logger | str] = (),
) -> RunResult:
    """Train, evaluate, trace; resume from the checkpoint in ``folder`` if there is one; return at
    once if the run is done.

    On a CPU the result is a function of the configuration and the number of threads, to the bit,
    interruptions included. Under ``torchrun``, or in a process group that the caller has
    initialised, all its ranks train the one run: each must call this with the same arguments and
    see the same folder (docs/training.md).

    Args:
        on_step: called with the metrics row of each logged step, on the first rank.
        cache_dir: of tokenizers and token ids.
        parallel: how several ranks hold the model, "ddp" (also if None) or "fsdp"; no part of the
            run's identity.
        loggers: mirrors of the metrics, or their names in ``tracking.TRACKERS``; if none, those
            that ``MOE_LAB_TRACK`` names.

    Raises:
        ConfigError, CorpusError: the configuration cannot be run, or not on so many ranks.
        CheckpointError: the folder's checkpoint is damaged or of another configuration.
        RunError: the folder cannot be written or belongs to another configuration, the loss is no
            longer finite, or another rank ended.
    """
    folder = Path(folder)
    count(
        config.model
    )  # what the record will ask for at the end is asked for before the first step
    device = local_device(device_of(config.device))
    with join(config, parallel, device) as ranks:
        if (record := ranks.from_first(lambda: _claim(config, folder))) is not None:
            return RunResult(folder, record)
        mirrors = chosen(loggers)
        if ranks.size > 1:  # one rank fills the cache, the others read it
            ranks.from_first(lambda: load_tokens(config.text, cache_dir).tokenizer.vocab_size)
        text = load_tokens(config.text, cache_dir)
        check_text(config, text)
        return _Run(config, folder, text, device, ranks, on_step, mirrors).finish()


def _claim(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """Make the folder this run's; its record if it is done.

    Raises ``RunError`` for a folder of another run.
    """
    if (folder / CONFIG).exists():
        other = read_config(folder).hash()
        require(
            other == config.hash(),
            f"a folder of run {config.hash()}",
            f"run {other} in {folder}",
            "another folder",
            error=RunError,
            field="run",
        )
    else:
        write_json(folder / CONFIG, config.to_dict())
    if (folder / DONE).exists():
        RunStore(folder.parent).tidy([folder.name])
        return finished_record(folder, config)
    remove_temporaries(folder)
    tidy(config, folder)
    return None


class _Run:
    """The moving parts of one run; ``finish`` drives them."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        text: TokenizedText,
        device: torch.device,
        ranks: Ranks,
        on_step: Callable[[dict[str, Any]], None] | None,
        loggers: Sequence[Logger | str],
    ) -> None:
        self.config, self.folder, self.text, self.on_step = config, folder, text, on_step
        self.device, self.ranks, self.loggers = device, ranks, loggers
        check_shareable(config, ranks)
        torch.manual_seed(config.seed)
        self.model = Decoder(config.model).to(self.device)
        self.objective = spread(Objective(self.model, config, ranks), ranks)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.batches = Batches(text.train, config.batch_size, config.seq_length, config.seed)
        self.branches = branch_steps(config)
        self.step = 0
        self.log = RunLog(folder, config.log_every, write=ranks.first)
        self.observer = Observer(self.log, config.on_alarm, ranks.first)
        self.continued: list[dict[str, Any]] = []
        self.seconds = 0.0

    def finish(self) -> RunResult:
        self._resume()
        tracking = Tracking(
            self.loggers if self.ranks.first else (), self.config, self.folder, self.step
        )
        try:
            self._train(tracking)
            record = self._conclude()
            tracking.log(
                self.step,
                {f"validation/{name}": record[name] for name in ("loss", "bits_per_byte")},
            )
        finally:
            tracking.close()
        return RunResult(self.folder, record)

    def _conclude(self) -> dict[str, Any]:
        """Evaluate and write the run's files; the record, on every rank."""
        trace = None
        if self.config.model.moe_layers:
            meta = trace_meta(
                self.config, self.text.tokenizer.hash, self.text.config.corpus_hash or ""
            )
            trace = (self.folder / TRACE, meta)
        self._write_status("evaluating")
        documents, excerpts = self._validation
        evaluation = evaluate_together(
            self.ranks,
            self.model,
            documents,
            self.text.tokenizer,
            seq_length=self.config.seq_length,
            excerpts=excerpts,
            reference_counts=self.text.counts(Split.REFERENCE),
            trace=trace,
            overwrite=True,  # a resumed run evaluates again
        )
        weights = whole_state(self.model, keep=self.ranks.first)
        return self.ranks.from_first(
            lambda: self._write(evaluation, weights, traced=trace is not None)
        )

    def _write(
        self, evaluation: Evaluation | None, weights: dict[str, Tensor], traced: bool
    ) -> dict[str, Any]:
        """What a finished run leaves; ``done`` last."""
        assert evaluation is not None
        self.text.tokenizer.save(self.folder / TOKENIZER)
        digest = save_tensors(self.folder / MODEL, weights, {"config": self.config.hash()})
        validation = {"step": self.step, "loss": evaluation.loss, "tokens": evaluation.num_tokens}
        self.log.add("validation", validation)
        metrics = self.log.finish()
        record = run_record(
            self.config,
            self.text,
            evaluation,
            metrics,
            self.seconds,
            self.folder if traced else None,
        )
        record |= {"dispatch": self._dispatch(), "weights_digest": digest}
        record["alarms"] = Counter(line["kind"] for line in self.log.lines["alarms"])
        if self.continued:
            record["continued"] = self.continued
        if self.config.steps and (ratios := self._gradient_ratios(self.config.steps - 1)):
            record["gradient_ratio"] = [ratio if math.isfinite(ratio) else None for ratio in ratios]
        if self.ranks.parallel is not None:
            record |= {"ranks": self.ranks.size, "parallel": self.ranks.parallel.value}
        write_json(self.folder / RESULT, record)
        self._write_status("finished")
        write_text(self.folder / DONE, seal(self.folder))
        RunStore(self.folder.parent).tidy([self.folder.name])
        forget(self.config, self.folder)
        return record

    def _train(self, tracking: Tracking) -> None:
        self.model.train()
        last_status = 0.0
        first = self.ranks.first
        if first and self._dispatch() == "cpu" and (problem := cpu_kernels.problem()):
            say(f"experts run without compiled code, which takes longer: {problem}")
        if self.step == 0:
            self._validate(tracking)
        while self.step < self.config.steps:
            began = time.perf_counter()
            try:
                row, readings = self._one_step(self._is_logged(self.step + 1))
            except MoELabError as error:
                raise RunError(f"step {self.step + 1} of {self.config.name}: {error}") from error
            self.step += 1
            self.seconds += time.perf_counter() - began
            if row is not None and first:
                self.log.add("metrics", row)
                tracking.log(
                    self.step, {name: value for name, value in row.items() if name != "step"}
                )
                if self.on_step is not None:
                    self.on_step(row)
            alarms = self.observer.observe(readings)
            if alarms or (row and time.monotonic() - last_status > STATUS_SECONDS):
                self.log.flush()
                self._write_status("training")
                last_status = time.monotonic()
            self.observer.stop(alarms)
            self._validate(tracking)
            if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                self.log.flush(lasting=True)
                kept = {
                    "made_by": self._made_by,
                    "continued": self.continued,
                    "alarms": self.observer.state_dict(),
                }
                save_checkpoint(
                    self._checkpoint,
                    self.model,
                    self.optimizer,
                    self.step,
                    self.config.hash(),
                    write=first,
                    metadata={name: json_text(value) for name, value in kept.items()},
                )
            if self.step in self.branches:
                leave(
                    self.config,
                    self.folder,
                    self.model,
                    self.optimizer,
                    self.step,
                    {"tables": self.log.lines, "alarms": self.observer.state_dict()},
                    write=first,
                )

    def _one_step(self, logged: bool) -> tuple[dict[str, Any] | None, list[LayerReading]]:
        """One optimiser step; its metrics row and readings, over all ranks, if it is logged."""
        began = time.perf_counter()
        config, layers = self.config, list(self.model.moe_layers().values())
        lr = config.optimizer.lr * lr_factor(self.step, config.steps, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.ranks.draw_own_noise(config.seed, self.step)
        routings: list[list[Routing]] = [[] for _ in layers]
        language, auxiliary = (
            torch.zeros((), device=self.device),
            torch.zeros((), device=self.device),
        )
        micro_batches = self.ranks.own(moved(self.batches(self.step), self.device))
        for number, micro_batch in enumerate(micro_batches, start=1):
            average_gradients(self.objective, now=number == len(micro_batches))
            nats, balance, micro_routings = self.objective(micro_batch)
            ((nats + balance) / len(micro_batches)).backward()
            language += nats.detach() / len(micro_batches)
            auxiliary += balance.detach() / len(micro_batches)
            for kept, routing in zip(routings, micro_routings, strict=True):
                kept.append(routing)
        grad_norm = clip_gradients(self.model, config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for layer, seen in zip(layers, routings, strict=True):
            layer.router.update(seen)
        if not logged:
            return None, []
        step = self.step + 1
        loss, auxiliary_loss = self.ranks.mean(torch.stack([language, auxiliary])).tolist()
        require(
            math.isfinite(loss),
            "a finite loss",
            loss,
            f"a lower learning rate than {config.optimizer.lr:g}",
            error=RunError,
        )
        row = {
            "step": step,
            "tokens": step * config.tokens_per_step,
            "loss": loss,
            "aux_loss": auxiliary_loss,
            "lr": lr,
            "grad_norm": float(grad_norm),
        }
        ratios = (
            self.ranks.from_first(lambda: self._gradient_ratios(self.step))
            if self._measures_ratios(step)
            else []
        )
        readings = read_layers(
            step,
            self.model.moe_layers(),
            routings,
            gradient_ratios=ratios or None,
            ranks=self.ranks,
        )
        row |= layer_means(readings)
        row["tokens_per_second"] = config.tokens_per_step / (time.perf_counter() - began)
        return row, readings

    def _dispatch(self) -> str | None:
        """The dispatch backend that the run's layers used; its sums are ordered in its own way, so
        the last bits depend on it.
        """
        layers = self.model.moe_layers().values()
        x = torch.empty(1, self.config.model.d_model, device=self.device)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == Dtype.BFLOAT16
        ):
            return next((layer.backend_name(x) for layer in layers), None)

    def _measures_ratios(self, step: int) -> bool:
        """Whether this logged step is the first one since a validation was due."""
        every, logs = self.config.validate_every, self.config.log_every
        return every is not None and step // every > (step - 1) // logs * logs // every

    def _gradient_ratios(self, step: int) -> list[float]:
        """R_g of each layer, where the first rank has the whole model. On half of the first
        micro-batch of the step after ``step`` steps: the graph is kept for two gradients, and the
        run must not need more memory for it than for a step.
        """
        if not self.config.model.moe_layers or self.ranks.parallel is Parallel.FSDP:
            return []
        micro_batch = self.batches(step).chunk(self.config.grad_accumulation)[0]
        half = micro_batch[: -(-len(micro_batch) // 2)].to(self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return gradient_ratios(self.model, self.config, half)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def _resume(self) -> None:
        """Take up the checkpoint, and forget the metrics of steps after it: they will be trained
        again. A run that branches off a longer one begins where that one left its state.
        """
        lines: Lines = {}

        def look() -> bool:
            """Whether there is a checkpoint to go on from; the first rank keeps its tables."""
            before = self._lines_before_checkpoint()
            lines.update(before or {})
            return before is not None

        if self.ranks.from_first(look):
            self.step = load_checkpoint(
                self._checkpoint, self.model, self.optimizer, self.config.hash()
            )
            self._note_continuation()
            alarms = json.loads(read_metadata(self._checkpoint).get("alarms", "{}"))
        else:
            self.step, kept = take_up(self.config, self.folder, self.model, self.optimizer)
            lines, alarms = kept.get("tables", {}), kept.get("alarms", {})
        self.observer.alarms.load_state_dict(alarms)
        require(
            int(self.ranks.total(torch.tensor(self.step))) == self.step * self.ranks.size,
            "the same checkpoint on all ranks",
            f"others than step {self.step}",
            "a folder that all ranks share",
            error=RunError,
        )
        self.log.begin(lines)

    def _lines_before_checkpoint(self) -> Lines | None:
        """The tables up to the checkpoint; None without a checkpoint, or if a power cut has lost
        some of the metrics: then the run begins again.
        """
        if not self._checkpoint.exists():
            return None
        step = int(read_metadata(self._checkpoint).get("step", 0))
        lines = self.log.read(step)
        rows = {row["step"]: row for row in lines["metrics"]}
        logged = [number for number in range(1, step + 1) if self._is_logged(number)]
        if missing := [number for number in logged if number not in rows]:
            say(f"{self.folder} lost the metrics of step {missing[0]}: the run begins again")
            return None
        # The last one is that of the evaluation, which a resumed run does again.
        lines["validation"] = [
            line for line in lines["validation"] if line["step"] < self.config.steps
        ]
        return lines

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps

    def _validate(self, tracking: Tracking) -> None:
        """Record the validation loss where the configuration asks for it."""
        every = self.config.validate_every
        if every is None or self.step % every or self.step == self.config.steps:
            return  # the last one is that of the finished run
        documents, excerpts = self._validation
        loss, tokens = validation_loss(
            self.ranks,
            self.model,
            documents,
            seq_length=self.config.seq_length,
            excerpts=excerpts,
        )
        self.log.add("validation", {"step": self.step, "loss": loss, "tokens": tokens})
        tracking.log(self.step, {"validation/loss": loss})
        if self.ranks.first and self.on_step is not None:  # somebody looks at the steps
            say(f"step {self.step}: validation loss {loss:.4f} nats/token")

    @cached_property
    def _validation(self) -> tuple[list[TokenizedDocument], list[Excerpt]]:
        """The documents that the run is judged on, and the parts of them that are read."""
        documents = self.text.documents(Split.VALIDATION)
        lengths = [len(document.ids) for document in documents]
        config = self.config
        return documents, excerpts_of(lengths, config.eval_excerpt_tokens, config.eval_tokens)

    @cached_property
    def _made_by(self) -> dict[str, Any]:
        return versions() | {"dispatch": self._dispatch()}

    def _note_continuation(self) -> None:
        """Say, and record, that the steps from here on are made by other versions or another
        dispatch backend than those before: the numbers may differ in the last bits.
        """
        metadata = read_metadata(self._checkpoint)
        before, now = json.loads(metadata.get("made_by", "{}")), self._made_by
        self.continued = json.loads(metadata.get("continued", "[]"))
        changed = {
            name: [before[name], now.get(name)] for name in before if before[name] != now.get(name)
        }
        if changed:
            self.continued.append({"step": self.step, "changed": changed})
            if self.ranks.first:
                words = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
                place = f"{self.config.name} continues at step {self.step}"
                say(f"{place} under other versions: {words}")

    def _write_status(self, state: str) -> None:
        if not self.ranks.first:
            return
        rows, alarms = self.log.lines["metrics"], self.log.lines["alarms"]
        last = rows[-1] if rows else {}
        write_json(
            self.folder / STATUS,
            {
                "state": state,
                "step": self.step,
                "steps": self.config.steps,
                "loss": last.get("loss"),
                "tokens_per_second": last.get("tokens_per_second"),
                "alarms": len(alarms),
                "alarm": alarms[-1]["sentence"] if alarms else "",
                "updated_at": time.time(),
            },
        )


def check_text(config: RunConfig, text: TokenizedText) -> None:
    """Raise ``ConfigError`` or ``CorpusError`` if ``config`` cannot be trained on ``text``."""
    vocab_size = text.tokenizer.vocab_size
    require(
        vocab_size == config.model.vocab_size,
        f"model.vocab_size equal to the tokenizer's {vocab_size}",
        config.model.vocab_size,
        field="model.vocab_size",
    )
    Batches(text.train, config.batch_size, config.seq_length, config.seed)
