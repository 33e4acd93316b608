"""Mini runs, healthy and with planted faults, with the readings of every layer at every step.

Each run is a decoder of two layers on real text for 96 steps. The thresholds of
``moe_lab.training.alarms`` were set on the splits "set" and "again" and judged on other seeds,
once: "judge". The runs of "again" had judged earlier thresholds.

    python experiments/alarms/record.py --out runs/alarms --processes 2
    python experiments/alarms/judge.py runs/alarms

The first command takes about 30 minutes of CPU time and continues where it stopped: a run is a
file, ``<run>.npz``. The second writes the committed tables.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from moe_lab.files import atomic_path
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.text import TextConfig, TokenizedText, load_tokens
from moe_lab.training import OptimizerConfig, RunConfig
from moe_lab.training.config import LossTerm
from moe_lab.training.data import Batches
from moe_lab.training.metrics import gradient_ratios
from moe_lab.training.objective import Objective
from moe_lab.training.optimizer import build_optimizer, clip_gradients, lr_factor
from moe_lab.training.ranks import ALONE
from moe_lab.training.readings import LayerReading, read_layers

STEPS = 96
RATIO_EVERY = 6
"""Steps between two measurements of R_g."""
ONSETS = (0, 40)
"""Steps before which the faults that begin in a run begin."""
VOCAB = 512
SIZES = {"8": (8, 32, 32), "16": (16, 48, 48)}
"""Name -> experts, d_model, tokens per sequence; 8 sequences a step."""
LR = 2e-3
SIGN = {"kind": "sign", "rate": 1e-2}
LONGCAT = {"kind": "longcat", "top_k": 3, "routed_scaling_factor": 8.0}

ARMS: dict[str, dict[str, Any]] = {
    "softmax_topk": {"norm_topk_prob": True},
    "softmax_topk, sign": {
        "kind": "softmax_topk",
        "norm_topk_prob": True,
        "controller": SIGN,
        "aux": 0.0,
    },
    "topk_softmax": {},
    "sigmoid_topk, sign": {
        "kind": "sigmoid_topk",
        "norm_topk_prob": True,
        "controller": SIGN,
        "aux": 1e-4,
    },
    "sigmoid_topk, centred": {
        "kind": "sigmoid_topk",
        "norm_topk_prob": True,
        "controller": {"kind": "centred_sign", "rate": 1e-2},
        "aux": 1e-4,
    },
    "sqrt_softplus_topk, sign": {
        "kind": "sqrt_softplus_topk",
        "norm_topk_prob": True,
        "controller": SIGN,
        "aux": 1e-4,
    },
    "deepseek_v2": {"num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 8.0},
    "deepseek_v3, sign": {
        "kind": "deepseek_v3",
        "num_groups": 4,
        "topk_groups": 2,
        "norm_topk_prob": True,
        "controller": SIGN,
        "aux": 1e-4,
    },
    "pnorm_topk": {},
    "token_choice": {"norm_topk_prob": True},
    "llama4": {},
    "gemma": {},
    "noisy_topk": {"own": 0.1},
    "sparsemixer": {},
    "switch": {"capacity_factor": 1.25, "norm_topk_prob": True},
    "gshard_top2": {"capacity_factor": 2.0},
    "longcat": {"zero": 0.5}
    | LONGCAT
    | {
        "controller": {"kind": "proportional", "rate": 0.1, "target_ffn_count": 2.0},
    },
    "longcat, pid": {"zero": 0.5}
    | LONGCAT
    | {
        "controller": {
            "kind": "pid",
            "rate": 0.1,
            "proportional_gain": 0.03,
            "derivative_gain": 0.01,
            "target_ffn_count": 2.0,
        },
    },
    "moepp": {"zero": 0.5, "top_k": 3},
    "adamoe": {"zero": 0.5, "top_k": 3},
    "top_p": {"top_k": "all", "top_p": 0.35, "own": 1e-4},
    "xmoe": {"top_k": "all", "threshold": 0.5, "own": 1e-4},
    "dtop_p": {"max_slots": "all", "own": 1e-4},
    "expert_threshold": {
        "max_slots": "all",
        "controller": {"kind": "threshold_ema", "momentum": 0.5},
    },
    "quantile_threshold": {
        "max_slots": "all",
        "controller": {"kind": "quantile_ema", "momentum": 0.5},
    },
    "remoe": {
        "max_slots": "all",
        "router_bias": True,
        "controller": {
            "8": {"kind": "relu_lambda", "initial": 3e-4, "factor": 1.05},
            "16": {"kind": "relu_lambda", "initial": 2e-3, "factor": 1.05},
        },
    },
    "dynmoe": {"top_k": "all"},
    "seq_topk": {"max_slots": "all", "min_slots": 1, "norm_topk_prob": True},
    "expert_choice": {"max_slots": "all", "aux": 0.0},
    "sinkhorn": {"aux": 0.0},
    "base": {"top_k": 1, "aux": 0.0},
    "quantile_balanced": {"norm_topk_prob": True, "aux": 0.0},
    "scored_hash": {"vocab_size": VOCAB, "norm_topk_prob": True, "aux": 0.0},
}
"""Label -> fields of ``RouterConfig``; ``kind`` is the label unless given, ``aux`` and ``own`` are
loss coefficients, ``zero`` the zero-compute experts over the real ones, "all" the number of
experts; a value may be given by size.
"""

LEFT_OUT = {
    "zaya": "its load stays uneven at this size (load CV .5 to 1.7 at each of five settings tried)",
    "inkling": "sigmoid_topk with gates for shared experts",
    "mixture_of_depths": "one expert: nothing to balance",
    "d2dmoe": "a rule for trained dense models",
    "hash, random, token_lookup": "learn nothing",
}

BY_LOSS = [
    "softmax_topk",
    "topk_softmax",
    "deepseek_v2",
    "pnorm_topk",
    "token_choice",
    "llama4",
    "gemma",
    "sparsemixer",
    "adamoe",
]
BY_LOSS_ON_SCORES = [arm for arm in BY_LOSS if arm not in ("topk_softmax", "sparsemixer")]
"""Arms in which R_g is finite: in the others the language loss reaches the logits alone."""
BY_BIAS = [
    "softmax_topk, sign",
    "sigmoid_topk, sign",
    "sigmoid_topk, centred",
    "sqrt_softplus_topk, sign",
    "deepseek_v3, sign",
    "longcat",
    "longcat, pid",
]
BY_SOFTMAX = [
    "softmax_topk",
    "topk_softmax",
    "deepseek_v2",
    "pnorm_topk",
    "token_choice",
    "longcat",
]
BUDGETS = ["top_p", "xmoe", "dtop_p", "remoe", "expert_threshold", "quantile_threshold"]
SELECTING = [arm for arm in ARMS if arm not in ("scored_hash",)]


@dataclass
class Setup:
    """What a fault may change: fields of the run, and what is done to the model.

    Attributes:
        run: fields of ``RunConfig`` and ``lr``.
        router_lr: factor of the learning rate of the routers.
        built: called with the model once, before the first step.
        before: called with the model before each step after the onset.
    """

    run: dict[str, Any] = field(default_factory=dict)
    router_lr: float = 1.0
    built: Callable[[Decoder], None] = lambda model: None
    before: Callable[[Decoder], None] = lambda model: None


def routers(model: Decoder) -> Iterator[Any]:
    for layer in model.moe_layers().values():
        yield layer.router


def no_balance(arm: str) -> Setup:
    """No balance loss, no controller, and ten times the learning rate."""
    return Setup({"router_aux_loss_coef": 0.0, "router_own_loss_coef": 0.0, "lr": 10 * LR})


def wrong_sign(arm: str) -> Setup:
    """The controller moves the bias of busy experts up."""

    def turn(model: Decoder) -> None:
        for router in routers(model):
            right = router.controller.step
            router.controller.step = lambda counts, right=right: -right(counts)

    return Setup(built=turn)


def bias_rate(arm: str) -> Setup:
    """The controller's rate is 100 times too large."""

    def hasten(model: Decoder) -> None:
        for router in routers(model):
            right = router.controller.step
            router.controller.step = lambda counts, right=right: 100 * right(counts)

    return Setup(built=hasten)


def router_lr(arm: str) -> Setup:
    """30 times the learning rate on the routers."""
    return Setup(router_lr=30.0)


def frozen_router(arm: str) -> Setup:
    def freeze(model: Decoder) -> None:
        for router in routers(model):
            router.requires_grad_(False)

    return Setup(built=freeze)


def zero_expert(arm: str) -> Setup:
    """The second expert of each layer is zero, as if its weights had not been loaded."""

    @torch.no_grad()
    def clear(model: Decoder) -> None:
        for layer in model.moe_layers().values():
            layer.experts.gate_up[1] = 0
            layer.experts.down[1] = 0

    return Setup(before=clear)


def flattened(arm: str) -> Setup:
    """Logits 100 times too small."""

    def shrink(model: Decoder) -> None:
        for router in routers(model):
            right = router.logits
            router.logits = lambda x, right=right: 0.01 * right(x)

    return Setup(built=shrink)


def sharpened(arm: str) -> Setup:
    """A loss that asks for a low entropy, 1,000 times too large."""
    return Setup({"losses": (LossTerm("entropy", 1.0),)})


def balance_loss(arm: str) -> Setup:
    """A balance loss 1,000 times too large."""
    return Setup({"router_aux_loss_coef": 10.0})


@torch.no_grad()
def uncalled(model: Decoder) -> Iterator[Any]:
    """The controllers that this call is the first to silence: from here on they do not move."""
    for router in routers(model):
        if router.controller.update_from is not _nothing:
            router.controller.update_from = _nothing
            yield router.controller


def _nothing(routings: Any) -> None:
    pass


def stale_bias(arm: str) -> Setup:
    """The controller is no longer called, and its bias is that of another model."""

    @torch.no_grad()
    def load(model: Decoder) -> None:
        for controller in uncalled(model):
            controller.bias[: controller.num_experts] -= 1.5 / len(controller.bias)

    return Setup(before=load)


def budget(arm: str) -> Setup:
    """A fixed p whose scores are sharpened; for the others a controller that is no longer called,
    with twice the p, a tenth of ReMoE's lambda, or cut-offs half a logit lower.
    """

    @torch.no_grad()
    def move(model: Decoder) -> None:
        for controller in uncalled(model):
            if arm == "dtop_p":
                controller.p *= 2
            elif arm == "remoe":
                controller.coefficient *= 0.1
            else:
                controller.bias += 0.5

    return sharpened(arm) if arm in ("top_p", "xmoe") else Setup(before=move)


def reversed_loss(arm: str) -> Setup:
    """A balance loss of the wrong sign."""
    return Setup({"losses": (LossTerm("load_balancing", -0.3),)})


@dataclass(frozen=True)
class Fault:
    """
    Attributes:
        plant: arm -> what is changed.
        arms: in which it can be planted.
        onsets: steps before it begins.
        steps: of a run after the onset, at most: from the delays in the runs that set the
            thresholds, which were followed to the end.
    """

    plant: Callable[[str], Setup]
    arms: list[str]
    onsets: tuple[int, ...] = (0,)
    steps: int = STEPS


FAULTS: dict[str, Fault] = {
    "no_balance": Fault(no_balance, BY_LOSS, steps=72),
    "wrong_sign": Fault(wrong_sign, BY_BIAS, steps=16),
    "bias_rate": Fault(bias_rate, BY_BIAS, steps=48),
    "router_lr": Fault(router_lr, SELECTING, steps=32),
    "frozen_router": Fault(frozen_router, list(ARMS), steps=16),
    "zero_expert": Fault(zero_expert, list(ARMS), ONSETS, steps=36),
    "flattened": Fault(flattened, BY_SOFTMAX, steps=16),
    "sharpened": Fault(sharpened, BY_SOFTMAX, steps=80),
    "balance_loss": Fault(balance_loss, BY_LOSS_ON_SCORES, steps=36),
    "stale_bias": Fault(stale_bias, ["longcat", "longcat, pid"], ONSETS, steps=24),
    "budget": Fault(budget, BUDGETS, ONSETS[1:]),
    "reversed_loss": Fault(reversed_loss, BY_LOSS, ONSETS, steps=64),
}


@dataclass(frozen=True)
class Case:
    """One mini run. ``fault`` "" is a healthy one."""

    split: str
    fault: str
    arm: str
    size: str
    seed: int
    onset: int = 0

    @property
    def steps(self) -> int:
        """Those that set the thresholds are followed to the end."""
        if not self.fault or self.split == "set":
            return STEPS
        return min(self.onset + FAULTS[self.fault].steps, STEPS)

    @property
    def name(self) -> str:
        arm = self.arm.replace(", ", "-")
        return f"{self.split}-{self.fault or 'healthy'}-{arm}-{self.size}-{self.seed}-{self.onset}"


def cases() -> list[Case]:
    """All runs in mixed order: in three splits 66, 200 and 200 healthy ones, and 12, 50 and 50 of
    each fault.
    """
    found = []
    healthy = [(arm, size, 0) for arm in ARMS for size in SIZES]
    for split, first, well, planted in (
        ("set", 0, len(healthy), 12),
        ("again", 1000, 200, 50),
        ("judge", 2000, 200, 50),
    ):
        found += _spread(split, "", healthy, well, first)
        for name, fault in FAULTS.items():
            places = [
                (arm, size, onset) for arm in fault.arms for size in SIZES for onset in fault.onsets
            ]
            order = np.random.default_rng(first).permutation(len(places))
            found += _spread(split, name, [places[place] for place in order], planted, first + 500)
    order = np.random.default_rng(0).permutation(len(found))
    return sorted(
        (found[place] for place in order),
        key=lambda case: 0 if not case.fault and case.split == "set" else 1 + (case.split == "set"),
    )


def _spread(
    split: str, fault: str, places: list[tuple[str, str, int]], runs: int, first: int
) -> Iterator[Case]:
    """So many runs over the places, with another seed in each round."""
    for number in range(runs):
        arm, size, onset = places[number % len(places)]
        yield Case(split, fault, arm, size, first + number // len(places), onset)


def run_config(case: Case, changes: dict[str, Any]) -> RunConfig:
    experts, width, length = SIZES[case.size]
    options = {"kind": case.arm, "num_experts": experts, "top_k": 2} | ARMS[case.arm]
    coefficients = {
        "router_aux_loss_coef": options.pop("aux", 1e-2),
        "router_own_loss_coef": options.pop("own", 1.0),
    } | changes
    if zero := options.pop("zero", None):
        options["num_zero_experts"] = round(zero * experts)
    for name, value in options.items():
        if value == "all":
            options[name] = experts
        elif isinstance(value, dict) and case.size in value:
            options[name] = value[case.size]
    router = RouterConfig.from_dict(options)
    return RunConfig(
        name=case.name,
        seed=case.seed,
        model=DecoderConfig(
            vocab_size=VOCAB,
            num_layers=2,
            d_model=width,
            num_heads=2,
            context_length=length,
            moe=MoEConfig(d_model=width, d_expert=width // 2, router=router),
        ),
        text=TextConfig(vocab_size=VOCAB),
        optimizer=OptimizerConfig(lr=coefficients.pop("lr", LR), warmup_fraction=0.2),
        batch_size=8,
        seq_length=length,
        train_tokens=STEPS * 8 * length,
        **coefficients,
    )


def run(case: Case, text: TokenizedText) -> tuple[list[list[LayerReading]], list[float]]:
    """The readings of each step, and its losses."""
    fault = FAULTS[case.fault].plant(case.arm) if case.fault else Setup()
    # A fault of the losses that begins later: the run has the healthy losses until then.
    config = run_config(case, fault.run)
    before = run_config(case, {}) if case.onset else config
    torch.manual_seed(case.seed)
    model = Decoder(config.model).train()
    fault.built(model)
    objectives = [Objective(model, part, ALONE) for part in (before, config)]
    optimizer = optimizer_of(model, config.optimizer, fault.router_lr)
    batches = Batches(text.train, config.batch_size, config.seq_length, config.seed)
    layers = model.moe_layers()
    readings, losses = [], []
    for step in range(case.steps):
        begun = step >= case.onset
        if begun:
            fault.before(model)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(step, STEPS, config.schedule)
        batch = batches(step)
        ratios = None
        if case.fault in ("", "balance_loss") and step % RATIO_EVERY == RATIO_EVERY - 1:
            ratios = gradient_ratios(model, config if begun else before, batch[:4])
        nats, auxiliary, routings = objectives[begun](batch)
        (nats + auxiliary).backward()
        clip_gradients(model, config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen = [[routing] for routing in routings]
        for layer, routing in zip(layers.values(), seen, strict=True):
            layer.router.update(routing)
        if begun:
            fault.before(model)
        losses.append(float(nats.detach()))
        readings.append(read_layers(step + 1, layers, seen, gradient_ratios=ratios))
    return readings, losses


def optimizer_of(model: Decoder, config: OptimizerConfig, factor: float) -> torch.optim.Optimizer:
    """AdamW of the run with ``factor`` times the learning rate on the routers."""
    optimizer = build_optimizer(model, config)
    learned: set[Tensor] = {item for router in routers(model) for item in router.parameters()}
    for group in list(optimizer.param_groups):
        group["peak"] = config.lr
        of_routers = [item for item in group["params"] if item in learned]
        if factor != 1 and of_routers:
            group["params"] = [item for item in group["params"] if item not in learned]
            rest = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group(rest | {"params": of_routers, "peak": factor * config.lr})
    return optimizer


def save(path: Path, readings: list[list[LayerReading]], losses: list[float]) -> None:
    """[steps, layers, ...] arrays; what was not measured is NaN."""

    def column(name: str) -> np.ndarray:
        values = [[getattr(item, name) for item in step] for step in readings]
        if any(isinstance(value, Tensor) for step in values for value in step):
            return np.array([[value.numpy() for value in step] for step in values])
        return np.array(values, dtype=np.float64)

    names = [item.name for item in fields(LayerReading) if item.name not in ("step", "layer")]
    columns: dict[str, Any] = {name: column(name) for name in names}
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, losses=np.array(losses), **columns)


def load(path: Path) -> list[list[LayerReading]]:
    """What ``save`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name != "losses"}
    steps, layers = arrays["tokens"].shape

    def value(name: str, step: int, layer: int) -> Any:
        found = arrays[name][step, layer]
        if found.ndim:
            return torch.from_numpy(found)
        if np.isnan(found):
            return None
        whole = ("tokens", "num_zero_experts", "sparse_scores")
        return int(found) if name in whole else float(found)

    return [
        [
            LayerReading(
                step=step + 1, layer=layer, **{name: value(name, step, layer) for name in arrays}
            )
            for layer in range(layers)
        ]
        for step in range(steps)
    ]


def work(out: Path, share: int, shares: int) -> None:
    torch.set_num_threads(1)
    text = load_tokens(TextConfig(vocab_size=VOCAB), out / "text")
    for case in cases()[share::shares]:
        path = out / f"{case.name}.npz"
        if not path.exists():
            save(path, *run(case, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    load_tokens(TextConfig(vocab_size=VOCAB), args.out / "text")
    context = get_context("spawn")
    workers = [
        context.Process(target=work, args=(args.out, share, args.processes))
        for share in range(args.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    left = [case.name for case in cases() if not (args.out / f"{case.name}.npz").exists()]
    print(f"{len(cases()) - len(left)} of {len(cases())} runs are in {args.out}")


if __name__ == "__main__":
    main()
