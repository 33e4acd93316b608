"""``RoutingCallback``: how a model routes while a transformers ``Trainer`` trains it: few scalars
to the log, matrices to files.

Layer times expert makes thousands of series (48 x 128), which no dashboard holds; so at most ``2 *
top_k`` keys are logged, means and extremes over layers, and the counts [layers, experts] of each
logging step go to ``<folder>/counts-<step>.npz``. Definitions: load CV and MaxVio of the real
experts per layer (arXiv 2408.15664), then the mean or the worst over layers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moe_lab.files import atomic_path
from moe_lab.measures import dead_experts, load_cv, max_violation
from moe_lab.routing.config import ScoreFunc
from moe_lab.trace.capturing.find_routers import Site, find_sites
from moe_lab.trace.capturing.hooks import Hooks, Pass
from moe_lab.trace.capturing.recorder import spread_of_reading
from moe_lab.trace.capturing.router_output import as_reading

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
        readers, only: as for ``capture``.

    Logged, the first ``2 * top_k`` of: moe/load_cv, moe/max_violation, moe/dead_experts,
    moe/entropy, moe/load_cv_worst, moe/max_violation_worst, moe/zero_share, moe/tokens.
    """

    def __init__(self, folder: Path | str, *, readers: Any = None, only: str | None = None) -> None:
        self.folder = Path(folder)
        self._readers, self._only = readers, only
        self._hooks: Hooks | None = None
        self._sites: list[Site] = []
        self._counts: list[np.ndarray] = []
        self._entropy: list[float] = []
        self._tokens = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Find the routers of the model and begin to count."""
        assert model is not None
        inner = (
            model.module
            if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
            else model
        )
        self._model = inner
        self._sites, _ = find_sites(inner, self._readers, self._only)
        self._counts = [np.zeros(site.num_choices or 0, dtype=np.int64) for site in self._sites]
        self._hooks = Hooks(inner, self._sites, self._count, ratio=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the scalars to what is logged, write the counts since the last time, and begin anew.

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
        self._counts = [np.zeros_like(counts) for counts in self._counts]
        self._entropy, self._tokens = [], 0

    def scalars(self) -> dict[str, float]:
        """At most ``2 * top_k`` numbers of the passes since the last log."""
        loads = [
            counts[: site.num_experts].astype(np.float64)
            for counts, site in zip(self._counts, self._sites, strict=True)
        ]
        cv = [float(load_cv(load)) for load in loads]
        violation = [float(max_violation(load)) for load in loads]
        slots = sum(int(counts.sum()) for counts in self._counts)
        every = {
            "moe/load_cv": float(np.mean(cv)),
            "moe/max_violation": float(np.mean(violation)),
            "moe/dead_experts": float(sum(dead_experts(load) for load in loads)),
            "moe/entropy": float(np.mean(self._entropy)) if self._entropy else float("nan"),
            "moe/load_cv_worst": max(cv),
            "moe/max_violation_worst": max(violation),
            "moe/zero_share": 1 - sum(float(load.sum()) for load in loads) / max(slots, 1),
            "moe/tokens": float(self._tokens),
        }
        slots_of = [site.top_k or 1 for site in self._sites]
        return dict(list(every.items())[: 2 * min(slots_of)])

    def _count(self, running: Pass, output: Any) -> None:
        if not self._model.training or running.inputs.shape is None:
            return
        real = running.inputs.real()
        keep = None if real is None else torch.from_numpy(real)
        tokens = 0
        for place, site in enumerate(self._sites):
            for call in running.calls.get(place, []):
                reading = as_reading(site.read(call["module"], call), site.num_choices, site.top_k)
                if site.num_experts is None and reading.logits is not None:
                    site.num_experts = reading.logits.shape[1] - site.num_zero_experts
                    self._counts[place] = np.zeros(reading.logits.shape[1], dtype=np.int64)
                ids = (
                    reading.indices
                    if keep is None or len(keep) != len(reading.indices)
                    else reading.indices[keep.to(reading.indices.device)]
                )
                tokens = len(ids)
                self._counts[place] += (
                    torch.bincount(ids[ids >= 0].reshape(-1), minlength=len(self._counts[place]))
                    .cpu()
                    .numpy()
                )
                if reading.logits is not None or reading.scores is not None:
                    self._entropy.append(
                        float(
                            spread_of_reading(
                                reading, site.score_func or ScoreFunc.SOFTMAX
                            ).entropy.mean()
                        )
                    )
        self._tokens += tokens

    def _add_ranks(self) -> None:
        distributed = torch.distributed
        if (
            distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        ):
            parts: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, (self._counts, self._tokens, self._entropy))
            self._counts = [
                np.sum(layer, axis=0) for layer in zip(*(part[0] for part in parts), strict=True)
            ]
            self._tokens = sum(part[1] for part in parts)
            self._entropy = [value for part in parts for value in part[2]]
