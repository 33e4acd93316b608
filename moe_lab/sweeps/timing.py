"""The time that a run will take: a few timed steps of each distinct shape on one thread,
extrapolated; timings are kept between plans.
"""

import platform
import tempfile
import time
from collections.abc import Hashable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from moe_lab.files import content_hash, default_cache_dir, write_text

if TYPE_CHECKING:
    from moe_lab.text import TextConfig
    from moe_lab.training import RunConfig

TIMED_STEPS = 4
TIMED_SECONDS = 15.0
"""A shape is timed for this many steps after its first, fewer once this time is over."""


def run_minutes(runs: "Iterable[RunConfig]", cache_dir: Path | None = None) -> list[float]:
    """Minutes of each run on one thread: its training steps, and the validation pass at a third of
    a training token's cost (forward only).

    Timings are cached per shape and machine in ``cache_dir`` (default: MOE_LAB_CACHE, else
    ``~/.cache/moe_lab``).
    """
    cache = (cache_dir or default_cache_dir()) / "timings"
    timings: dict[Hashable, float] = {}
    lengths: dict[TextConfig, list[int]] = {}
    minutes = []
    for run in runs:
        if run.text not in lengths:
            lengths[run.text] = _validation_lengths(run.text)
        shape = _shape(run)
        if shape not in timings:
            timings[shape] = _seconds_per_token(run, cache)
        judged = (
            sum(lengths[run.text])
            if run.eval_tokens is None
            else min(run.eval_tokens, sum(lengths[run.text]))
        )
        minutes.append(timings[shape] * (run.steps * run.tokens_per_step + judged / 3) / 60)
    return minutes


def _shape(run: "RunConfig") -> tuple[Any, ...]:
    """What the time of a step depends on."""
    return (
        run.model,
        run.batch_size,
        run.seq_length,
        run.grad_accumulation,
        run.device,
        run.dtype.value,
    )


def _validation_lengths(text: "TextConfig") -> list[int]:
    """Tokens of each validation document."""
    from moe_lab.text import Split, load_tokens

    return [len(document.ids) for document in load_tokens(text).documents(Split.VALIDATION)]


def _seconds_per_token(run: "RunConfig", cache: Path) -> float:
    import torch

    model, *rest = _shape(run)
    key = content_hash(
        [model.to_dict(), *rest, torch.__version__, platform.node(), platform.machine()]
    )
    path = cache / f"{key}.txt"
    if path.exists():
        return float(path.read_text())
    seconds = _seconds_per_step(run) / run.tokens_per_step
    write_text(path, repr(seconds))
    return seconds


class _EnoughError(Exception):
    """Ends a timed training from inside its step callback."""


def _seconds_per_step(run: "RunConfig") -> float:
    """Median over the steps after the first, which also pays for memory and kernels that later ones
    reuse.
    """
    import torch

    from moe_lab.training import train

    # A worker has one thread, so its processor time is its wall time, and other load on this
    # machine does not count.
    clock = time.process_time if run.device == "cpu" else time.perf_counter
    ticks: list[float] = []

    def tick(_: dict[str, Any]) -> None:
        ticks.append(clock())
        if len(ticks) > TIMED_STEPS or (len(ticks) > 1 and ticks[-1] - ticks[0] > TIMED_SECONDS):
            raise _EnoughError

    short = run.replace(
        train_tokens=run.tokens_per_step * (TIMED_STEPS + 2),
        budgets=(),
        log_every=1,
        checkpoint_every=10 * TIMED_STEPS,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="moe-lab-timing-") as folder,
            torch.random.fork_rng(devices=[]),
        ):
            train(short, folder, on_step=tick)
    except _EnoughError:
        pass
    finally:
        torch.set_num_threads(threads)
    return median(later - earlier for earlier, later in pairwise(ticks))
