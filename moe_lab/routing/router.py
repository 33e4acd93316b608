"""``Router``: which experts, with which weights.

A router is a function of logits with small state. It reads tokens and returns a ``Routing``; it
counts nothing itself, so activation checkpointing and evaluation cannot disturb it. After an
optimiser step the training loop hands the step's routings back through ``Router.update``, which
lets the controller (if any) move the selection bias or threshold: once a step, over all
micro-batches.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from moe_lab.config import require
from moe_lab.cpu_kernels.linear import linear
from moe_lab.errors import ConfigError, RunError, expected
from moe_lab.lazy import load_name
from moe_lab.routing.config import RouterConfig
from moe_lab.routing.controllers.config import CONTROLLERS
from moe_lab.routing.facts import FACTS, ROUTERS, RouterFacts
from moe_lab.routing.routing import Routing, valid_rows


@dataclass(frozen=True)
class RouterContext:
    """Inputs that some routers need besides the tokens.

    Attributes:
        token_ids: [T] int64 (hash routers, token lookup).
        sequence_length: tokens of one sequence; T is a multiple of it (sequence-level budgets,
            capacities and losses).
        previous: the routing of the preceding MoE layer (gating residuals of MoE++, recurrence of
            ZAYA).
        valid: [T] bool, False for padding.
    """

    token_ids: Tensor | None = None
    sequence_length: int | None = None
    previous: Routing | None = None
    valid: Tensor | None = None

    def ids_of(self, tokens: int, kind: str) -> Tensor:
        """``token_ids``; raises if a router of this ``kind`` needs them and there are none.

        Raises ``ConfigError`` where they are absent or of another number.
        """
        if self.token_ids is None or self.token_ids.shape != (tokens,):
            got = None if self.token_ids is None else list(self.token_ids.shape)
            what = f"token_ids of shape [{tokens}] for {kind}"
            raise ConfigError(
                expected(what, got, "RouterContext(token_ids=...)"), field="token_ids"
            )
        return self.token_ids

    def of_batch(self, length: int) -> "RouterContext":
        """This context for [B, S] tokens as one axis, in sequences of ``length`` unless it states
        another length.
        """
        ids, valid = (
            None if one is None else one.flatten() for one in (self.token_ids, self.valid)
        )
        length = self.sequence_length or length
        return replace(self, token_ids=ids, valid=valid, sequence_length=length)

    def without_padding(self) -> "RouterContext":
        """This context with token id 0 in padding, because the ids of padding may lie outside the
        vocabulary.
        """
        if self.valid is None or self.token_ids is None:
            return self
        return replace(self, token_ids=valid_rows(self.token_ids, self.valid, 0))

    def num_valid(self, tokens: Tensor, sequence_length: int | None = None) -> Tensor | int:
        """Number of tokens that are not padding: of the whole [T, ...] batch, or [N, 1] of each
        sequence.
        """
        if sequence_length is None:
            return tokens.shape[0] if self.valid is None else self.valid.sum()
        if self.valid is None:
            return sequence_length
        return self.valid.view(-1, sequence_length).sum(dim=1, keepdim=True)

    def tokens_per_sequence(self, num_tokens: int) -> int:
        """``sequence_length``, or all tokens where none is given.

        Raises ``ConfigError`` if it does not divide the tokens.
        """
        length = self.sequence_length or num_tokens
        require(
            not (num_tokens % max(length, 1)),
            f"a number of tokens that sequence_length {length} divides",
            num_tokens,
            field="sequence_length",
        )
        return length


class Router(nn.Module):
    """Base of all routers: a weight matrix [E, D], an optional controller, ``forward(x) ->
    Routing``.

    Subclasses implement ``route``; their facts (``RouterFacts``) list the configuration fields that
    they read. Logits and scores are computed in float32 whatever the dtype of ``x`` (float64 stays
    float64).

    Attributes:
        kind: the name in ``ROUTERS``.
        facts: of the kind.
        learned: whether there is a weight matrix at all.
    """

    kind: ClassVar[str]
    facts: ClassVar[RouterFacts] = RouterFacts()
    learned: ClassVar[bool] = True

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__()
        require(d_model >= 1, "d_model of at least 1", d_model)
        self.config, self.d_model = config, d_model
        if self.learned:
            self.weight = nn.Parameter(torch.empty(self.width(), d_model))
            nn.init.normal_(self.weight, std=d_model**-0.5)
        self.bias = nn.Parameter(torch.zeros(self.width())) if config.router_bias else None
        steered = config.controller or config.facts.default_controller
        self.controller = None
        if steered is not None:
            sizes = (config.num_experts, config.num_zero_experts, config.top_k)
            self.controller = CONTROLLERS.find(steered.kind)(steered, *sizes)

    def extra_repr(self) -> str:
        return f"{self.config}, d_model={self.d_model}"

    def width(self) -> int:
        """Number of logits: one for each real and zero-compute expert."""
        return self.config.num_choices

    def setting(self, name: str) -> Any:
        """The value of an optional field: fixed by the kind, configured, or the kind's default."""
        return self.config.setting(name)

    def forward(self, x_TD: Tensor, context: RouterContext | None = None) -> Routing:
        """Decide for [T, D] tokens, or for [B, S, D] as T = B S in the same order, sequences of
        S tokens. Padding is routed as a zero vector, whatever it holds.

        Raises:
            ConfigError: the last axis is not d_model, or the context lacks what this kind needs.
            RunError: a logit is NaN or infinite (checked on the CPU; on other devices only under
                ``torch.autograd.detect_anomaly``, because the check waits for the device).
        """
        if x_TD.dim() not in (2, 3) or x_TD.shape[-1] != self.d_model:
            d = self.d_model
            what = f"tokens of shape [T, {d}] or [B, S, {d}]"
            raise ConfigError(expected(what, list(x_TD.shape)), "x")
        context = context or RouterContext()
        if x_TD.dim() == 3:
            context, x_TD = context.of_batch(x_TD.shape[1]), x_TD.flatten(0, 1)
        return self.decide(valid_rows(x_TD, context.valid), context.without_padding())

    def decide(self, x_TD: Tensor, context: RouterContext) -> Routing:
        """From tokens to decisions, for routers that need more than the logits."""
        logits_TE = self.logits(self.jittered(x_TD))
        check_finite(logits_TE, context.valid)
        return self.route(logits_TE, context)

    def jittered(self, x_TD: Tensor) -> Tensor:
        """In training, the input times uniform noise around 1 (Switch, arXiv 2101.03961, section
        2.2), if ``jitter_eps`` is set.
        """
        eps = self.config.jitter_eps
        return (
            x_TD * torch.empty_like(x_TD).uniform_(1 - eps, 1 + eps)
            if eps and self.training
            else x_TD
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        with full_precision(x_TD):
            dtype = working_dtype(x_TD)
            bias = None if self.bias is None else self.bias.to(dtype)
            return linear(x_TD.to(dtype), self.weight.to(dtype), bias)

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        """From logits to decisions; the one method that a router must define."""
        raise TypeError(f"{type(self).__name__} does not define route()")

    def routing(
        self,
        indices_TK: Tensor,
        weights_TK: Tensor,
        logits_TE: Tensor,
        scores_TE: Tensor,
        context: RouterContext,
        **others: Any,
    ) -> Routing:
        """The ``Routing`` of these decisions over this router's experts; ``others`` are further
        fields of it.
        """
        return Routing(
            indices=indices_TK,
            weights=weights_TK,
            logits=logits_TE,
            scores=scores_TE,
            num_experts=self.config.num_experts,
            num_zero_experts=self.config.num_zero_experts,
            valid=context.valid,
            **others,
        )

    def selection_bias(self) -> Tensor | None:
        """[E]: what is added before the top k is taken, and never to a weight."""
        return None if self.controller is None else self.controller.bias

    def update(self, routings: Routing | Sequence[Routing]) -> None:
        """One controller step over the routing of one optimiser step, or the routings of all its
        micro-batches (and data-parallel ranks).

        Does nothing in evaluation mode, and nothing where there is no controller.
        """
        given = [routings] if isinstance(routings, Routing) else routings
        if self.controller is not None and given and self.training:
            self.controller.update_from(given)

    def load_hf(self, module: nn.Module, selection_bias: Tensor | None = None) -> "Router":
        """Copy weights, router bias and correction bias from a Hugging Face router, or from the
        block that holds one.

        Args:
            module: the router, or the MoE block around it (some models keep the correction bias on
                the block).
            selection_bias: [E] correction bias, where ``module`` does not hold it.

        Raises:
            CheckpointError: shapes differ, or the module has nothing that looks like a router.
        """
        load_name("moe_lab.routing.hf_weights:load_router")(self, module, selection_bias)
        return self


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off: half precision turns close scores into ties.

    (The meta device has no autocast to turn off.)
    """
    return (
        nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
    )


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_finite(logits_TE: Tensor, valid: Tensor | None = None) -> None:
    """Raise ``RunError`` if a logit of a valid token is NaN or infinite; see ``Router.forward`` for
    when it looks.
    """
    if torch.compiler.is_compiling() or (
        logits_TE.device.type != "cpu" and not torch.is_anomaly_enabled()
    ):
        return
    if logits_TE.numel() == 0 or all(
        bool(end.isfinite()) for end in logits_TE.detach().aminmax()
    ):  # one pass over what is nearly always fine
        return
    broken = ~torch.isfinite(logits_TE).all(dim=1)
    if valid is not None:
        broken = broken & valid
    count = int(broken.sum())
    if count:
        first = int(broken.nonzero()[0, 0])
        got = f"NaN or infinity for {count} of {len(logits_TE)} tokens (first: token {first})"
        raise RunError(
            expected(
                "finite router logits",
                got,
                "a lower learning rate, a router z-loss, or inputs without NaN",
            )
        )


R = TypeVar("R", bound=type[Router])


def register(kind: str, facts: RouterFacts | None = None) -> Callable[[R], R]:
    """Class decorator that registers a router, and the facts of its kind, as a
    ``RouterConfig.kind``.

    Args:
        facts: None takes the row of ``built_in_routers.py`` for a built-in kind and the facts of
            the class above for others; those of ``Router`` are a plain top-k with one weight
            matrix.

    Raises:
        ConfigError: another router has the name.

    Example:
        >>> @register("mine", RouterFacts(options={"router_bias": False}))
        ... class Mine(Router):
        ...     def route(self, logits_TE, context):
        ...         scores_TE = logits_TE.softmax(dim=1)
        ...         top = scores_TE.topk(self.config.top_k, dim=1)
        ...         return self.routing(top.indices, top.values, logits_TE, scores_TE, context)
    """

    def file(cls: R) -> R:
        ROUTERS.add(kind, cls)
        cls.kind = kind
        cls.facts = FACTS[kind] = facts or FACTS.get(kind) or cls.facts
        return cls

    return file


def build_router(config: RouterConfig, d_model: int) -> Router:
    """The router that ``config.kind`` names, for tokens of ``d_model`` channels."""
    return config.build(d_model)
