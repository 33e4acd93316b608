"""The alarms of the package: what each measures, its threshold, and what people do about it.

Thresholds were set on mini runs of ``experiments/alarms`` and judged on runs of other seeds;
docs/alarms.md has the rates.
"""

import math

import torch
from torch import Tensor

from moe_lab.measures import effective_experts, load_cv
from moe_lab.training.alarms import ALARMS, AlarmRule
from moe_lab.training.readings import LayerReading

STARVED = 0.01
"""Share of its fair share below which an expert counts as without tokens."""
EMPTY = 1e-6
"""Share of the median norm below which an expert's matrices count as zero."""
SMOOTH = 1 / 8
"""Weight of the newest reading in a running mean."""
LEAST = 0.01
"""Least mean number of experts that counts; less is the same."""
FIRST = 16
"""Readings whose mean is the target where no other is known."""
REACHED, WAIT = 0.25, 64
"""Share of the target within which a budget has been reached, and readings to wait for it."""
STAYS = 4
"""Successive readings within ``REACHED``: a count that passes the target has not reached it."""


def experts_of_a_token(reading: LayerReading) -> float | None:
    """Real experts of a token, mean over tokens, at least 1.

    None where tokens run no expert, or more than half of them: then the busy experts are most
    experts, and tokens that all run the same ones are no collapse.
    """
    each = max(reading.mean_ffn_count, 1.0)
    return each if each <= reading.num_experts / 2 and reading.counts.any() else None


def unevenness(reading: LayerReading) -> float | None:
    """Load CV over the largest that is possible: 0 when even, 1 when all tokens run the same
    experts. None as in ``experts_of_a_token``.
    """
    if (each := experts_of_a_token(reading)) is None:
        return None
    return float(load_cv(reading.counts)) / math.sqrt(reading.num_experts / each - 1)


@ALARMS.register("router_collapse")
class RouterCollapse(AlarmRule):
    """Experts that do not count any more, over those that could: 1 when all tokens run the same
    experts. Experts count by exp(entropy of the load). Not watched where tokens run more than half
    of the experts.

    Advice: balance losses are those of Switch (arXiv 2101.03961, section 2.2) and, over the global
    batch, arXiv 2501.11873; the bias is loss-free balancing (arXiv 2408.15664); the z-loss is
    ST-MoE's (arXiv 2202.08906, section 3.3).
    """

    threshold = 0.83
    patience = 16
    advice = (
        "Look at the balance loss (its coefficient, and whether it reaches the router), the "
        "controller of the selection bias, and the learning rate of the router. People restore "
        "the last even checkpoint and continue with a larger balance coefficient or a selection "
        "bias, a z-loss, or a lower learning rate."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if (each := experts_of_a_token(reading)) is None:
            return None
        experts = reading.num_experts
        return min(1 - (float(effective_experts(reading.counts)) - each) / (experts - each), 1.0)

    def seen(self, reading: LayerReading, value: float) -> str:
        effective = float(effective_experts(reading.counts))
        return (
            f"the load is that of {effective:.1f} of {reading.num_experts} experts, for "
            f"{reading.mean_ffn_count:.2g} experts per token (collapse {value:.2f})"
        )


@ALARMS.register("dead_experts")
class DeadExperts(AlarmRule):
    """Successive readings in which the same expert got less than 1 % of its fair share of slots, or
    had a matrix that is zero.

    Advice: the balance of experts is DeepSeekMoE's (arXiv 2401.06066, section 3.3) or a bias
    (arXiv 2408.15664); experts that start alike or at zero come from how a checkpoint was loaded
    or upcycled (arXiv 2212.05055).
    """

    threshold = 24.0
    advice = (
        "If the expert's weights are zero, look at how they were initialised or loaded. If it gets "
        "no tokens, look at the balance loss or the selection bias: an expert without tokens "
        "learns nothing. People raise the balance coefficient, use a "
        "selection bias, or initialise the expert again from a busy one."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if reading.num_experts < 2 or not reading.counts.any():
            return None
        starved = _starved(reading) | _empty(reading)
        ages = self.memory.get("ages") or [0] * reading.num_experts
        self.memory["ages"] = [
            age + 1 if lacks else 0 for age, lacks in zip(ages, starved.tolist(), strict=True)
        ]
        return float(max(self.memory["ages"]))

    def seen(self, reading: LayerReading, value: float) -> str:
        dead = [index for index, age in enumerate(self.memory["ages"]) if age >= value]
        empty = [index for index in dead if _empty(reading)[index]]
        which = empty or dead
        names = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
        experts = f"{len(which)} of {reading.num_experts} experts ({names})"
        if empty:
            return f"{experts} return zero: a matrix of theirs is zero"
        return f"{experts} had less than 1 % of a fair share in each of {value:.0f} readings"


def _starved(reading: LayerReading) -> Tensor:
    return reading.counts < STARVED * reading.counts.double().mean()


def _empty(reading: LayerReading) -> Tensor:
    norms = reading.expert_norms
    if norms is None:
        return torch.zeros_like(reading.counts, dtype=torch.bool)
    return norms <= EMPTY * norms.median()


@ALARMS.register("load_drift")
class LoadDrift(AlarmRule):
    """Running mean of the unevenness of the load, less its best value so far.

    Unevenness: load CV over its largest possible value; not watched where tokens run more than half
    of the experts. Advice: load over the global batch, arXiv
    2501.11873; the bias and its rate, arXiv 2408.15664, section 4.3.
    """

    threshold = 0.78
    patience = 8
    advice = (
        "The load was more even before. Look at what changed at that step: data, learning rate, "
        "a coefficient, a controller that is no longer called. People compute the balance loss "
        "over the global batch, raise its coefficient, or raise the rate of the selection bias."
    )

    def measure(self, reading: LayerReading) -> float | None:
        uneven = unevenness(reading)
        if uneven is None:
            return None
        number = self.memory.get("number", 0) + 1
        before = self.memory.get("mean", 0.0)
        mean = before + max(SMOOTH, 1 / number) * (uneven - before)
        best = min(self.memory.get("best", math.inf), mean)
        self.memory = {"number": number, "mean": mean, "best": best}
        return mean - best

    def seen(self, reading: LayerReading, value: float) -> str:
        return (
            f"the load CV is {float(load_cv(reading.counts)):.2f}; as a share of its largest "
            f"possible value it rose from {self.memory['best']:.2f} to {self.memory['mean']:.2f}"
        )


@ALARMS.register("entropy_low")
class EntropyLow(AlarmRule):
    """Entropy of the router's scores over its largest possible value; not watched where scores are
    sparse, as ReMoE's.

    Advice: routers in float32, Switch (arXiv 2101.03961, section 2.4); z-loss, ST-MoE (arXiv
    2202.08906, section 3.3).
    """

    threshold = 0.05
    below = True
    patience = 4
    advice = (
        "The router is certain about every token, and its scores have almost no gradient left. "
        "Look at the size of the logits, the learning rate of the router and losses on its "
        "entropy. People add a router z-loss, lower the learning rate of the router, and compute "
        "it in float32."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if reading.sparse_scores or reading.entropy_max <= 0:
            return None
        return reading.entropy / reading.entropy_max

    def seen(self, reading: LayerReading, value: float) -> str:
        return (
            f"the entropy of the router is {reading.entropy:.3g} nats, {value:.0%} of the largest "
            f"possible {reading.entropy_max:.3g}"
        )


@ALARMS.register("entropy_high")
class EntropyHigh(AlarmRule):
    """Distance of the router's entropy from its maximum, over the maximum; 0 where the scores of
    all experts are equal.

    Advice: the size of coefficients, ST-MoE (arXiv 2202.08906, section 3.3: z-loss 1e-3) and
    LongCat-Flash (arXiv 2509.01322, section 3: R_g below 0.1).
    """

    threshold = 2e-5
    below = True
    patience = 8
    advice = (
        "All experts have the same score for every token: the router does not tell tokens apart. "
        "Look at the scale of its logits and of its initial weights, at whether it has a gradient, "
        "and at the coefficients of the z-loss and of the balance loss. People correct the scale "
        "and lower these coefficients."
    )

    def measure(self, reading: LayerReading) -> float | None:
        most = reading.entropy_max
        return max(1 - reading.entropy / most, 0.0) if most > 0 else None

    def seen(self, reading: LayerReading, value: float) -> str:
        return (
            f"the entropy of the router is at its maximum of {reading.entropy_max:.4g} nats, "
            f"within {value:.1g} of it"
        )


@ALARMS.register("bias_direction")
class BiasDirection(AlarmRule):
    """Correlation over real experts of the move of the selection bias since the last reading with
    the load of this one: negative where the bias evens the load.

    Advice: the sign and the rate of the rule, arXiv 2408.15664, algorithm 1.
    """

    threshold = 0.3
    patience = 4
    advice = (
        "The selection bias rises for busy experts. Look at the sign of the rule (target less "
        "load), at what the load is counted of (all ranks and micro-batches, once per step), and "
        "that bias and experts are in the same order."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if reading.bias is None:
            return None
        bias = reading.bias[: reading.num_experts].double()
        before = self.memory.pop("bias", None)
        if not bias.isfinite().all():  # JSON has no NaN to remember
            return None
        self.memory["bias"] = bias.tolist()
        if before is None or reading.num_experts < 2:
            return None
        moved = bias - torch.tensor(before, dtype=torch.float64)
        moved, load = moved - moved.mean(), reading.counts.double() - reading.counts.double().mean()
        size = float(moved.norm() * load.norm())
        return float(moved @ load) / size if size > 0 else None

    def seen(self, reading: LayerReading, value: float) -> str:
        return (
            f"the selection bias moves with the load (correlation {value:.2f}), and should move "
            "against it"
        )


@ALARMS.register("bias_runaway")
class BiasRunaway(AlarmRule):
    """Largest less smallest selection bias of the real experts, over the same difference of one
    token's scores: above 1 the bias decides more than the token does.

    Advice: the rate, arXiv 2408.15664, section 4.3 (0.001 for sigmoid scores); DeepSeek-V3 (arXiv
    2412.19437, section 4.2) ends with rate 0; the centred rule is Ling 2.0's.
    """

    threshold = 3.0
    patience = 4
    advice = (
        "The selection bias is larger than the differences between scores, so tokens no longer "
        "choose. Look at the rate of the rule (0.001 per step for sigmoid scores), its sign, and "
        "an expert that stays unused whatever its bias is. People lower the rate, centre or limit "
        "the bias, and add a small balance loss."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if reading.bias is None or not reading.score_spread:
            return None
        return _spread(reading) / reading.score_spread

    def seen(self, reading: LayerReading, value: float) -> str:
        return (
            f"the selection bias spreads over {_spread(reading):.3g}, {value:.2g} times the "
            f"spread of one token's scores ({reading.score_spread:.3g})"
        )


def _spread(reading: LayerReading) -> float:
    assert reading.bias is not None
    bias = reading.bias[: reading.num_experts]
    return float(bias.max() - bias.min())


class _OffTarget(AlarmRule):
    """Rules on the mean number of real experts per token."""

    def off(self, reading: LayerReading, target: float) -> float:
        """Size of the logarithm of the mean over the target: 0.7 is twice or half of it."""
        self.memory["target"] = target
        return abs(math.log(max(reading.mean_ffn_count, LEAST) / target))

    def seen(self, reading: LayerReading, value: float) -> str:
        aim = "the target is" if reading.ffn_target is not None else "at first there were"
        return (
            f"tokens run {reading.mean_ffn_count:.3g} real experts on average; {aim} "
            f"{self.memory['target']:.3g}"
        )


@ALARMS.register("budget_drift")
class BudgetDrift(_OffTarget):
    """Distance of the mean number of experts per token from its target as |ln(mean / target)|, for
    layers without zero-compute experts. Where no mean is aimed at, the target is the mean of the
    first 16 readings. Counted from when the mean was within 25 % of the target in four successive
    readings, or from reading 64: routers such as ReMoE begin with many experts.

    Advice: DTop-p's controller, arXiv 2512.13996; the entropy loss, arXiv 2403.07652.
    """

    threshold = 0.55
    patience = 32
    advice = (
        "Look at the controller of the threshold (whether it is called, its bounds), and at the "
        "size of the logits: with a fixed p the count follows it. People move p by a controller, "
        "add an entropy loss, or bound the number of slots."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if reading.num_zero_experts:
            return None
        if reading.ffn_target is not None:
            off = self.off(reading, reading.ffn_target)
            near = self.memory.get("near", 0) + 1 if off < math.log(1 + REACHED) else 0
            waited = WAIT if near >= STAYS else min(self.memory.get("waited", 0) + 1, WAIT)
            self.memory |= {"near": min(near, STAYS), "waited": waited}
            return off if self.memory["waited"] == WAIT else None
        first = self.memory.setdefault("first", [])
        if len(first) < FIRST:
            first.append(reading.mean_ffn_count)
            return None
        target = sum(first) / FIRST
        return self.off(reading, target) if target > 0 else None


@ALARMS.register("zero_share")
class ZeroShare(_OffTarget):
    """Distance of the mean number of real experts per token from its target as |ln(mean / target)|,
    for layers with zero-compute experts.

    Advice: the bias of real experts alone, LongCat-Flash (arXiv 2509.01322, section 2.1).
    """

    threshold = 0.7
    patience = 8
    advice = (
        "Zero-compute experts take another share of the slots than planned. Look at the "
        "controller (whether it is called, its rate, and that it moves real experts only) and at "
        "losses that price experts. People use the proportional bias of LongCat-Flash and look at "
        "the load of single experts beside the mean."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if not reading.num_zero_experts or reading.ffn_target is None:
            return None
        return self.off(reading, reading.ffn_target)


@ALARMS.register("balance_dominates")
class BalanceDominates(AlarmRule):
    """R_g: the gradient of the balance losses on the mean scores over that of the language loss;
    it is infinite where the language loss reaches no score.

    Advice: LongCat-Flash (arXiv 2509.01322, section 3) keeps it below 0.1.
    """

    threshold = 15.0
    patience = 4
    advice = (
        "The balance losses decide what the router learns, not the language loss. Look at their "
        "coefficients and at their scale (1 or top_k at even load). People lower the coefficient "
        "until R_g is below 0.1, and even the load by a selection bias instead."
    )

    def measure(self, reading: LayerReading) -> float | None:
        return reading.gradient_ratio

    def seen(self, reading: LayerReading, value: float) -> str:
        return (
            f"the gradient of the balance losses is {value:.3g} times that of the language loss "
            "(R_g) or more"
        )


@ALARMS.register("router_frozen")
class RouterFrozen(AlarmRule):
    """Successive readings of later steps in which the router's parameters have the same norm to
    the bit.

    Advice: routers in float32, Switch (arXiv 2101.03961, section 2.4).
    """

    threshold = 3.0
    advice = (
        "The router does not learn. Look at requires_grad, at the optimiser's parameter groups, "
        "and at the dtype: in bfloat16 small updates round to nothing, so routers are kept in "
        "float32. If it is frozen on purpose, leave this alarm out."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if reading.router_norm is None:
            return None
        same = self.memory.get("norm") == reading.router_norm
        self.memory["norm"] = reading.router_norm
        self.memory["age"] = self.memory.get("age", 0) + 1 if same else 0
        return float(self.memory["age"])

    def seen(self, reading: LayerReading, value: float) -> str:
        return f"the router's parameters did not change in {value:.0f} readings"


@ALARMS.register("router_speed")
class RouterSpeed(AlarmRule):
    """Relative change per step of the norm of the router's parameters.

    Advice: instabilities of routers, ST-MoE (arXiv 2202.08906, section 3).
    """

    threshold = 0.02
    patience = 2
    advice = (
        "The router learns much faster than is usual. Look at its learning rate (parameter groups, "
        "warm-up), its initial size and the gradient norm. People give the router the learning "
        "rate of the other matrices, a longer warm-up and a z-loss."
    )

    def measure(self, reading: LayerReading) -> float | None:
        if not (reading.router_norm and math.isfinite(reading.router_norm)):
            return None
        before = self.memory.get("last")
        self.memory["last"] = [reading.step, reading.router_norm]
        if before is None or reading.step <= before[0]:
            return None
        return abs(math.log(reading.router_norm / before[1])) / (reading.step - before[0])

    def seen(self, reading: LayerReading, value: float) -> str:
        return f"the norm of the router's parameters changes by {value:.1%} per step"
