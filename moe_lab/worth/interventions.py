"""``intervene``: the routing of a model changed for the time of a block, on any model whose routers
``moe_lab.trace.capture`` supports.

Every call is checked: an edit that did not take place raises. Parameters, buffers and hooks of the
model are as before on leaving, also after an exception.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from moe_lab.errors import TraceError, require
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.hooks import Hooks, Pass
from moe_lab.trace.capturing.router_output import Reader
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.edits import Edit, Replay
from moe_lab.worth.router_editor import Editor, editor_of


@contextmanager
def intervene(
    model: nn.Module,
    *edits: Edit,
    readers: Mapping[str, Reader] | None = None,
    only: str | None = None,
) -> Iterator[None]:
    """Change the routing of ``model`` for the time of a block.

    Args:
        edits: layers are numbered as ``capture`` numbers them (where some layers run several
            times, by the layer of the model; an edit holds for each of its runs).
        readers, only: as for ``capture``.

    Raises:
        TraceError: naming the router, where an edit cannot be made or did not take place; a layer
            or expert that is not there; no call of an edited router within the block.

    Example:
        >>> with intervene(model, Forbid(layer=3, expert=17)), torch.no_grad():
        ...     loss = model(ids, labels=ids).loss
    """
    sites, _ = find_sites(model, readers, only)
    changed = [
        editor for site in sites if (editor := editor_of(model, site, sites, edits)) is not None
    ]
    _check_layers(sites, edits)
    hooks = Hooks(model, [editor.site for editor in changed], _all_ran(changed), ratio=False)
    with ExitStack() as stack:
        stack.callback(hooks.remove)
        for place, editor in enumerate(changed):
            editor.enter(stack, lambda place=place: _calls(hooks, place))
        yield
        for editor in changed:
            require(
                editor.calls,
                f"a forward pass through {editor.site} while its routing is edited",
                "none",
                error=TraceError,
                field="edits",
            )


def _calls(hooks: Hooks, place: int) -> tuple[Pass | None, int]:
    running = hooks.running
    return running, 0 if running is None else len(running.calls.get(place, []))


def _all_ran(changed: Sequence["Editor"]) -> Callable[[Pass, Any], None]:
    def done(running: Pass, output: Any) -> None:
        for place, editor in enumerate(changed):
            require(
                running.calls.get(place),
                f"a call of {editor.site} in each forward pass",
                "a pass without one",
                error=TraceError,
                field="edits",
            )

    return done


def _check_layers(sites: Sequence[TracedRouter], edits: Sequence[Edit]) -> None:
    require(edits, "at least one edit", "none", error=TraceError, field="edits")
    layers = {site.layer for site in sites}
    for edit in edits:
        layer = None if isinstance(edit, Replay) else edit.layer
        require(
            layer is None or layer in layers,
            f"a layer among {sorted(layers)}",
            layer,
            error=TraceError,
            field="layer",
        )
