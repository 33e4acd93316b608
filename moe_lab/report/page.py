"""``write_report``: sources in, one offline HTML page out, with the data of each figure as Parquet
beside it.

All text on the page is untrusted: ``plain_text.on_page`` makes it visible and bounds it, and the
template escapes it; JSON inside ``<script>`` is escaped here. A content security policy with the
hashes of the page's own three scripts keeps any other script from running and any request from
leaving.
"""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moe_lab.errors import MoELabError
from moe_lab.files import remove_temporaries, write_parquet, write_text
from moe_lab.number_format import count_of, short_path
from moe_lab.plain_text import on_page
from moe_lab.report import theme
from moe_lab.report.compute_section import compute_section
from moe_lab.report.difficulty_section import difficulty_section
from moe_lab.report.experts_section import experts_section
from moe_lab.report.figure_blocks import Block, representatives
from moe_lab.report.frames import Frames
from moe_lab.report.load_section import load_block, load_interval_block
from moe_lab.report.provenance_section import provenance
from moe_lab.report.run_tables import failed_runs, later_token_note, results_table, unfinished_table
from moe_lab.report.runs_section import frontier_block, training_block
from moe_lab.report.serving_section import serving_section
from moe_lab.report.sources import Material, NamedTrace, Source, as_list, gather
from moe_lab.report.text_section import ColouredText, coloured_text
from moe_lab.report.wall_section import judged_material, verdict_text, wall_section

JSON_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def write_report(
    sources: Source | Sequence[Source],
    path: Path | str,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write the page and ``<page stem>_data/NAME.parquet`` beside it.

    Args:
        sources: a sweep folder, a run folder, a trace folder or an open ``Trace``, or a sequence of
            them.
        path: of the HTML file; an existing one is replaced when the new one is complete.
        title: of the page; made from the sources by default.
        command: what a reader types to make the page again; ``moe-lab report ...`` by default.

    Returns:
        ``path``.

    Raises:
        RunError: a source is missing or has no finished run, or the page cannot be written.
        TraceError: a trace is damaged.
    """
    path = Path(path)
    material = gather(sources)
    names = [
        str(source if isinstance(source, str | Path) else source.folder)
        for source in as_list(sources)
    ]
    command = command or shlex.join(["moe-lab", "report", *names, "--out", str(path)])
    title = title or f"moe_lab report: {short_path(names[0])}" + (
        f" and {count_of(len(names) - 1, 'other')}" if names[1:] else ""
    )
    draw_page(material, Frames(), path, title=title, command=command)
    return path


def draw_page(material: Material, frames: Frames, path: Path, *, title: str, command: str) -> None:
    """Write the page and its data; what ``frames`` holds already is not computed again."""
    folder = _data_folder(path)
    content = _content(material, frames, command)
    remove_temporaries(path.parent, glob.escape(path.name))
    remove_temporaries(folder)
    for name, frame in content.pop("data"):
        write_parquet(folder / f"{name}.parquet", frame)
    write_text(path, render(title=title, command=command, data_folder=folder.name, **content))


def render(**values: Any) -> str:
    """The page of template ``page.html.j2`` with ``values``, its style and its scripts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("moe_lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = script_json
    variables = "".join(f"--{name}:{value};" for name, value in theme.css_variables().items())
    scripts = {name: _template_text(environment, f"{name}.js") for name in ("early", "page")} | {
        "plotly": get_plotlyjs()
    }
    # A closing tag inside a script would end it early; today's plotly.js has none, a later one may.
    scripts = {name: text.replace("</script", "<\\/script") for name, text in scripts.items()}
    return environment.get_template("page.html.j2").render(
        variables=Markup(variables),
        style=Markup(_template_text(environment, "page.css")),
        scripts={name: Markup(text) for name, text in scripts.items()},
        script_hashes=Markup(" ".join(f"'sha256-{_sha256(text)}'" for text in scripts.values())),
        themes={name: theme.template_values(name) for name in theme.PALETTES},
        **values,
    )


def script_json(value: Any) -> Markup:
    """JSON for a ``<script type="application/json">``: nothing in it can close the element or start
    a comment.
    """
    from plotly.utils import PlotlyJSONEncoder

    text = json.dumps(
        _shown(value), cls=PlotlyJSONEncoder, separators=(",", ":"), ensure_ascii=False
    )
    for character, escape in JSON_ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)


def _shown(value: Any) -> Any:
    """``value`` with every text in it as a page shows it; markup of our own stays."""
    if isinstance(value, str):
        return value if isinstance(value, Markup) else on_page(value)
    if isinstance(value, dict):
        return {_shown(key): _shown(entry) for key, entry in value.items()}
    return [_shown(entry) for entry in value] if isinstance(value, list | tuple) else value


def _content(material: Material, frames: Frames, command: str) -> dict[str, Any]:
    study = frames(judged_material, material)
    frontier, load = frontier_block(material, frames), load_block(material, frames)
    load_interval = load_interval_block(material, frames)
    training = training_block(material, frames)
    of_tokens = tuple(named for named in material.traces if named.trace.meta.per_token)
    of_compute = tuple(named for named in of_tokens if named.trace.meta.zero_experts_known)
    compute = compute_section(of_compute, frames)
    experts = experts_section(replace(material, traces=of_tokens), frames)
    serving = serving_section(replace(material, traces=of_compute), frames)
    coloured = _coloured(of_compute, compute.first, frames)
    wall = None if study is None or isinstance(study, MoELabError) else wall_section(study)
    difficulty = difficulty_section(compute.first, frames)
    evidence = wall.blocks if wall else ()
    hard = difficulty.blocks if difficulty else ()
    experts_blocks = [block for _, block in (*experts, *serving)]
    blocks: list[Block] = [
        block
        for block in (
            frontier,
            *evidence,
            load,
            load_interval,
            *compute.blocks,
            *experts_blocks,
            *hard,
            training,
        )
        if block is not None
    ]
    runs = [("runs", material.all_runs)] if material.runs else []
    data = (
        runs
        + [(block.name, block.data) for block in blocks]
        + ([("coloured_text", coloured.data)] if coloured else [])
    )
    return {
        "questions": material.questions,
        "verdict": verdict_text(study),
        "results": results_table(material) if material.finished else None,
        "unfinished": unfinished_table(material),
        "failed": failed_runs(material),
        "meanings": {name: _distinct(material, f"{name}_meaning") for name in ("ratio", "params")},
        "frontier": frontier,
        "wall": wall,
        "load": load,
        "load_interval": load_interval,
        "compute": compute,
        "experts": experts,
        "serving": serving,
        "coloured": coloured,
        "difficulty": difficulty,
        "training": training,
        "later_tokens": later_token_note(material.finished),
        "provenance": provenance(material, command),
        "data": data,
    }


def _coloured(
    traces: Sequence[NamedTrace], varying: NamedTrace | None, frames: Frames
) -> ColouredText | None:
    """Of the first trace in which ffn_count varies, else of the first one."""
    if varying is not None:
        return coloured_text(varying, frames, fixed=False)
    shown = representatives(traces)
    return coloured_text(shown[0], frames, fixed=True) if shown else None


def _distinct(material: Material, key: str) -> list[str]:
    return list(
        dict.fromkeys(str(run.result[key]) for run in material.finished if run.result.get(key))
    )


def _data_folder(path: Path) -> Path:
    return path.with_name(f"{path.stem}_data")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _template_text(environment: Any, name: str) -> str:
    return environment.loader.get_source(environment, name)[0]
