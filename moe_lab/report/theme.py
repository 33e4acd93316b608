"""One palette for the page and its figures: CSS variables, and a light and a dark plotly template.

The figures carry no colours of their own paper or ink: both come from the template, so a page
changes between light and dark by changing the template alone. The series colours are mid-tones that
keep a contrast of at least 3 to both papers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SERIES = ("#2f79c4", "#cf5d22", "#1f9268", "#a35bb5", "#8a7a1c", "#c8437a", "#14909c", "#7d7f88")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "triangle-down", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
DEAD = "#d6247f"


@dataclass(frozen=True)
class Palette:
    """The colours of one theme, as CSS hex strings.

    ``tints`` go under text, from few to many; ``diverging`` is centred.
    """

    paper: str
    raised: str
    ink: str
    muted: str
    line: str
    accent: str
    tints: tuple[str, ...]
    diverging: tuple[str, ...]


LIGHT = Palette(
    paper="#fdfdfb",
    raised="#f3f3ef",
    ink="#1c1e21",
    muted="#565c64",
    line="#d5d7d3",
    accent="#1f5fa8",
    tints=("#faf4dc", "#e6f0c4", "#c4e3c2", "#98d0c3", "#70b9cb", "#62a0d2", "#7289cf"),
    diverging=("#1b4b87", "#6fa0d2", "#efeeea", "#e3a063", "#94390b"),
)
DARK = Palette(
    paper="#15171a",
    raised="#1e2125",
    ink="#e7e5e0",
    muted="#a6acb4",
    line="#383d44",
    accent="#86b6ef",
    tints=("#2a2b24", "#2b3a2c", "#22493f", "#1c5656", "#1f5f75", "#315f95", "#5355a0"),
    diverging=("#8fc3ff", "#3f74b0", "#2c2f34", "#b8682d", "#ffb878"),
)
PALETTES = {"light": LIGHT, "dark": DARK}


def css_variables() -> dict[str, str]:
    """CSS custom properties that follow the page's ``color-scheme``, by name."""
    names = ("paper", "raised", "ink", "muted", "line", "accent")
    variables = {
        name: f"light-dark({getattr(LIGHT, name)}, {getattr(DARK, name)})" for name in names
    }
    pairs = enumerate(zip(LIGHT.tints, DARK.tints, strict=True))
    return (
        variables
        | {f"tint-{index}": f"light-dark({light}, {dark})" for index, (light, dark) in pairs}
        | {"dead": DEAD}
    )


def template_values(name: str) -> dict[str, Any]:
    """``template`` as plain values."""
    return {"layout": _layout(PALETTES[name])}


def template(name: str) -> go.layout.Template:
    """The plotly template of theme ``name`` ("light" or "dark"); plotly knows them as
    ``moe_lab_light`` and ``moe_lab_dark``.
    """
    return _templates()[name]


@cache
def _templates() -> dict[str, go.layout.Template]:
    import plotly.graph_objects as go
    import plotly.io as pio

    made = {name: go.layout.Template(template_values(name)) for name in PALETTES}
    for name, value in made.items():
        pio.templates[f"moe_lab_{name}"] = value
    return made


def _layout(palette: Palette) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "automargin": True,
        "gridcolor": palette.line,
        "linecolor": palette.muted,
        "tickcolor": palette.muted,
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "title": {"standoff": 8},
    }
    bar = {
        "outlinewidth": 0,
        "thickness": 12,
        "ticks": "outside",
        "ticklen": 3,
        "tickcolor": palette.muted,
    }
    steps = len(palette.diverging) - 1
    return {
        "font": {"family": FONT, "size": 13, "color": palette.ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": SERIES,
        "xaxis": axis,
        "yaxis": axis,
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
        },
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8, "pad": 0},
        "hoverlabel": {
            "bgcolor": palette.raised,
            "bordercolor": palette.muted,
            "font": {"color": palette.ink},
            "namelength": -1,
        },
        "coloraxis": {
            "colorscale": [
                [index / steps, colour] for index, colour in enumerate(palette.diverging)
            ],
            "colorbar": bar,
        },
    }
