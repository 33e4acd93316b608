"""``Editor``: the edits of one router, made and checked at each of its calls.

Shape letters: T tokens, K slots, E experts (real and zero-compute).
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moe_lab.errors import MoELabError, TraceError, expected, require
from moe_lab.routing import Router
from moe_lab.trace.capturing.hooks import Pass
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.decisions import (
    FIXED_SLOTS,
    LEAST_SLOTS,
    Decisions,
    OwnRouting,
    Triple,
    dense,
    find_form,
    scope_of,
)
from moe_lab.worth.edits import Edit, Exchange, Forbid, Replay, Silence, TopK
from moe_lab.worth.patches import set_until, wrap_until
from moe_lab.worth.replayed_trace import ReplayedTrace
from moe_lab.worth.selection import Selection

Running: TypeAlias = Callable[[], tuple[Pass | None, int]]
"""The pass that runs, and how many calls of the router it has seen."""


@dataclass
class Editor:
    """The edits of one router.

    Attributes:
        experts: E.
        tokens: those whose number of slots is ``top_k``; None: all.
        calls: how many were edited and checked.
    """

    model: nn.Module
    site: TracedRouter
    experts: int
    forbidden: list[int] = field(default_factory=list)
    outputs: list[Silence | Exchange] = field(default_factory=list)
    top_k: int | None = None
    tokens: Tensor | None = None
    replay: ReplayedTrace | None = None
    calls: int = 0

    def enter(self, stack: ExitStack, running: Running) -> None:
        """Wrap the forward pass until ``stack`` closes."""
        slots = self.top_k if self.tokens is None and self.top_k else self.site.top_k
        self.form = find_form(self.site, slots)
        self.running = running
        scope = scope_of(self.site, self.model)
        if self.tokens is not None:
            if not isinstance(self.form, OwnRouting | Triple) or scope is not self.site.module:
                what = "a router that returns the ids and weights of its slots, for some tokens"
                raise self._error(what, type(self.site.module).__name__, "tokens")
            if self.replay is not None:
                raise self._error("k of some tokens without a replay", "both", "tokens")
            with ExitStack() as tried:
                self._change_top_k(tried, scope)  # raises where k cannot be changed
        elif self.top_k is not None:
            self._change_top_k(stack, scope)
        if scope is self.site.module:
            wrap_until(stack, scope, "forward", self._router)
        else:
            experts = self.site.taps.get("experts")
            if experts is None:
                raise self._error("experts that are a module beside the router", "none")
            self.form = Triple(None, slots)
            wrap_until(stack, scope, "forward", self._block)
            wrap_until(stack, experts, "forward", self._experts)
        if isinstance(scope, Router) and self.forbidden:
            wrap_until(stack, scope, "route", self._route)

    def _change_top_k(self, stack: ExitStack, scope: Any) -> None:
        """Give the router another ``top_k``, or a copy of its configuration with another."""
        k, config = self.top_k, getattr(scope, "config", None)
        least = LEAST_SLOTS.get(type(self.site.module).__name__, 1)
        require(
            k is not None and least <= k <= self.experts,
            f"k between {least} and {self.experts}",
            k,
            error=TraceError,
            where=self.site,
            field="k",
        )
        block = self.model.get_submodule(self.site.name.rpartition(".")[0])
        if type(block).__name__ in FIXED_SLOTS:
            raise self._error("a router whose k is no size of its block", type(block).__name__, "k")
        names = [name for name in ("top_k", "num_experts_per_tok") if name in vars(scope)]
        if isinstance(scope, Router):
            try:
                set_until(stack, scope, "config", replace(scope.config, top_k=k))
            except MoELabError as error:
                raise TraceError(f"{self.site}: {error}", field="k") from error
        elif names:
            set_until(stack, scope, names[0], k)
        elif hasattr(config, "top_k_experts"):
            changed = copy.copy(config)
            changed.top_k_experts = k  # type: ignore[union-attr]
            set_until(stack, scope, "config", changed)
        else:
            raise self._error("a router with its number of slots as top_k", "none", "k")

    # --------------------------------------------------------------------------------------------
    # one call

    def _router(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A router that returns its decisions."""
        if self.tokens is not None:
            self.form = find_form(self.site, self.site.top_k)
        with self._selection() as selection:
            output = forward(*args, **kwargs)
        before = self._read(output, selection)
        if self.tokens is not None:
            with ExitStack() as stack:
                self._change_top_k(stack, self.site.module)
                with self._selection() as selection:
                    changed = forward(*args, **kwargs)
            output, before = self._for_tokens(output, before, changed, selection)
        after = self._edited(before)
        output = self.form.put(output, *after)
        self._check(before, self.form.take(output))
        return output

    def _for_tokens(
        self, output: Any, own: Decisions, changed: Any, selection: Selection
    ) -> tuple[Any, Decisions]:
        """The output with more slots of two, and its decisions where the tokens that are named have
        those of ``changed`` and the others their own.
        """
        assert self.tokens is not None
        own_form, self.form = self.form, find_form(self.site, self.top_k)
        wide, narrow = self._read(changed, selection), own
        named_T = self.tokens.reshape(-1).to(own[0].device)
        if len(named_T) != len(own[0]):
            raise self._error(f"tokens of {len(own[0])} places", len(named_T), "tokens")
        fewer_T = ~named_T
        if wide[0].shape[1] < own[0].shape[1]:
            self.form, changed, wide, narrow, fewer_T = own_form, output, own, wide, named_T
        (ids_TK, weights_TK), (few_TK, _) = wide, narrow
        among_TK = (ids_TK[:, :, None] == few_TK[:, None]).any(dim=2)
        found_TK = (few_TK[:, :, None] == ids_TK[:, None]).any(dim=2) | (few_TK < 0)
        if not bool(found_TK[fewer_T].all()):
            raise self._error("the experts of fewer slots among those of more", "others", "tokens")
        few_weights_TK = dense(*narrow, self.experts).gather(1, ids_TK.long().clamp_min(0))
        values_TK = torch.where(among_TK, few_weights_TK, 0).to(weights_TK.dtype)
        if isinstance(self.form, OwnRouting):
            ids_TK = torch.where(fewer_T[:, None] & ~among_TK, -1, ids_TK)
        decisions = ids_TK, torch.where(fewer_T[:, None], values_TK, weights_TK)
        return self.form.put(changed, *decisions), decisions

    def _block(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A block that selects from its router's logits."""
        calls = self.calls
        with self._selection() as self._open:
            output = forward(*args, **kwargs)
        if self.calls == calls:
            raise self._error("a call of the experts beside it", "none")
        return output

    def _experts(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The experts in such a block."""
        self._open.running = False
        given = (*args, *kwargs.values())
        before = self._read(given, self._open)
        given = self.form.put(given, *self._edited(before))
        self._check(before, self.form.take(given))
        values = dict(zip(kwargs, given[len(args) :], strict=True))
        return forward(*given[: len(args)], **values)

    def _route(self, route: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The method of this library's routers from logits to decisions."""
        logits_TE, *others = args
        self._open.masked = True
        return route(self._open.without_forbidden(logits_TE), *others, **kwargs)

    def _selection(self) -> Selection:
        weight = getattr(self.site.module, "weight", None)
        rows = weight.shape[0] if isinstance(weight, Tensor) else 0
        own = isinstance(self.site.module, Router)
        self._replayed = None if self.replay is None else self.replay.of_call(*self.running())
        self._open = Selection(
            self.experts,
            max(rows, self.experts),
            self.forbidden,
            self._replayed,
            masks_logits=not own,
        )
        return self._open

    def _read(self, output: Any, selection: Selection) -> Decisions:
        """What was selected; raises where an edit of the selection did not take place."""
        try:
            ids_TK, weights_TK = self.form.take(output)
        except TraceError as error:
            raise TraceError(f"{self.site}: {error}", field=self.site.name) from error
        if not selection.masked:
            raise self._error("logits of each expert before the selection", "none")
        if not selection.selected:
            raise self._error("a top k over all experts, which is replayed", "none")
        for expert in self.forbidden:
            if bool((ids_TK == expert).any()):
                left = self.experts - len(set(self.forbidden))
                got = f"some; {left} other experts are left for {ids_TK.shape[1]} slots of a token"
                hint = "the edit silence, which leaves the slots"
                raise self._error(f"no slot of the forbidden expert {expert}", got, hint=hint)
        if not bool(torch.isfinite(weights_TK).all()):
            raise self._error("finite gate weights under the edit", "others")
        module = self.site.module
        slots = module.config.num_slots if isinstance(module, Router) else self.top_k
        if self.top_k is not None and self.tokens is None and ids_TK.shape[1] != slots:
            raise self._error(f"{slots} slots", ids_TK.shape[1], "k")
        if self._replayed is not None:
            known_T, want_TK = self._replayed.known, self._replayed.ids
            if not torch.equal(ids_TK.cpu().long()[known_T], want_TK[known_T]):
                raise self._error("the replayed ids", "others")
        return ids_TK, weights_TK

    def _edited(self, before: Decisions) -> Decisions:
        ids_TK, weights_TK = before
        if self.replay is not None:
            weights_TK = self.replay.weights_of_call(weights_TK)
        for edit in self.outputs:
            if isinstance(edit, Silence):
                weights_TK = weights_TK.masked_fill(ids_TK == edit.expert, 0)
            else:
                first_TK, second_TK = ids_TK == edit.first, ids_TK == edit.second
                ids_TK = ids_TK.masked_fill(first_TK, edit.second)
                ids_TK = ids_TK.masked_fill(second_TK, edit.first)
        return ids_TK, weights_TK

    def _check(self, before: Decisions, after: Decisions) -> None:
        """Compare columns of weights [T, E] before and after: those named changed as they should,
        all others are equal to the bit.
        """
        ids_TK, weights_TK = before
        if self.replay is not None:
            weights_TK = self.replay.weights_of_call(weights_TK)
        want_TE = dense(ids_TK, weights_TK, self.experts).detach()
        for edit in self.outputs:
            if isinstance(edit, Silence):
                want_TE[:, edit.expert] = 0
            else:
                pair = [edit.first, edit.second]
                want_TE[:, pair] = want_TE[:, pair[::-1]]
        if not torch.equal(dense(*after, self.experts).detach(), want_TE):
            raise self._error("the edited experts alone to change", "others")
        self.calls += 1

    def _error(self, what: str, got: object, field: str = "edits", hint: str = "") -> TraceError:
        return TraceError(f"{self.site}: {expected(what, got, hint)}", field=field)


def editor_of(
    model: nn.Module, site: TracedRouter, sites: Sequence[TracedRouter], edits: Sequence[Edit]
) -> Editor | None:
    """The edits of one router; None: it has none."""
    chosen = [
        edit
        for edit in edits
        if isinstance(edit, Replay) or edit.layer is None or edit.layer == site.layer
    ]
    if not chosen:
        return None
    experts = site.num_choices
    if experts is None:
        what = "a router whose number of experts is configured"
        raise TraceError(f"{site}: {expected(what, 'none')}", field=site.name)
    find_form(site, None)  # raises where nothing can be edited
    editor = Editor(model, site, experts)
    for edit in chosen:
        named = (
            (edit.first, edit.second)
            if isinstance(edit, Exchange)
            else (edit.expert,)
            if isinstance(edit, Silence | Forbid)
            else ()
        )
        for expert in named:
            require(
                0 <= expert < experts,
                f"an expert between 0 and {experts - 1}",
                expert,
                error=TraceError,
                where=site,
                field="expert",
            )
        if isinstance(edit, Forbid):
            editor.forbidden.append(edit.expert)
        elif isinstance(edit, Silence | Exchange):
            editor.outputs.append(edit)
        elif isinstance(edit, TopK):
            editor.top_k, editor.tokens = edit.k, edit.tokens
        else:
            editor.replay = ReplayedTrace(
                edit.trace, site, edit.recorded_weights, edit.first_document
            )
    return editor
