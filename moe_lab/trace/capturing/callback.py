"""``RoutingCallback``: how a model routes while a transformers ``Trainer`` trains it: few scalars
to the log, matrices to files.

Layer times expert makes thousands of series (48 x 128), which no dashboard holds; so eight keys are
logged, means and extremes over layers, and the counts [layers, experts] of each logging step go to
``<folder>/counts-<step>.npz``. Definitions: load CV and MaxVio of the real experts per layer (arXiv
2408.15664), then the mean or the worst over layers. Padding takes no part.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moe_lab.errors import TraceExistsError
from moe_lab.files import atomic_path
from moe_lab.measures import dead_experts, load_cv, max_violation
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.hooks import Hooks, Pass
from moe_lab.trace.capturing.traced_router import TracedRouter

if TYPE_CHECKING:
    from transformers import TrainerCallback as _Base
else:
    try:
        from transformers import TrainerCallback as _Base
    except ImportError:
        _Base = object


class RoutingCallback(_Base):
    """A ``TrainerCallback`` that counts the training passes (evaluation is left out) and logs when
    the trainer logs.

    Args:
        folder: where the matrices go.
        overwrite: replace the matrices of an earlier training there. A training that goes on from a
            checkpoint replaces them anyway.
        readers, only: as for ``capture``.

    Logged: moe/load_cv, moe/max_violation, moe/dead_experts, moe/entropy (of a token's scores, in
    nats), moe/load_cv_worst, moe/max_violation_worst, moe/zero_share, moe/tokens; the same for
    every model.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        readers: Any = None,
        only: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder, self._overwrite = Path(folder), overwrite
        self._readers, self._only = readers, only
        self._hooks: Hooks | None = None
        self._sites: list[TracedRouter] = []
        self._begin()

    def _begin(self) -> None:
        """Forget what was counted. Entropy is a sum and a number of tokens per layer."""
        self._counts = [np.zeros(site.num_choices or 0, dtype=np.int64) for site in self._sites]
        self._entropy = np.zeros((len(self._sites), 2))
        self._tokens = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Find the routers of the model and begin to count.

        Raises ``TraceExistsError`` where the folder holds the matrices of an earlier training.
        """
        assert model is not None
        starts = not self._overwrite and state.global_step == 0
        if starts and any(self.folder.glob("counts-*.npz")):
            raise TraceExistsError(f"the counts of an earlier training at {self.folder}")
        inner = (
            model.module
            if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
            else model
        )
        self._model = inner
        self._sites, _ = find_sites(inner, self._readers, self._only)
        self._begin()
        self._hooks = Hooks(inner, self._sites, self._count, ratio=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the scalars to what is logged, write the counts since the last time, and start again
        from zero.

        All ranks are added up.
        """
        if not self._sites or not self._tokens:
            return
        self._add_ranks()
        if state.is_world_process_zero:
            if logs is not None:
                logs.update(self.scalars())
            width = max(map(len, self._counts))
            table = np.stack([np.pad(counts, (0, width - len(counts))) for counts in self._counts])
            layers = np.array([site.layer for site in self._sites])
            with (
                atomic_path(self.folder / f"counts-{state.global_step}.npz") as path,
                open(path, "wb") as file,
            ):
                np.savez_compressed(
                    file, counts=table, layers=layers, tokens=self._tokens, step=state.global_step
                )
        self._begin()

    def scalars(self) -> dict[str, float]:
        """The logged numbers of the passes since the last log."""
        loads = [
            counts[: site.num_experts].astype(np.float64)
            for counts, site in zip(self._counts, self._sites, strict=True)
        ]
        cv = [float(load_cv(load)) for load in loads]
        violation = [float(max_violation(load)) for load in loads]
        slots = sum(int(counts.sum()) for counts in self._counts)
        entropy = self._entropy[self._entropy[:, 1] > 0]
        return {
            "moe/load_cv": float(np.mean(cv)),
            "moe/max_violation": float(np.mean(violation)),
            "moe/dead_experts": float(sum(dead_experts(load) for load in loads)),
            "moe/entropy": float((entropy[:, 0] / entropy[:, 1]).mean())
            if len(entropy)
            else float("nan"),
            "moe/load_cv_worst": max(cv),
            "moe/max_violation_worst": max(violation),
            "moe/zero_share": 1 - sum(float(load.sum()) for load in loads) / max(slots, 1),
            "moe/tokens": float(self._tokens),
        }

    def _count(self, running: Pass, output: Any) -> None:
        if not self._model.training or running.inputs.shape is None:
            return
        real = running.inputs.real()
        keep = None if real is None else torch.from_numpy(np.flatnonzero(real))
        tokens = 0
        for place, site in enumerate(self._sites):
            for call in running.calls.get(place, []):
                reading = site.read_call(call)
                if site.num_experts is None and reading.num_choices is not None:
                    site.num_experts = reading.num_choices - site.num_zero_experts
                    self._counts[place] = np.zeros(reading.num_choices, dtype=np.int64)
                if real is not None and len(real) == len(reading.indices):
                    reading = reading.rows(keep)
                ids, experts = reading.indices, len(self._counts[place])
                tokens = len(ids)
                counts = torch.bincount(ids[ids >= 0].reshape(-1), minlength=experts)
                self._counts[place] += counts.cpu().numpy()
                if reading.has_scores:
                    entropy = reading.spread_under(site.score_func).entropy
                    self._entropy[place] += (float(entropy.double().sum()), tokens)
        self._tokens += tokens

    def _add_ranks(self) -> None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, (self._counts, self._entropy, self._tokens))
        counts, entropy, tokens = zip(*parts, strict=True)
        self._counts = [np.sum(layer, axis=0) for layer in zip(*counts, strict=True)]
        self._entropy, self._tokens = np.sum(entropy, axis=0), sum(tokens)
