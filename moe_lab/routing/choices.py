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
    """The values that the selection bias is added to, and of which the top k is taken."""

    SCORES = "scores"
    LOGITS = "logits"


class Weighting(StrEnum):
    """The source of the weights of the selected experts: their scores, or a softmax over their
    logits alone.
    """

    SCORES = "scores"
    SELECTED_SOFTMAX = "selected_softmax"


class GroupScore(StrEnum):
    """The score of a group of experts: its best two added (DeepSeek-V3), its best (DeepSeek-V2)."""

    BEST_TWO = "best_two"
    MAX = "max"


class GroupFill(StrEnum):
    """The value of the scores of groups that are left out: minus infinity, or zero (a negative
    biased score can be below it: A.X K2).
    """

    EXCLUDE = "exclude"
    ZERO = "zero"


class ZeroExpertKind(StrEnum):
    """The output of a zero-compute expert: its input, nothing, or a learned mixture of its input
    and a constant vector (MoE++).
    """

    IDENTITY = "identity"
    ZERO = "zero"
    CONSTANT = "constant"


class CapacityScope(StrEnum):
    """Over which tokens an expert's capacity counts."""

    BATCH = "batch"
    SEQUENCE = "sequence"


class SecondPolicy(StrEnum):
    """The choice of GShard's second expert in training: always the runner-up, the runner-up with
    probability min(1, 2 g_2), or sampled.
    """

    ALL = "all"
    RANDOM = "random"
    SAMPLING = "sampling"


class HashTable(StrEnum):
    """The way to draw a hash router's table: at random, or greedily so that expected loads are even
    under given token frequencies.
    """

    RANDOM = "random"
    BALANCED = "balanced"


class DecidesOver(StrEnum):
    """The tokens that a router looks at together when it decides for one of them."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    BATCH = "batch"


class BudgetShift(StrEnum):
    """The quantity that is moved to give every token a little more or less real compute
    (``analysis.difficulty.gain``).

    ``NONE``: the count is fixed. ``BIAS``: the selection bias or cut-off of the controller (the
    logits, where a router has no controller). ``LOGITS``: the logits of the real experts.
    ``MASS``: the probability mass p of top-p routing.
    """

    NONE = "none"
    BIAS = "bias"
    LOGITS = "logits"
    MASS = "mass"
