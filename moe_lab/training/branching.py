"""One long run, several token budgets: the shorter ones branch off it where they begin to decay
(warm-up-stable-decay, 2404.06395).

Runs that share ``RunConfig.budgets`` warm up alike and keep the peak learning rate until their own
decay, so up to there the state of a shorter run is the state of the longest one, to the bit. The
longest leaves its state at those steps in ``trunks/`` beside its folder; a shorter run takes it up
if it is there, and removes it when done; it trains from the beginning if it is not. Either way its
numbers are the same.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_lab.errors import CheckpointError
from moe_lab.files import (
    content_hash,
    json_text,
    parse_json,
    read_regular,
    remove_temporaries,
    write_text,
)
from moe_lab.runs.layout import TRUNKS
from moe_lab.training.checkpoint import load_checkpoint, save_checkpoint
from moe_lab.training.config import RunConfig

_NO_PART = ("name", "arm", "train_tokens", "eval_tokens", "eval_excerpt_tokens", "checkpoint_every")
"""Fields that do not decide the state before the decay."""


def branch_steps(config: RunConfig) -> tuple[int, ...]:
    """The steps after which shorter budgets leave the longest run; none for any other run."""
    if not config.budgets or config.train_tokens != config.budgets[-1]:
        return ()
    return tuple(sorted({config.decay_step(tokens) for tokens in config.budgets[:-1]}))


def trunk_hash(config: RunConfig) -> str:
    """A hash of what all runs of one family share until they decay."""
    evaluated = ("eval_tokens", "eval_excerpt_tokens") if config.validate_every else ()
    values = config.to_dict()
    return content_hash(
        {name: values[name] for name in values if name not in _NO_PART or name in evaluated}
    )


def _path(config: RunConfig, folder: Path, step: int) -> Path:
    return folder.parent / TRUNKS / f"{trunk_hash(config)}-{step}.safetensors"


def leave(
    config: RunConfig,
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    kept: dict[str, Any],
    *,
    write: bool = True,
) -> None:
    """Save the state after ``step`` steps for the shorter budget that branches off here, and what
    else the run has ``kept``: the tables so far and the state of the alarms, as JSON values. One of
    several ranks writes.
    """
    path = _path(config, folder, step)
    if write:
        write_text(path.with_suffix(".json"), json_text(kept))
    save_checkpoint(path, model, optimizer, step, trunk_hash(config), write=write)


def tidy(config: RunConfig, folder: Path) -> None:
    """Remove unfinished files that a killed attempt of the longest run left among the trunks."""
    if branch_steps(config):
        remove_temporaries(folder.parent / TRUNKS, f"{trunk_hash(config)}-*")


def take_up(
    config: RunConfig, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Steps done, and what the longer run has kept, of the trunk that a shorter run begins from;
    (0, {}) if there is no complete trunk.
    """
    if not config.budgets or config.train_tokens == config.budgets[-1]:
        return 0, {}
    path = _path(config, folder, config.decay_step(config.train_tokens))
    if path.exists():
        with suppress(CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError):
            # A list, not an object, is the metrics alone, of an older version.
            kept = dict(parse_json(read_regular(path.with_suffix(".json"))))
            tables = kept["tables"].items()
            kept["tables"] = {name: [dict(line) for line in lines] for name, lines in tables}
            return load_checkpoint(path, model, optimizer, trunk_hash(config)), kept
    return 0, {}


def forget(config: RunConfig, folder: Path) -> None:
    """Remove the state that a finished shorter run began from: weights and moments of every long
    run would fill a disk.
    """
    if config.budgets and config.train_tokens != config.budgets[-1]:
        path = _path(config, folder, config.decay_step(config.train_tokens))
        for leftover in (path, path.with_suffix(".json")):
            leftover.unlink(missing_ok=True)
