"""The atlas of published MoE models: total against active parameters, and sparsity over time, on
one offline page.

    python experiments/atlas.py [--out build/atlas.html]

Writes the page (two interactive figures and the table, nothing loaded from anywhere), and beside
this file ``atlas/models.csv``, the frame they are drawn from. Needs no GPU, no data and no network.
"""

import argparse
from html import escape
from pathlib import Path

import plotly.io as pio
import polars as pl

from moe_lab.accounting import models
from moe_lab.files import atomic_path, write_text
from moe_lab.report.parameter_figures import (
    MARKED,
    atlas,
    sparsity_by_half_year,
    sparsity_over_time,
)

RESULTS = Path(__file__).parent / "atlas"
SHOWN = [
    "name",
    "date",
    "total",
    "active",
    "active_min",
    "active_max",
    "convention",
    "ratio_parameters",
    "ratio_experts",
    "sparsity",
    "source",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/atlas.html"))
    out = parser.parse_args().out
    frame = models()
    with atomic_path(RESULTS / "models.csv") as path:
        rounded = frame.with_columns(pl.col(pl.Float64).round(6))
        rounded.write_csv(path)
    write_text(out, page(frame))
    for line in sentences(frame):
        print(line)
    print(f"{out} and {RESULTS / 'models.csv'}: {len(frame)} models")


def page(frame: pl.DataFrame) -> str:
    figures = [atlas(frame), sparsity_over_time(frame)]
    drawn = [
        pio.to_html(
            figure.update_layout(height=680),
            include_plotlyjs=number == 0,
            full_html=False,
            config={"displaylogo": False},
        )
        for number, figure in enumerate(figures)
    ]
    notes = "".join(f"<p>{escape(line)}</p>" for line in sentences(frame))
    style = (
        "body{font-family:system-ui,sans-serif;margin:1.5rem}"
        "table{border-collapse:collapse;font-size:.85rem}"
        "td,th{padding:.2rem .6rem;text-align:right}td:first-child{text-align:left}"
    )
    title = "<title>Atlas of published MoE models</title>"
    head = f'<meta charset="utf-8">{title}<style>{style}</style>'
    body = f"{drawn[0]}{drawn[1]}{notes}{table(frame)}"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def table(frame: pl.DataFrame) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in SHOWN)
    rows = (
        "".join(f"<td>{escape(cell(value))}</td>" for value in row)
        for row in frame.select(SHOWN).iter_rows()
    )
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sentences(frame: pl.DataFrame) -> list[str]:
    """What is 94 % and 97 % sparse and by which definition, and the range of the models whose count
    of experts varies.
    """
    varying = frame.filter(pl.col("num_zero_experts") > 0).iter_rows(named=True)
    ranges = (
        f"{row['name']}: {1 - row['active_max'] / row['total']:.1%} sparse for a token that runs "
        f"{row['slots']} real experts, "
        f"{1 - row['active_min'] / row['total']:.1%} for one that runs none, "
        f"{row['sparsity']:.1%} at the mean of {row['top_k']:g}"
        for row in varying
    )
    return [*(sentence(frame, level) for level in MARKED), *trend(frame), *ranges]


def trend(frame: pl.DataFrame) -> list[str]:
    """Sparsity by parameters, half-year after half-year."""
    return [
        f"{row['half_year']:%Y-%m} and the five months after: {row['models']} models, median "
        f"{row['median']:.1%}, highest {row['highest']:.1%}; {row['share_94']:.0%} of them at 94 % "
        f"or more, {row['share_97']:.0%} at 97 % or more"
        for row in sparsity_by_half_year(frame).iter_rows(named=True)
    ]


def sentence(frame: pl.DataFrame, level: float) -> str:
    """Which models are at a sparsity, by parameters (1 - active / total) and by experts (1 - k /
    E), to the nearest percent.
    """
    found = {
        what: frame.filter((pl.col(column) - level).abs() <= 0.005)["name"].to_list()
        for what, column in (("by parameters", "sparsity"), ("by experts", "expert_sparsity"))
    }
    return f"{level:.0%} sparse " + "; ".join(
        f"{what}: {', '.join(names) or 'none'}" for what, names in found.items()
    )


if __name__ == "__main__":
    main()
