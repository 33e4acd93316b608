"""Hooks on a model's routers: what each of them saw in the forward pass that is running.

A pass begins and ends with the outermost module around the routers that is called. Calls outside a
pass are not kept: activation checkpointing runs routers again in the backward pass, and those runs
are no decisions.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.errors import TraceError, expected, require
from moe_lab.trace.capturing.find_routers import paths_above
from moe_lab.trace.capturing.model_inputs import Inputs
from moe_lab.trace.capturing.traced_router import TracedRouter

Call = dict[str, Any]


@dataclass
class Pass:
    """One running forward pass: its inputs, and for each router (by place in the list of sites)
    what its calls saw.
    """

    inputs: Inputs = field(default_factory=Inputs)
    calls: dict[int, list[Call]] = field(default_factory=dict)
    waiting: dict[int, Call] = field(default_factory=dict)
    versions: list[tuple[Tensor, int, int]] = field(default_factory=list)
    ratios: dict[int, list[Tensor]] = field(default_factory=dict)
    depth: int = 0


class Hooks:
    """Registers the hooks; ``done(pass, outputs of the outermost module)`` is called at the end of
    each pass in which a router ran.

    Args:
        model: the whole model.
        sites: its routers.
        done: what to do with a pass.
        ratio: also take the norm of the experts' output over that of their input.
        wanted: asked when a pass begins; the calls of a pass that is not wanted are not kept.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[TracedRouter],
        done: Callable[[Pass, Any], None],
        ratio: bool,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.sites, self.done, self.wanted = sites, done, wanted
        self._local = threading.local()  # replicas of DataParallel run in threads
        self._handles: list[Any] = []
        named = dict(model.named_modules())
        for place, site in enumerate(sites):
            self._handles.append(
                site.module.register_forward_hook(self._seen(place), with_kwargs=True)
            )
            for label, module in site.taps.items():
                self._handles.append(
                    module.register_forward_hook(self._tapped(place, label), with_kwargs=True)
                )
            if ratio:
                target = self._bank(site, named)
                self._handles.append(
                    target.register_forward_hook(self._ratio(place), with_kwargs=True)
                )
        # After the routers' own: where the router is the whole model, its pass must end last.
        for name in _around([site.name for site in sites]):
            module = named[name]
            self._handles.append(
                module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
            )
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def running(self) -> Pass | None:
        """The pass that is running in this thread."""
        return getattr(self._local, "running", None)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.running is None:
            if not self.wanted():
                return
            self._local.running = Pass()
        running = self._local.running
        running.depth += 1
        running.inputs.see(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        running = self.running
        if running is None:
            return
        running.depth -= 1
        if running.depth:
            return
        self._local.running = None
        if output is not None and running.calls:  # None: the forward pass raised
            self.done(running, output)

    def _seen(self, place: int) -> Callable[[nn.Module, tuple, dict, Any], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            running = self.running
            if running is None:
                return
            call = running.waiting.pop(place, {})
            call |= {"module": module, "input": args, "kwargs": kwargs, "output": output}
            running.calls.setdefault(place, []).append(call)
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor) and not tensor.is_inference():
                    running.versions.append((tensor, tensor._version, place))

        return hook

    def _tapped(self, place: int, label: str) -> Callable[[nn.Module, tuple, dict, Any], None]:
        """A child called inside a block is seen before the block ends, one called after a router is
        seen after it.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            running = self.running
            if running is None:
                return
            seen = {f"{label} input": (*args, *kwargs.values()), f"{label} output": output}
            calls = running.calls.get(place)
            if calls and f"{label} input" not in calls[-1]:
                calls[-1].update(seen)
            else:
                running.waiting[place] = seen

        return hook

    def _ratio(self, place: int) -> Callable[[nn.Module, tuple, dict, Any], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            running = self.running
            if running is None:
                return
            given = next(
                (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None
            )
            made = output[0] if isinstance(output, tuple) else output
            if given is None or not isinstance(made, Tensor) or made.numel() != given.numel():
                raise TraceError(
                    expected(
                        f"an output of the size of its input from the experts of "
                        f"{self.sites[place].name!r}",
                        "another",
                    )
                )
            norms = [
                value.detach().reshape(-1, value.shape[-1]).float().norm(dim=1)
                for value in (made, given)
            ]
            running.ratios.setdefault(place, []).append(
                norms[0] / norms[1].clamp_min(torch.finfo(torch.float32).tiny)
            )

        return hook

    @staticmethod
    def _bank(site: TracedRouter, named: dict[str, nn.Module]) -> nn.Module:
        """The experts beside a router where they map [T, D] to [T, D], else the block that holds
        both.
        """
        block = named[next(paths_above(site.name), "")]
        experts = dict(block.named_children()).get("experts")
        return experts if experts is not None and site.taps.get("experts") is experts else block


def unchanged(running: Pass, sites: Sequence[TracedRouter]) -> None:
    """Raise ``TraceError`` if the model changed the output of a router in place during the pass."""
    for tensor, version, place in running.versions:
        with suppress(RuntimeError):
            require(
                tensor._version == version,
                f"the outputs of {sites[place].name!r} to stay as they were returned",
                "outputs changed in place",
                error=TraceError,
                field="outputs",
            )


def _around(names: Sequence[str]) -> list[str]:
    """Modules that hold all of ``names``, the outermost ("") first: of a model with one router, not
    the router itself unless it is all.
    """
    common = names[0]
    while common and not all(name == common or name.startswith(common + ".") for name in names):
        common = common.rpartition(".")[0]
    around = [common] if common not in names or not common else []
    return [*around, *paths_above(common)][::-1]
