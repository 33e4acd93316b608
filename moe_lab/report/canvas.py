"""The canvas that every figure is drawn on: it collects traces and layout as plain values, for a
page or for a plotly figure.

plotly's own ``add_scatter`` and ``update_layout`` check each value, copy each trace and look up
each axis at every call: a page of sixty figures took four seconds in them. A page takes the plain
values as they are; a function of ``figures`` checks them.
"""

from __future__ import annotations

import base64
import functools
import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self

import numpy as np
import polars as pl
from markupsafe import Markup

from moe_lab.errors import AnalysisError, require
from moe_lab.report.theme import template

if TYPE_CHECKING:
    import plotly.graph_objects as go

P = ParamSpec("P")


class Canvas:
    """An empty figure in the light template: a row of panels that share their y axis, or a column
    that shares its x axis.

    Methods have the names and take the keywords of plotly's own, underscores for nested names
    (``title_text``) included.

    Args:
        shares: of the panels, from the left or from above, adding up to one.
        stacked: the panels are one column.
        gap: between panels, as a share of the whole.

    Attributes:
        in_words: what is so, where the figure would show one colour or nothing; a page writes this
            sentence in place of the figure.
    """

    def __init__(
        self, shares: Sequence[float] = (1.0,), *, stacked: bool = False, gap: float = 0.0
    ) -> None:
        self.in_words = ""
        self._traces: list[dict[str, Any]] = []
        self._layout: dict[str, Any] = {}
        self._panels = len(shares)
        if self._panels == 1:
            return
        # The shared axis is labelled once: below the column, or left of the row.
        divided, shared, labelled = ("y", "x", self._panels) if stacked else ("x", "y", 1)
        room, begin = 1 - gap * (len(shares) - 1), 0.0
        for panel, share in enumerate(shares, start=1):
            end = begin + share * room
            domain = [1 - end, 1 - begin] if stacked else [begin, end]
            self._axis(divided, panel)["domain"] = [max(domain[0], 0.0), min(domain[1], 1.0)]
            begin = end + gap
            self._axis("x", panel)["anchor"] = _name("y", panel)
            self._axis("y", panel)["anchor"] = _name("x", panel)
            if panel != labelled:
                axis = self._axis(shared, panel)
                axis.update(matches=_name(shared, labelled), showticklabels=False)

    def _axis(self, axis: str, panel: int) -> dict[str, Any]:
        return self._layout.setdefault(f"{axis}axis{panel if panel > 1 else ''}", {})

    def _add(self, kind: str, panel: int, values: dict[str, Any]) -> Self:
        place = {"xaxis": _name("x", panel), "yaxis": _name("y", panel)} if self._panels > 1 else {}
        self._traces.append({"type": kind, **place, **_nested(values)})
        return self

    def add_scatter(self, *, panel: int = 1, **values: Any) -> Self:
        return self._add("scatter", panel, values)

    def add_heatmap(self, *, panel: int = 1, **values: Any) -> Self:
        """Cells without a value show nothing at hover."""
        return self._add("heatmap", panel, {"hoverongaps": False} | values)

    def add_hline(self, y: float, *, annotation_text: str | None = None, **values: Any) -> Self:
        """Add a horizontal line across the whole width; its text stands above its right end."""
        if annotation_text is not None:
            place = {
                "x": 1,
                "xref": "x domain",
                "xanchor": "right",
                "y": y,
                "yref": "y",
                "yanchor": "bottom",
            }
            self._layout.setdefault("annotations", []).append(
                {"text": annotation_text, "showarrow": False, **place}
            )
        return self._shape("line", {"y0": y, "y1": y} | values, across="x")

    def add_vline(self, x: float, **values: Any) -> Self:
        return self._shape("line", {"x0": x, "x1": x} | values, across="y")

    def add_hrect(self, y0: float, y1: float, **values: Any) -> Self:
        return self._shape("rect", {"y0": y0, "y1": y1} | values, across="x")

    def add_vrect(self, x0: float, x1: float, **values: Any) -> Self:
        return self._shape("rect", {"x0": x0, "x1": x1} | values, across="y")

    def _shape(self, kind: str, values: dict[str, Any], across: str) -> Self:
        along = "y" if across == "x" else "x"
        ends = {
            f"{across}0": 0,
            f"{across}1": 1,
            f"{across}ref": f"{across} domain",
            f"{along}ref": along,
        }
        self._layout.setdefault("shapes", []).append({"type": kind, **ends, **_nested(values)})
        return self

    def update_xaxes(self, *, panel: int | None = None, **values: Any) -> Self:
        """Change the axes of one panel, or of all."""
        return self._update_axes("x", panel, values)

    def update_yaxes(self, *, panel: int | None = None, **values: Any) -> Self:
        """Change the axes of one panel, or of all."""
        return self._update_axes("y", panel, values)

    def _update_axes(self, axis: str, panel: int | None, values: dict[str, Any]) -> Self:
        for number in range(1, self._panels + 1) if panel is None else (panel,):
            _merge(self._axis(axis, number), _nested(values))
        return self

    def update_layout(self, **values: Any) -> Self:
        _merge(self._layout, _nested(values))
        return self

    @property
    def height(self) -> int:
        """Height in pixels; 400 unless ``update_layout`` sets another."""
        return self._layout.get("height", 400)

    def figure(self) -> go.Figure:
        """The plotly figure, in the light template.

        ``plotly`` is imported on the first call; it raises ``ValueError`` for what it does not
        know.
        """
        import plotly.graph_objects as go

        return go.Figure(
            {"data": self._traces, "layout": {"template": template("light"), **self._layout}}
        )

    def spec(self) -> dict[str, Any]:
        """The figure as plotly.js reads it, without a template."""
        return {
            "data": [
                {name: packed(value) for name, value in trace.items()} for trace in self._traces
            ],
            "layout": self._layout,
        }


class Drawn(Generic[P]):
    """A function that draws on a canvas, called as one that returns a plotly figure; ``canvas``
    calls it as it is.
    """

    def __init__(self, draw: Callable[P, Canvas]) -> None:
        self.canvas = draw
        functools.update_wrapper(self, draw)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> go.Figure:
        return self.canvas(*args, **kwargs).figure()


def drawn(draw: Callable[P, Canvas]) -> Drawn[P]:
    """Decorator that makes a function a ``Drawn``."""
    return Drawn(draw)


def need(frame: pl.DataFrame, *columns: str) -> None:
    """Raise ``AnalysisError`` unless the frame has rows and these columns."""
    missing = [column for column in columns if column not in frame.columns]
    require(
        not missing and frame.height,
        f"a frame with rows and columns {', '.join(columns)}",
        f"{frame.height} rows without {missing or 'none'}",
        error=AnalysisError,
        field=missing[0] if missing else "rows",
    )


def error_bars(
    frame: pl.DataFrame, value: str, low: str, high: str, **style: Any
) -> dict[str, Any] | None:
    """Bars from ``low`` to ``high`` around column ``value``; None without these columns."""
    if {low, high} - set(frame.columns):
        return None
    ends = {
        "array": (frame[high] - frame[value]).to_list(),
        "arrayminus": (frame[value] - frame[low]).to_list(),
    }
    return {"type": "data", "symmetric": False, **ends, **style}


def interval_text(low: float | None, high: float | None, digits: int) -> str:
    """For hover texts, in which plotly writes a missing number as 0 or NaN."""
    if low is None or high is None:
        return "no interval"
    return f"{low:.{digits}f} to {high:.{digits}f}"


def evenly(size: int, most: int) -> list[int]:
    """At most ``most`` evenly spaced numbers below ``size``, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(most, size)).round().astype(int)).tolist()


def plain(text: object) -> str:
    """Text that plotly shows as it is: its pseudo-HTML is escaped."""
    return html.escape(str(text), quote=False)


def packed(value: Any) -> Any:
    """An array of numbers as plotly.js takes it: the bytes in base64."""
    if not isinstance(value, np.ndarray) or value.dtype.str[1:] not in _DTYPES:
        return value
    shape = {"shape": ", ".join(map(str, value.shape))} if value.ndim > 1 else {}
    numbers = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
    return {
        "dtype": value.dtype.str[1:],
        "bdata": Markup(base64.b64encode(numbers.tobytes()).decode("ascii")),  # kept whole
        **shape,
    }


_DTYPES = frozenset({"i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"})


def _name(axis: str, panel: int) -> str:
    return axis if panel == 1 else f"{axis}{panel}"


_WHOLE = frozenset({"error_x", "error_y"})
"""Names of plotly's with an underscore that nests nothing."""


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """``{"title_text": t}`` as ``{"title": {"text": t}}``; what is None is left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        outer, _, inner = (name, "", "") if name in _WHOLE else name.partition("_")
        _merge(found, {outer: {inner: value}} if inner else {outer: value})
    return found


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value
