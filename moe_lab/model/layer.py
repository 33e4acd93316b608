"""``MoELayer``: router, experts, shared experts and zero-compute experts as one feed-forward."""

from typing import Literal, overload

from torch import Tensor, nn

from moe_lab.errors import ConfigError, expected, require
from moe_lab.model.config import MoEConfig
from moe_lab.model.dispatch import Choice, auto, backend, choose, native, under_autocast
from moe_lab.model.dispatch.bank import Gating
from moe_lab.model.experts import ExpertBank, SwiGLU
from moe_lab.model.zero_experts import ZeroExperts
from moe_lab.routing import RouterContext, Routing, build_router
from moe_lab.routing.routing import valid_rows


class MoELayer(nn.Module):
    """``y = sum_real w_i E_i(x) + sum_zero w_i Z_i(x) + shared(x)`` for the slots that the router
    selected (see ``ZeroExperts`` for Z).

    Latent experts (``d_latent``): the first sum is ``U rms(sum_real w_i E_i(D x))`` with matrices D
    and U around all experts (Kimi K3).
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config.router, config.d_model)
        limit = float("inf") if config.swiglu_limit is None else config.swiglu_limit
        gating = Gating(limit, config.swiglu_alpha, config.swiglu_offset)
        self.experts = ExpertBank(
            config.router.num_experts,
            config.expert_input_width,
            config.d_expert,
            gating,
            bias=config.expert_bias,
        )
        latent = config.d_latent
        self.latent_down = None if latent is None else nn.Linear(config.d_model, latent, bias=False)
        self.latent_norm = None if latent is None else nn.RMSNorm(latent, eps=1e-6)
        self.latent_up = None if latent is None else nn.Linear(latent, config.d_model, bias=False)
        self.zero_experts = (
            ZeroExperts(config.router.zero_kinds, config.d_model)
            if config.router.num_zero_experts
            else None
        )
        self.shared = (
            SwiGLU(config.d_model, config.num_shared_experts * config.d_expert, gating)
            if config.num_shared_experts
            else None
        )
        self.dispatch = backend(config.dispatch)
        if config.dispatch in ("auto", "native"):
            # Compile now, not in the first step, and not under ``torch.compile``.
            native.available()

    def backend_name(self, x: Tensor) -> str:
        """The dispatch backend that runs tokens of this device and dtype."""
        return self.backend_choice(x).name

    def backend_choice(self, x: Tensor) -> Choice:
        """``backend_name`` with the reason: the configuration's, or that of "auto"."""
        if self.config.dispatch != "auto":
            return Choice(self.config.dispatch, "it is configured")
        return choose(*under_autocast(x, self.experts))

    @overload
    def forward(
        self,
        x: Tensor,
        context: RouterContext | None = None,
        *,
        return_routing: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, context: RouterContext | None = None, *, return_routing: Literal[True]
    ) -> tuple[Tensor, Routing]: ...
    def forward(
        self, x: Tensor, context: RouterContext | None = None, *, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """[..., D] -> [..., D], on request with the ``Routing`` of the flattened tokens."""
        require(
            x.shape[-1] == self.config.d_model,
            f"a last axis of d_model {self.config.d_model}",
            list(x.shape),
            field="d_model",
        )
        x_TD = x.reshape(-1, x.shape[-1])
        # What padding holds must not reach a product with the gradient of a weight.
        x_TD = x_TD if context is None else valid_rows(x_TD, context.valid)
        routing = self.router(x_TD, context)
        tokens_TD, bank = under_autocast(
            x_TD if self.latent_down is None else self.latent_down(x_TD), self.experts
        )
        # On the meta device only shapes are asked for, which ``auto`` gives without values.
        dispatch = auto if tokens_TD.is_meta else self.dispatch
        y_TD = dispatch(tokens_TD, routing, bank)
        if self.latent_up is not None and self.latent_norm is not None:
            y_TD = self.latent_up(self.latent_norm(y_TD))
        if self.zero_experts is not None:
            y_TD = y_TD + self.zero_experts(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, self._shared_scale(routing))
        y = y_TD.reshape(x.shape)
        return (y, routing) if return_routing else y

    def _shared_scale(self, routing: Routing) -> Tensor | None:
        """[T, hidden width of the shared experts]: their gates, where the router makes them
        (Inkling).
        """
        gates_TS = routing.shared_weights
        if gates_TS is None:
            return None
        if gates_TS.shape[1] != self.config.num_shared_experts:
            raise ConfigError(
                expected(
                    f"num_shared_experts equal to the router's {gates_TS.shape[1]} shared gates",
                    self.config.num_shared_experts,
                ),
                field="num_shared_experts",
            )
        return gates_TS.repeat_interleave(self.config.d_expert, dim=1)
