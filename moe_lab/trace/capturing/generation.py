"""Watching ``model.generate``: which tokens that it feeds are padding after a row has ended, and
which searches cannot be traced.
"""

from typing import Any

from torch import nn

from moe_lab.errors import TraceError, expected, require
from moe_lab.trace.capturing.numbering import Numbering


class Generation:
    """Wraps ``model.generate`` for the time of a capture: rows that have ended are fed padding,
    which must not be counted.
    """

    def __init__(self, model: nn.Module, numbering: Numbering) -> None:
        self.model, self.numbering = model, numbering
        self._watched = False

    def watch(self) -> None:
        original = getattr(self.model, "generate", None)
        if original is None or "generate" in self.model.__dict__:
            return

        def generate(*args: Any, **kwargs: Any) -> Any:
            _refuse(self.model, kwargs)
            self.numbering.ends, self.numbering.rows = _ends(self.model, kwargs), None
            try:
                return original(*args, **kwargs)
            finally:
                self.numbering.ends = self.numbering.rows = None

        self.model.__dict__["generate"] = generate
        self._watched = True

    def leave(self) -> None:
        if self._watched:
            del self.model.__dict__["generate"]
            self._watched = False


def _setting(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    given = kwargs.get("generation_config")
    sources = [
        kwargs.get(name),
        getattr(given, name, None),
        getattr(getattr(model, "generation_config", None), name, None),
    ]
    return next((value for value in sources if value is not None), None)


def _ends(model: nn.Module, kwargs: dict[str, Any]) -> frozenset[int]:
    """Ids that a row is fed only once it has ended, the end itself among them.

    An answer may hold the padding id. It ends a row only where something else than an end of text
    can stop one row before the others.
    """
    names = ["eos_token_id"]
    if any(_setting(model, kwargs, name) for name in ("stop_strings", "stopping_criteria")):
        names.append("pad_token_id")
    values = [_setting(model, kwargs, name) for name in names]
    listed = [value if isinstance(value, list | tuple | set) else [value] for value in values]
    return frozenset(int(item) for items in listed for item in items if item is not None)


def _refuse(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise ``TraceError`` for searches in which a row is not one text from beginning to end."""
    beams = _setting(model, kwargs, "num_beams") or 1
    require(
        beams <= 1,
        "generate() with num_beams=1 under capture()",
        f"num_beams={beams}, which moves texts between rows",
        error=TraceError,
        field="num_beams",
    )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if _setting(model, kwargs, name) is not None:
            raise TraceError(
                expected(
                    "generate() without drafts under capture()",
                    f"{name}, whose rejected tokens are routed too",
                ),
                field=name,
            )
