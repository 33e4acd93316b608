"""Both themes can be read: contrast as WCAG 2.2 defines it."""

import plotly.graph_objects as go
import pytest

from moe_lab.report.theme import DEAD, PALETTES, SERIES, css_variables, template


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", PALETTES)
def test_text_has_a_contrast_of_at_least_four_and_a_half(name: str) -> None:
    palette = PALETTES[name]
    inks = (palette.ink, palette.muted, palette.accent)
    assert (
        min(contrast(ink, paper) for ink in inks for paper in (palette.paper, palette.raised))
        >= 4.5
    )
    assert min(contrast(palette.ink, tint) for tint in palette.tints) >= 4.5


@pytest.mark.parametrize("name", PALETTES)
def test_lines_and_dead_experts_have_a_contrast_of_at_least_three(name: str) -> None:
    assert min(contrast(colour, PALETTES[name].paper) for colour in (*SERIES, DEAD)) >= 3


def test_templates_differ_in_ink_and_share_the_series() -> None:
    light, dark = template("light").layout, template("dark").layout
    assert light.font.color != dark.font.color
    assert light.colorway == dark.colorway == SERIES


def test_plotly_knows_both_templates_by_name() -> None:
    template("light")
    assert (
        go.Figure(layout={"template": "moe_lab_dark"}).layout.template.layout.font.color
        == template("dark").layout.font.color
    )


def test_css_follows_the_colour_scheme() -> None:
    assert css_variables()["paper"] == "light-dark(#fdfdfb, #15171a)"
