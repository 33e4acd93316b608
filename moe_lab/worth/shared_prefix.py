"""``SharedPrefix``: one forward pass of the layers below an edited one, for all edits of that
layer.

An edit of a layer changes nothing below it. The outputs of the decoder layers below are kept from
the untouched pass, and in a later pass of the same inputs those layers return them unread.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.patches import set_until


class SharedPrefix:
    """The decoder layers below a router's.

    Attributes:
        layers: those layers, in order; none where the model has no list of layers.
        usable: False where a layer ran several times in the pass, or its output was written into.
    """

    def __init__(self, model: nn.Module, site: TracedRouter) -> None:
        self.layers = _layers_below(model, site.name)
        self.usable = True
        self._outputs: list[Any] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep the layers' outputs of the pass in the block."""
        self._outputs, versions = [], []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._outputs.append(output)
            for item in output if isinstance(output, tuple | list) else (output,):
                if isinstance(item, Tensor):
                    with suppress(RuntimeError):  # inference tensors have no version
                        versions.append((item, item._version))

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        unchanged = all(item._version == version for item, version in versions)
        self.usable = unchanged and len(self._outputs) == len(self.layers)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Passes in the block begin above the layers, where that is possible."""
        with ExitStack() as stack:
            if self.usable:
                for layer, output in zip(self.layers, self._outputs, strict=True):
                    set_until(stack, layer, "forward", _returning(output))
            yield


def _returning(output: Any) -> Any:
    return lambda *args, **kwargs: output


def _layers_below(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    for place, part in enumerate(parts):
        around = model.get_submodule(".".join(parts[:place]))
        if isinstance(around, nn.ModuleList) and part.isdigit():
            return list(around)[: int(part)]
    return []
