"""Frames in, plotly figures and one offline HTML page out: ``figures.*`` and ``write_report``."""

from typing import TYPE_CHECKING

from moe_lab.lazy import on_first_use

if TYPE_CHECKING:
    from moe_lab.report import figures
    from moe_lab.report.page import write_report

__getattr__ = on_first_use(__name__, {"figures": (), "page": ("write_report",)})

__all__ = ["figures", "write_report"]
