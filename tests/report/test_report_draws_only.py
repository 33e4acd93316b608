"""The report draws: analysis and scaling compute statistics once, as frames that it draws."""

import ast
import re
from pathlib import Path

import moe_lab.report
from moe_lab.report.frames import Frames
from moe_lab.report.page import draw_page
from moe_lab.report.sources import gather

PACKAGE = Path(moe_lab.report.__file__).parent
STATISTICS = re.compile(
    r"random|default_rng|quantile|percentile_interval|bootstrap|polyfit|stdtr|ndtri|corr|rank"
    r"|simulat|lstsq|std|var"
)


def test_no_module_of_the_report_draws_numbers_or_computes_a_statistic():
    """``rank`` in a sentence is text; a call or an import of it is a statistic."""
    named = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Call):
                function = node.func
                names = [getattr(function, "attr", getattr(function, "id", ""))]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
            named += [(path.name, name) for name in names if STATISTICS.fullmatch(name)]
    assert not named


def test_a_page_drawn_again_from_its_frames_computes_nothing(sweep, tmp_path):
    frames, material = Frames(), gather(sweep)
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    draw_page(material, frames, first, title="t", command="c")
    kept = dict(frames._kept)
    draw_page(material, frames, second, title="t", command="c")
    assert frames._kept == kept
    assert len(kept) > 10
    assert second.read_text() == first.read_text().replace("first_data", "second_data")


def test_frames_are_told_apart_by_subject_and_options():
    calls = []

    def analysis(subject, *, level=0.5):
        calls.append((subject, level))
        return len(calls)

    frames, one, other = Frames(), [1], object()
    assert [frames(analysis, one), frames(analysis, one), frames(analysis, other)] == [1, 1, 2]
    assert frames(analysis, one, level=0.9) == 3
    assert frames(analysis, [1]) == 1, "a list is told by what it holds"
