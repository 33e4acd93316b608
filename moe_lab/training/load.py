"""A finished run as objects: its configuration, its trained model and its tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_lab.errors import CheckpointError, MoELabError, RunError, expected
from moe_lab.model import Decoder
from moe_lab.text import Tokenizer
from moe_lab.training.checkpoint import load_tensors
from moe_lab.training.config import RunConfig


@dataclass(frozen=True)
class LoadedRun:
    folder: Path
    config: RunConfig
    model: Decoder
    tokenizer: Tokenizer


def load_run(folder: Path | str, device: str | torch.device = "cpu") -> LoadedRun:
    """Open a run directory that has ``done``; the model is in evaluation mode.

    Raises ``RunError`` or ``CheckpointError``.
    """
    folder = Path(folder)
    if not (folder / "done").exists():
        hint = (
            "moe-lab sweep run again"
            if (folder / "config.json").exists()
            else "the folder of one run, runs/<sweep>/<hash>"
        )
        raise RunError(expected(f"a finished run in {folder}", "no file 'done'", hint))
    try:
        config = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, MoELabError) as error:
        raise RunError(f"cannot read {folder / 'config.json'}: {error}") from error
    model = Decoder(config.model)
    tensors, _ = load_tensors(folder / "model.safetensors")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / 'model.safetensors'} does not fit its config.json: {error}"
        ) from error
    return LoadedRun(
        folder, config, model.to(device).eval(), Tokenizer.load(folder / "tokenizer.json")
    )
