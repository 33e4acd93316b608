"""The files that a finished run leaves: ``result.json``, the provenance of its trace, the run as
objects.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from moe_lab.accounting import count, flops
from moe_lab.errors import CheckpointError, MoELabError, RunError, expected
from moe_lab.measures import dead_experts, load_cv, max_violation
from moe_lab.model import Decoder
from moe_lab.runs.done_file import check_seal
from moe_lab.runs.layout import CONFIG, DONE, MODEL, RESULT, TOKENIZER, TRACE
from moe_lab.runs.record import parse_object
from moe_lab.text import TokenizedText, Tokenizer
from moe_lab.trace import LayerMeta, TraceMeta, open_trace
from moe_lab.training.checkpoint import load_tensors
from moe_lab.training.config import RATIO_MEANING, RunConfig
from moe_lab.training.evaluate import Evaluation
from moe_lab.versions import versions

PARAMS_MEANING = (
    "all parameters, the embedding included (convention A), MTP modules apart; "
    "active ones without n-gram tables"
)


def trace_meta(config: RunConfig, tokenizer_hash: str, corpus_hash: str) -> TraceMeta:
    """Provenance of a trace of the run ``config`` on some text."""
    assert config.model.moe is not None
    router = config.model.moe.router
    layers = tuple(
        LayerMeta(
            layer=layer,
            num_experts=router.num_experts,
            num_zero_experts=router.num_zero_experts,
            top_k=router.num_slots,
        )
        for layer in config.model.moe_layers
    )
    return TraceMeta(
        model=config.name,
        model_hash=config.hash(),
        tokenizer_hash=tokenizer_hash,
        corpus_hash=corpus_hash,
        seed=config.seed,
        phase="eval",
        layers=layers,
        versions=versions(),
        vocab_size=config.model.vocab_size,
    )


def run_record(
    config: RunConfig,
    text: TokenizedText,
    evaluation: Evaluation,
    metrics: pl.DataFrame,
    seconds: float,
    folder: Path | None,
) -> dict[str, Any]:
    """The content of ``result.json``.

    Parameters and FLOPs come from the configuration, routing figures from the trace in ``folder``.
    """
    parameters, moe = count(config.model), config.model.moe
    tail = metrics.tail(max(1, len(metrics) // 10))
    record: dict[str, Any] = {
        "run": config.hash(),
        "name": config.name,
        "arm": config.arm,
        "ratio": config.ratio,
        "ratio_meaning": RATIO_MEANING,
        "seed": config.seed,
        "total_params": parameters.total,
        "active_params": parameters.active_without_tables(),
        "active_params_min": parameters.active_without_tables("least"),
        "active_params_max": parameters.active_without_tables("most"),
        "params_meaning": PARAMS_MEANING,
        "mtp_params": parameters.mtp,
        "expert_sparsity": 1 - 1 / config.ratio,
        "attention_sparsity": config.model.attention_sparsity(config.seq_length),
        "flops_per_token": flops(
            config.model, context=config.seq_length, phase="train"
        ).training_with_mtp,
        "train_tokens": config.steps * config.tokens_per_step,
        "learning_rate": config.optimizer.lr,
        "eval_tokens": evaluation.num_tokens,
        "eval_documents": evaluation.num_documents,
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "sees_later_tokens": moe is not None and moe.router.sees_later_tokens,
        "train_loss": float(tail["loss"].to_numpy().mean()),
        "seconds": seconds,
        "tokens_per_second": float(metrics["tokens_per_second"].to_numpy().mean()),
        "device": config.device,
        "corpus_hash": text.config.corpus_hash,
        "tokenizer_hash": text.tokenizer.hash,
        "versions": versions(),
    }
    return record | _routing_record(config, folder, record["train_tokens"])


def _routing_record(config: RunConfig, folder: Path | None, train_tokens: int) -> dict[str, Any]:
    """Load and compute on the validation trace: per layer first, then the mean over layers."""
    if folder is None or config.model.moe is None:
        return {}
    router = config.model.moe.router
    trace = open_trace(folder / TRACE)
    layers = trace.routing.group_by("layer").agg(
        mean=pl.col("ffn_count").mean(),
        sd=pl.col("ffn_count").std(ddof=0),
        dropped=pl.col("dropped").cast(pl.Float64).mean() / router.top_k,
    )
    layers = layers.collect()
    real = trace.counts().filter(~pl.col("is_zero")).sort("layer", "expert")
    counts_LE = real["count"].to_numpy().reshape(-1, router.num_experts)
    return {
        "num_experts": router.num_experts,
        "num_zero_experts": router.num_zero_experts,
        "top_k": router.top_k,
        "mean_ffn_count": float(layers["mean"].to_numpy().mean()),
        "sd_ffn_count": float(layers["sd"].to_numpy().mean()),
        "target_ffn_count": config.target_ffn_count,
        "load_cv": float(load_cv(counts_LE).mean()),
        "max_violation": float(max_violation(counts_LE).mean()),
        "dead_experts": float(dead_experts(counts_LE).mean() / router.num_experts),
        "drop_rate": float(layers["dropped"].to_numpy().mean()),
        "tokens_per_expert": train_tokens * (config.target_ffn_count or 0) / router.num_experts,
    }


@dataclass(frozen=True)
class LoadedRun:
    """A finished run as objects; the model is in evaluation mode."""

    folder: Path
    config: RunConfig
    model: Decoder
    tokenizer: Tokenizer


def load_run(folder: Path | str, device: str | torch.device = "cpu") -> LoadedRun:
    """Open the folder of a finished run.

    Raises ``RunError`` or ``CheckpointError``.
    """
    folder = Path(folder)
    if not (folder / DONE).exists():
        begun = (folder / CONFIG).exists()
        hint = "moe-lab sweep run again" if begun else "the folder of one run, runs/<sweep>/<hash>"
        got = f"no file {DONE!r}" if folder.is_dir() else "no such folder"
        raise RunError(expected(f"a finished run in {folder}", got, hint), field="run")
    config = read_config(folder)
    result = finished_record(folder, config)
    model = Decoder(config.model)
    tensors, metadata = load_tensors(folder / MODEL)
    recorded = {"config": config.hash(), "digest": result.get("weights_digest")}
    for name, value in recorded.items():
        if value not in (None, metadata.get(name)):
            got = f"{metadata.get(name)} in {folder / MODEL}"
            raise CheckpointError(
                expected(f"weights of this run ({name} {value})", got), field="weights"
            )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / MODEL} does not fit its {CONFIG}: {error}") from error
    return LoadedRun(folder, config, model.to(device).eval(), Tokenizer.load(folder / TOKENIZER))


def finished_record(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The content of ``result.json`` of a finished run. Raises ``RunError`` if it, or the
    configuration beside it, was changed since, or if it is of another run.
    """
    check_seal(folder)
    result = parse_object(folder / RESULT)
    if result.get("run", config.hash()) != config.hash():
        got = f"{result['run']} in {folder / RESULT}"
        raise RunError(expected(f"the result of run {config.hash()}", got, "another folder"))
    return result


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run's folder was made for. Raises ``RunError``."""
    try:
        return RunConfig.from_dict(parse_object(folder / CONFIG))
    except MoELabError as error:
        raise RunError(f"cannot read {folder / CONFIG}: {error}; try another folder") from error
