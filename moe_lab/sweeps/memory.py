"""The memory that a run will need: parameters with their gradients and Adam moments, activations of
a micro-batch, logits, the ids of its text, the interpreter.

The constants are measured (docs/scale.md): peaks of resident memory of fresh worker processes,
float32 on a CPU with the compiled experts of `moe_lab.model`. They are upper sides of a fit,
because a run that was admitted and does not fit takes its neighbours with it.
"""

import ctypes
from collections.abc import Hashable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lab.model import DecoderConfig
    from moe_lab.training import RunConfig

INTERPRETER_BYTES = 480 * 2**20
"""Python, torch, polars, the tokenizer: a worker before its first step, and what this adds for
good.
"""
CUDA_CONTEXT_BYTES = 600 * 2**20
PARAMETER_BYTES = 21
"""Weight, gradient and two moments make 16 in float32; taking up a checkpoint holds its tensors
beside the model's (20.4 measured).
"""
AUTOCAST_BYTES = 4
"""A bfloat16 copy of a weight, and of its gradient."""
LOGIT_COPIES = 5
"""Logits, log-probabilities, and the gradients of both and of the loss."""
EVALUATED_TOKEN_BYTES = 2000
"""A row of the trace's token frame while it is made: text, classes, offsets, loss."""
TEXT_COPIES = 2.6
"""The ids of a corpus as stored, those to train on, those of the validation text in 32 bits, and
what checking them takes.
"""
EVALUATION_BATCH = 16
LARGE_PAGES = 1.35
"""Of activations on a CPU: tensors from 2 MB on begin on large pages, and what lies between them is
not always used (``keep_freed_memory``).
"""


def run_memory(run: "RunConfig") -> int:
    """Bytes that a run is expected to need at its peak: of a worker process on the CPU, of the
    device on CUDA (main memory apart).

    A configuration of another trainer may say it itself in ``memory_bytes``; 0, unknown, where it
    does not.
    """
    from moe_lab.text.tokenized_text import stored_bytes

    if not hasattr(run, "grad_accumulation"):
        return int(getattr(run, "memory_bytes", 0))
    return _run_memory(
        run.model,
        run.batch_size // run.grad_accumulation,
        run.seq_length,
        run.eval_tokens or 0,
        run.dtype.value == "bfloat16",
        run.device.startswith("cuda"),
    ) + int(TEXT_COPIES * stored_bytes(run.text) * (not run.device.startswith("cuda")))


@lru_cache(maxsize=4096)
def _run_memory(
    model: Hashable, sequences: int, seq_length: int, eval_tokens: int, autocast: bool, cuda: bool
) -> int:
    from moe_lab.accounting import count

    config: Any = model
    parameters = count(config).total * (PARAMETER_BYTES + AUTOCAST_BYTES * autocast)
    logits = LOGIT_COPIES * config.vocab_size * (1 + (config.mtp.num_modules if config.mtp else 0))
    step = 4 * sequences * seq_length * (_activations(config, seq_length, cuda) + logits)
    evaluation = 4 * EVALUATION_BATCH * seq_length * (3 * config.vocab_size + 20 * config.d_model)
    if cuda:
        return CUDA_CONTEXT_BYTES + parameters + max(step, evaluation)
    work = int(LARGE_PAGES * max(step, evaluation))
    return INTERPRETER_BYTES + parameters + work + EVALUATED_TOKEN_BYTES * eval_tokens


def _activations(model: "DecoderConfig", seq_length: int, cuda: bool) -> int:
    """Floats that a token leaves behind for the backward pass, logits apart."""
    stream, heads = model.d_model, model.num_heads * model.dim_per_head
    attention = 4 * stream + 12 * heads
    if model.sparse_attention is not None:
        chosen = min(model.sparse_attention.top_k, seq_length)
        attention += 2 * model.sparse_attention.num_heads * seq_length + chosen * (
            4 * model.num_heads + 4 * heads
        )
    dense = 4 * stream + 3 * model.dense_width
    layers = model.num_layers + (model.mtp.num_modules if model.mtp else 0)
    ffn = dense * (layers - len(model.moe_layers) + model.num_attentions - model.num_layers)
    if model.moe is not None:
        width = model.moe.router.top_k + model.moe.num_shared_experts
        saved = 3 * model.moe.d_expert + (
            3 * stream if cuda else 0
        )  # the compiled experts of the CPU keep no copy of their inputs
        ffn += len(model.moe_layers) * (
            4 * stream + width * saved + 4 * model.moe.router.num_experts
        )
    tables = model.ngram.num_tables * (1 + len(model.ngram.layers)) if model.ngram else 0
    return attention * (model.num_attentions + layers - model.num_layers) + ffn + tables * stream


def too_large(needs: dict[str, int], room: int) -> str:
    """One line on the runs (name -> bytes) that alone need more than ``room``; empty: every run
    fits.
    """
    names = sorted(
        (name for name, need in needs.items() if need > room), key=lambda name: -needs[name]
    )
    if not names:
        return ""
    others = f" and {len(names) - 1} more" if names[1:] else ""
    more = f"{needs[names[0]] / 1e9:.1f} GB of the {room / 1e9:.1f} GB that runs may take here"
    risk = "starts alone and may run out of memory; try a larger grad_accumulation"
    return f"{names[0]}{others}: expected to need {more}; {risk}"


def give_back_freed() -> None:
    """Return what this process has freed to the system. A worker keeps it within a run
    (``keep_freed_memory``); after a large run, it would hold what the next ones of the sweep were
    admitted on.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
