"""Llama 4: top k of the logits (k = 1 in the release), sigmoid of the selected logits, multiplied
into the expert's INPUT.

``y = E_i(sigmoid(l_i) x)``: with a SwiGLU expert this is not the same as scaling the output.
``Routing.weights_on_input`` says so.
"""

from dataclasses import replace

from torch import Tensor

from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.token_choice import TokenChoice
from moe_lab.routing.routing import Routing


@register("llama4")
class Llama4(TokenChoice):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        return replace(super().route(logits_TE, context), weights_on_input=True)
