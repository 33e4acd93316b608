"""``write_report``: sources in, one offline HTML page out, with the data of each figure as Parquet
beside it.

All text on the page is untrusted; ``document`` escapes and bounds it.
"""

from __future__ import annotations

import base64
import glob
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup, escape

from moe_lab.analysis.map_reduce import is_mapped
from moe_lab.files import remove_temporaries, write_parquet, write_text
from moe_lab.number_format import count_of, listing, magnitude, short_path
from moe_lab.plain_text import on_page
from moe_lab.report.answer_section import answer
from moe_lab.report.comparison_section import comparison_section
from moe_lab.report.compute_section import compute_section, distinct_counts
from moe_lab.report.difficulty_section import difficulty_section
from moe_lab.report.document import document
from moe_lab.report.experts_section import begin_experts, experts_section
from moe_lab.report.figure_blocks import Block, looked_into
from moe_lab.report.frames import Frames
from moe_lab.report.glossary import Marker, glossary
from moe_lab.report.load_section import load_block, load_interval_block
from moe_lab.report.provenance_section import provenance
from moe_lab.report.run_tables import run_rows, runs_section
from moe_lab.report.runs_section import begin_training, frontier_block, training_block
from moe_lab.report.second_process import SecondProcess, second_process
from moe_lab.report.sections import Section, without
from moe_lab.report.serving_section import serving_section
from moe_lab.report.sources import Material, NamedTrace, Source, as_list, gather
from moe_lab.report.text_section import ColouredText, coloured_text
from moe_lab.report.wall_section import judged_runs
from moe_lab.report.worth_section import worth_section

MAX_BYTES = 15_000_000
"""Of a page. What does not fit lies beside it, and the page says so."""
DATA_PLACE = Markup("<!--data-->")


def write_report(
    sources: Source | Sequence[Source],
    path: Path | str,
    title: str | None = None,
    command: str | None = None,
    worth: Path | str | None = None,
    beside: SecondProcess | None = None,
) -> Path:
    """Write the page and ``<page stem>_data/NAME.parquet`` beside it.

    Args:
        sources: a sweep folder, a run folder, a trace folder or an open ``Trace``, or a sequence of
            them.
        path: of the HTML file; an existing one is replaced when the new one is complete.
        title: of the page; made from the sources by default.
        command: what a reader types to make the page again; ``moe-lab report ...`` by default.
        worth: folder of ``moe-lab ablate``; those in the runs' folders by default.
        beside: makes parts of a large page; one that ends with this call by default.

    Returns:
        ``path``.

    Raises:
        RunError: a source is missing or has no finished run, or the page cannot be written.
        TraceError: a trace is damaged.
        AnalysisError: no finished measurement in ``worth``.
    """
    if beside is None:
        from moe_lab.trace.reader import fetched_once

        with (
            fetched_once(as_list(sources)) as once,
            second_process(once, wanted=not is_mapped()) as beside,
        ):
            return write_report(once, path, title, command, worth, beside)
    path = Path(path)
    material = gather(sources, beside)
    names = [
        str(source if isinstance(source, str | Path) else source.folder)
        for source in as_list(sources)
    ]
    command = command or shlex.join(["moe-lab", "report", *names, "--out", str(path)])
    title = title or f"moe_lab report: {short_path(names[0])}" + (
        f" and {count_of(len(names) - 1, 'other')}" if names[1:] else ""
    )
    folder = None if worth is None else Path(worth)
    draw_page(material, Frames(), path, title=title, command=command, worth=folder, beside=beside)
    return path


def draw_page(
    material: Material,
    frames: Frames,
    path: Path,
    *,
    title: str,
    command: str,
    worth: Path | None = None,
    beside: SecondProcess | None = None,
) -> None:
    """Write the page and its data; what ``frames`` holds already is not computed again."""
    folder = data_folder(path)
    content = _content(material, frames, command, worth, beside or SecondProcess())
    remove_temporaries(path.parent, glob.escape(path.name))
    remove_temporaries(folder)
    data = content.pop("data")
    with ThreadPoolExecutor(1) as pool:  # which waits for the disk meanwhile
        written = pool.map(lambda pair: write_parquet(folder / f"{pair[0]}.parquet", pair[1]), data)
        page = render(title=title, command=command, data_folder=folder.name, **content)
        list(written)
    sizes = {name: (folder / f"{name}.parquet").stat().st_size for name, _ in data}
    write_text(path, page.replace(DATA_PLACE, _data_within(folder, sizes, len(page.encode()))))


def _data_within(folder: Path, sizes: Mapping[str, int], taken: int) -> str:
    """The data files that a page of ``taken`` bytes has room for, the smallest first, and a
    sentence on the others.
    """
    held, beside = [], []
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        taken += 4 * (sizes[name] + 2) // 3 + 120
        (held if taken < MAX_BYTES else beside).append(name)
    elements = [
        f'<script type="application/octet-stream" id="data-{escape(name)}">'
        f"{base64.b64encode((folder / f'{name}.parquet').read_bytes()).decode('ascii')}</script>"
        for name in held
    ]
    where = "The data of all its figures are inside it, as Parquet."
    if beside:
        files = listing([f"{name}.parquet ({magnitude(sizes[name])} bytes)" for name in beside])
        where = Markup("Beside it, in {}, lie {}: they would make it larger than {} bytes.").format(
            on_page(folder.name), on_page(files), magnitude(MAX_BYTES)
        )
    return f"<p>{where}</p>" + "".join(elements)


def render(**values: Any) -> str:
    """The page of template ``page.html.j2`` with ``values``, its style and its scripts."""
    marked = Marker(glossary(), values.pop("rows"))
    return document(
        "page.html.j2",
        ("theme.js", "page.js"),
        filters={"marked": marked, "linked": marked.linked},
        terms=marked.used,
        data_place=DATA_PLACE,
        **values,
    )


def _content(
    material: Material,
    frames: Frames,
    command: str,
    worth: Path | None,
    beside: SecondProcess,
) -> dict[str, Any]:
    of_runs = material.about == "sweep"
    judging = beside.begin(judged_runs, material.table, of_runs, frames=frames)
    begin_training(material, frames)
    of_tokens = tuple(named for named in material.traces if named.trace.meta.per_token)
    experts = begin_experts(of_tokens, beside, frames)
    of_compute = tuple(named for named in of_tokens if named.trace.meta.zero_experts_known)
    compute = compute_section(of_compute, frames)
    coloured = _coloured(of_compute, compute.first, frames)
    difficulty = difficulty_section(compute.first, frames)
    serving = tuple(serving_section(replace(material, traces=of_compute), frames))
    loads = _drawn(
        ("", load_block(material, frames)),
        ("Unevenness over depth", load_interval_block(material, frames)),
    )
    training = _drawn(("", training_block(material, frames)))
    provenances = provenance(material, command)
    of_each_run = runs_section(material, command)
    whose = tuple(experts_section(of_tokens, experts, frames))
    judged = judging()
    sections = [
        comparison_section(material.traces, frames),
        Section(
            "frontier",
            "Loss and ratio",
            "Loss against the total:active ratio",
            (
                *(_drawn(("", frontier_block(material, judged.evidence))) if of_runs else ()),
                *judged.blocks,
            ),
            folded=judged.folded,
            sense="verdict",
        ),
        Section(
            "load",
            "Expert load",
            "Load of every expert",
            loads,
        ),
        Section(
            "compute",
            "Compute" if compute.first else "Certainty",
            "ffn_count: real experts per token" if compute.first else "Certainty of the router",
            compute.blocks,
            (compute.fixed,) if compute.fixed else (),
            sense="token",
        ),
        Section(
            "whose",
            "Whose experts",
            "Whose experts",
            whose,
        ),
        Section(
            "serving",
            "Serving",
            "Serving",
            serving,
        ),
        worth_section(material, worth),
        Section("text", "Coloured text", "Validation text, coloured", coloured=coloured),
        difficulty,
        Section("training", "Training", "Training", training),
        of_each_run,
        provenances,
    ]
    kept = [section for section in sections if section is not None]
    if material.about == "run":  # the curves of a single run come first
        kept.sort(key=lambda section: section.anchor != "training")
    blocks = {block.name: block for section in kept for _, block in section.blocks}
    first = answer(material, judged.study, blocks, frames)
    shown = without(kept, first.lead)
    runs = [("runs", material.all_runs)] if material.runs else []
    parts = [text.data.select(pl.lit(text.label).alias("run"), pl.all()) for text in coloured]
    data = (
        runs
        + [(block.name, block.data) for block in blocks.values()]
        + ([("coloured_text", pl.concat(parts, how="diagonal"))] if coloured else [])
    )
    return {
        "answer": first.leading_to(shown),
        "sections": shown,
        "data": data,
        "rows": run_rows(material),
    }


def _drawn(*pairs: tuple[str, Block | None]) -> tuple[tuple[str, Block], ...]:
    return tuple((heading, block) for heading, block in pairs if block is not None)


def _coloured(
    traces: Sequence[NamedTrace], varying: NamedTrace | None, frames: Frames
) -> tuple[ColouredText, ...]:
    """Of the first run in which ffn_count varies, else of the traces that are looked into."""
    of_run = varying is not None and varying.run is not None
    texts = [
        coloured_text(named, frames, fixed=len(frames(distinct_counts, named)) == 1)
        for named in ([varying] if of_run and varying else looked_into(traces))
    ]
    return tuple(text for text in texts if text is not None)


def data_folder(path: Path) -> Path:
    """Where the data of the page at ``path`` lie."""
    return path.with_name(f"{path.stem}_data")
