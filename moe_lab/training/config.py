"""``RunConfig``: everything that decides the numbers of one training run.

Its hash names the run's folder.
"""

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Annotated

from moe_lab.config import MAX_SEED, Config, above, at_least, at_most, between, require
from moe_lab.model import DecoderConfig
from moe_lab.text import TextConfig

_LATER = ("budgets", "losses", "validate_every", "on_alarm")
"""Fields of ``RunConfig`` that older versions did not have."""


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class OnAlarm(StrEnum):
    """What an alarm about a layer's routing does (`moe_lab.training.alarms`): it is recorded, or it
    also ends the run.
    """

    RECORD = "record"
    STOP = "stop"


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """AdamW with a warm-up-stable-decay schedule (arXiv 2404.06395): linear warm-up, constant,
    linear decay to ``final_lr_ratio``.

    Attributes:
        lr: peak learning rate.
        warmup_fraction, decay_fraction: shares of all steps.
        weight_decay: on matrices only; norms and router biases are left alone.
        clip_norm: largest gradient norm.
    """

    lr: Annotated[float, above(0)] = 3e-3
    final_lr_ratio: Annotated[float, between(0, 1)] = 0.1
    warmup_fraction: Annotated[float, at_least(0)] = 0.05
    decay_fraction: Annotated[float, at_least(0)] = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: Annotated[float, above(0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = self.warmup_fraction + self.decay_fraction
        what = "warmup_fraction and decay_fraction that sum to at most 1"
        require(shares <= 1, what, shares, field="decay_fraction")


@dataclass(frozen=True)
class LossTerm(Config):
    """A loss of ``moe_lab.routing.losses.LOSSES`` in a run, with its coefficient."""

    name: str
    coefficient: float


@dataclass(frozen=True)
class RunConfig(Config):
    """One training run.

    Attributes:
        name: a readable label; the content hash is the identity.
        arm: which series of the sweep the run belongs to ("topk", "zero", ...).
        seed: of initialisation and data order; runs of one seed see the same batches whatever their
            model.
        batch_size: sequences per optimiser step; ``grad_accumulation`` splits them into
            micro-batches.
        train_tokens: rounded up to whole steps.
        budgets: token budgets, ascending, that share one long run: all warm up like the longest,
            and the shorter ones branch off it where they begin to decay
            (`moe_lab.training.branching`). ``train_tokens`` is one of them. Empty: this run is
            alone.
        router_aux_loss_coef, router_z_loss_coef: of the balance loss (scale 1 at uniform load, mean
            over layers) and the router z-loss.
        router_own_loss_coef: of the losses that a router makes itself (``Routing.losses``: the
            entropy of top-p, the L1 of ReMoE, ...).
        losses: further losses on the routing of each MoE layer, mean over layers: plugins' or those
            of ``LOSSES``.
        eval_tokens: validation tokens, in excerpts of ``eval_excerpt_tokens`` evenly spaced over
            the validation documents; None for all.
        checkpoint_every, log_every: in steps.
        validate_every: steps between validations while the run trains, on the tokens of the last
            evaluation, the first before the first step; None: the last evaluation is the only one.
        on_alarm: whether an alarm about a layer's routing is recorded, or also ends the run.
        dtype: of the matrix products; parameters and optimiser stay float32.
    """

    model: DecoderConfig
    name: str = "run"
    arm: str = "topk"
    seed: Annotated[int, at_least(0), at_most(MAX_SEED)] = 0
    text: TextConfig = field(default_factory=TextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: Annotated[int, at_least(1)] = 16
    seq_length: Annotated[int, at_least(1)] = 128
    grad_accumulation: Annotated[int, at_least(1)] = 1
    train_tokens: Annotated[int, at_least(1)] = 200_000
    budgets: tuple[int, ...] = ()
    router_aux_loss_coef: Annotated[float, at_least(0)] = 1e-2
    router_z_loss_coef: Annotated[float, at_least(0)] = 1e-3
    router_own_loss_coef: Annotated[float, at_least(0)] = 1.0
    losses: tuple[LossTerm, ...] = ()
    eval_tokens: Annotated[int | None, at_least(2)] = 60_000
    eval_excerpt_tokens: Annotated[int, at_least(2)] = 256
    checkpoint_every: Annotated[int, at_least(1)] = 50
    log_every: Annotated[int, at_least(1)] = 5
    validate_every: Annotated[int | None, at_least(1)] = None
    on_alarm: OnAlarm = OnAlarm.RECORD
    device: str = "cpu"
    dtype: Dtype = Dtype.FLOAT32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size % self.grad_accumulation == 0,
            f"grad_accumulation dividing batch_size {self.batch_size}",
            self.grad_accumulation,
            field="grad_accumulation",
        )
        require(
            self.seq_length <= self.model.context_length,
            f"seq_length of at most the model's context_length {self.model.context_length}",
            self.seq_length,
            field="seq_length",
        )
        ascending = list(self.budgets) == sorted(set(self.budgets))
        require(ascending, "ascending budgets", self.budgets, field="budgets")
        require(
            not self.budgets or self.train_tokens in self.budgets,
            f"train_tokens among the budgets {self.budgets}",
            self.train_tokens,
            field="train_tokens",
        )
        _ = self.schedule  # a warm-up and a decay that fit into these steps
        if self.losses:
            from moe_lab.routing.losses import LOSSES  # imports torch

            for term in self.losses:
                LOSSES.find(term.name)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_length

    @property
    def steps(self) -> int:
        return self._steps(self.train_tokens)

    def _steps(self, tokens: int) -> int:
        return -(-tokens // self.tokens_per_step)

    @property
    def schedule(self) -> OptimizerConfig:
        """The optimiser as this run follows it: runs that share ``budgets`` have the warm-up steps
        of the longest.
        """
        if not self.budgets:
            return self.optimizer
        warmup = round(self.optimizer.warmup_fraction * self._steps(self.budgets[-1]))
        return self.optimizer.replace(warmup_fraction=warmup / self.steps)

    def decay_step(self, tokens: int) -> int:
        """Steps before a budget of ``tokens`` begins to decay."""
        steps = self._steps(tokens)
        return steps - round(self.optimizer.decay_fraction * steps)

    def written(self) -> tuple[str, ...]:
        """As ``Config.written``, with the fields of later versions only if they are set, so that
        older runs keep their hash.
        """
        defaults = {item.name: item.default for item in fields(self)}
        absent = {name for name in _LATER if getattr(self, name) == defaults[name]}
        return tuple(name for name in super().written() if name not in absent)

    @property
    def target_ffn_count(self) -> float | None:
        """Real experts per token that the run aims at: K_e with zero-compute experts, else top_k;
        None for a dense model.
        """
        if self.model.moe is None:
            return None
        router = self.model.moe.router
        if router.controller is not None and router.controller.target_ffn_count is not None:
            return router.controller.target_ffn_count
        return router.top_k * router.num_experts / router.num_choices

    @property
    def ratio(self) -> float:
        """Total to active experts: num_experts / target_ffn_count (E / k for a fixed k); 1 for a
        dense model.
        """
        if self.model.moe is None or self.target_ffn_count is None:
            return 1.0
        return self.model.moe.router.num_experts / self.target_ffn_count


RATIO_MEANING = (
    "routed experts over routed experts run per token (E/k; with zero-compute experts N/K_e)"
)
