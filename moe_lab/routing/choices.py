"""The choices of a router configuration: one ``StrEnum`` for each field that takes one of a few
values. Plain strings name their members in a ``RouterConfig``.
"""

from enum import StrEnum


class ScoreFunc(StrEnum):
    """From logits to scores: softmax over all experts, or one function per expert."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrt_softplus"


class SelectOn(StrEnum):
    """What the selection bias is added to and the top k is taken of."""

    SCORES = "scores"
    LOGITS = "logits"


class Weighting(StrEnum):
    """Where the weights of the selected experts come from: their scores, or a softmax over their
    logits alone.
    """

    SCORES = "scores"
    SELECTED_SOFTMAX = "selected_softmax"


class GroupScore(StrEnum):
    """The score of a group of experts: its best two added (DeepSeek-V3), its best (DeepSeek-V2)."""

    BEST_TWO = "best_two"
    MAX = "max"


class GroupFill(StrEnum):
    """What stands for the scores of the groups left out: minus infinity, or zero (which a negative
    biased score can lose to: A.X K2).
    """

    EXCLUDE = "exclude"
    ZERO = "zero"


class ZeroExpertKind(StrEnum):
    """What a zero-compute expert returns: its input, nothing, or a learned mixture of its input and
    a constant vector (MoE++).
    """

    IDENTITY = "identity"
    ZERO = "zero"
    CONSTANT = "constant"


class CapacityScope(StrEnum):
    """Over which tokens an expert's capacity counts."""

    BATCH = "batch"
    SEQUENCE = "sequence"


class SecondPolicy(StrEnum):
    """How GShard's second expert is chosen in training: always the runner-up, the runner-up with
    probability min(1, 2 g_2), or sampled.
    """

    ALL = "all"
    RANDOM = "random"
    SAMPLING = "sampling"


class HashTable(StrEnum):
    """How a hash router's table is drawn: at random, or greedily so that expected loads are even
    under given token frequencies.
    """

    RANDOM = "random"
    BALANCED = "balanced"


class DecidesOver(StrEnum):
    """Which tokens a router looks at together when it decides for one of them."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    BATCH = "batch"


class BudgetShift(StrEnum):
    """What is moved to give every token a little more or less real compute
    (``analysis.difficulty.gain``).

    ``NONE``: the count is fixed. ``BIAS``: the selection bias or cut-off of the controller (the
    logits, where a router has no controller). ``LOGITS``: the logits of the real experts.
    ``MASS``: the probability mass p of top-p routing.
    """

    NONE = "none"
    BIAS = "bias"
    LOGITS = "logits"
    MASS = "mass"
