"""The section on difficulty: layer x alignment map, decile curves, marginal gain, and the verdict
in one sentence with its interval.

Tables of ``moe-lab difficulty RUN`` are drawn where the run's folder holds them; otherwise what a
trace alone can answer is computed here.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from moe_lab.errors import RunError, expected
from moe_lab.number_format import decimal, whole
from moe_lab.report import difficulty_figures as figures
from moe_lab.report.figure_blocks import Block, Plot, Variant, table_of
from moe_lab.report.frames import Frames
from moe_lab.report.sections import Section
from moe_lab.report.sources import NamedTrace
from moe_lab.runs.done_file import check_seal
from moe_lab.runs.layout import STUDY_FOLDER, STUDY_VERDICT
from moe_lab.sandbox import read_parquet

RESAMPLES = 1000


HEADINGS = {
    "difficulty_map": "Within token ids, by layer and alignment",
    "difficulty_curves": "By tenth of difficulty",
    "marginal_gain": "What one more expert is worth",
}


def difficulty_section(varying: NamedTrace | None, frames: Frames) -> Section | None:
    """The section for a trace in which ffn_count varies; None: no trace, or unknown
    tokens.

    With fewer documents than the analysis needs there are no figures, and the sentence says why.
    """
    if varying is None or not varying.trace.meta.has_token_ids:
        return None
    if "token_id" not in varying.trace.tokens.collect_schema():
        return None
    tables = frames(_tables, varying, frames)
    if tables is None:
        return None
    try:
        return _drawn(varying, tables, frames)
    except (pl.exceptions.PolarsError, KeyError, TypeError, ValueError) as error:
        if (folder := _folder(varying)) is None:
            raise
        first = (str(error).splitlines() or [""])[0][:100]
        got = f"others in {folder} ({type(error).__name__}: {first})"
        raise RunError(
            expected("the tables of moe-lab difficulty", got, "running it again")
        ) from None


def _drawn(varying: NamedTrace, tables: dict[str, pl.DataFrame], frames: Frames) -> Section:
    from moe_lab.analysis.difficulty.difficulty_verdict import MIN_EFFECTIVE, study_verdict

    association = tables["association"]
    verdict, sentence = study_verdict(association)
    enough = int(association["n_docs"].max() or 0) >= MIN_EFFECTIVE  # type: ignore[call-overload]
    blocks = [_map_block(association)]
    if tables["curves"].height:
        blocks.append(_curve_block(tables["curves"]))
    if "gains" in tables:
        blocks.append(_gain_block(tables["gains"], frames))
    regret = _regret(tables["gain"], tables["regret"]) if "gain" in tables else ""
    source = (
        "the tables of moe-lab difficulty"
        if _folder(varying)
        else "this trace alone; moe-lab difficulty RUN adds the marginal gain"
    )
    return Section(
        "difficulty",
        "Difficulty",
        "Does compute follow difficulty?",
        tuple((HEADINGS[block.name], block) for block in blocks) if enough else (),
        before=(f"Verdict: {verdict}. {sentence}",),
        after=(*((regret,) if regret else ()), f"Model: {varying.label}; from {source}."),
        sense="verdict",
    )


def _folder(named: NamedTrace) -> Path | None:
    folder = named.run.folder / STUDY_FOLDER if named.run is not None else None
    return folder if folder is not None and (folder / STUDY_VERDICT).is_file() else None


def _tables(named: NamedTrace, frames: Frames) -> dict[str, pl.DataFrame] | None:
    folder = _folder(named)
    if folder is not None:
        paths = sorted(folder.glob("*.parquet"))
        check_seal(folder, [path.name for path in paths], folder / STUDY_VERDICT)
        return {path.stem: read_parquet(path, RunError) for path in paths}
    from moe_lab.analysis.difficulty import difficulty_association, difficulty_curves
    from moe_lab.analysis.difficulty.study import NGRAM
    from moe_lab.errors import AnalysisError

    frame = frames(trace_difficulty, named)
    if frame is None:
        return None
    try:
        return {
            "association": difficulty_association(frame, NGRAM, resamples=RESAMPLES, details=True),
            "curves": difficulty_curves(frame, NGRAM, resamples=RESAMPLES),
        }
    except AnalysisError:
        return None


def trace_difficulty(named: NamedTrace) -> pl.DataFrame | None:
    """``difficulty_frame`` of a trace; None for one of one document or without token ids: there is
    no difficulty without a model then.
    """
    from moe_lab.analysis.difficulty import difficulty_frame
    from moe_lab.errors import AnalysisError, CorpusError

    try:
        return difficulty_frame(named.trace).collect(engine="streaming")
    except (AnalysisError, CorpusError):
        return None


def _map_block(association: pl.DataFrame) -> Block:
    from moe_lab.analysis.difficulty.association import SHOWN

    top = association.filter(pl.col("rho_token").is_not_null())
    lowest, highest = (
        top.select(end("rho_token")).item() if top.height else None for end in (pl.min, pl.max)
    )
    reach = f"{decimal(lowest)} to {decimal(highest)}" if top.height else "not defined"
    caption = (
        "Rank correlation of ffn_count with difficulty within token ids, with 95 % intervals "
        "from resampling whole documents; "
        f"n = {whole(association['n_tokens'].max())} tokens of "  # type: ignore[arg-type]
        f"{whole(association['n_docs'].max())} documents at most. "  # type: ignore[arg-type]
        "Difficulty is cross-fitted trigram surprisal, which the model has no hand in. Read it "
        "against the token that goes in for shallow layers, and against the one to be predicted "
        "for deep ones. The raw correlation, driven by identity and frequency, is in the table."
    )
    shown = association.select(SHOWN)
    summary = (
        f"Correlation of compute with difficulty within token ids by layer and alignment: {reach}."
    )
    return Block(
        "difficulty_map",
        caption,
        (Plot(summary, (Variant("map", figures.difficulty_map.canvas(association)),)),),
        association,
        table_of(shown),
    )


def _curve_block(curves: pl.DataFrame) -> Block:
    variants = tuple(
        Variant(
            f"layer {layer}, {figures.ALIGN_LABELS[str(align)]}",
            figures.difficulty_curves.canvas(part),
        )
        for (layer, align), part in curves.group_by("layer", "align", maintain_order=True)
    )
    caption = (
        "Mean ffn_count by tenth of difficulty, and by tenth of how hard the token is for its "
        "own id (compute less its mean over the id, plus the mean over all). Bars are 95 % "
        "intervals from resampling documents; n = "
        f"{whole(float(curves['n_tokens'].to_numpy().max()))} tokens a tenth at most. Where only "
        "the first curve rises, harder kinds of tokens get more, but not harder tokens."
    )
    summary = "Mean ffn_count by tenth of difficulty, raw and within token ids."
    return Block("difficulty_curves", caption, (Plot(summary, variants),), curves, table_of(curves))


def _gain_block(gains: pl.DataFrame, frames: Frames) -> Block:
    from moe_lab.analysis.difficulty.curves import gain_groups

    groups = frames(gain_groups, gains, RESAMPLES)
    moved = decimal(float(gains["moved"][0]), 2)
    caption = (
        "What one more expert in every layer is worth, by tenth of the ffn_count that the router "
        f"gave; n = {whole(gains.height)} predicted tokens. The same model with the bias of its "
        f"real experts shifted both ways, {moved} experts apart; bars are 95 % intervals from "
        "resampling documents. A router that spends where it matters has a rising curve."
    )
    summary = (
        f"Marginal gain from {decimal(groups['gain'][0], 4)} to {decimal(groups['gain'][-1], 4)} "
        "nats per expert by tenth of ffn_count."
    )
    return Block(
        "marginal_gain",
        caption,
        (Plot(summary, (Variant("gain", figures.marginal_gain.canvas(groups)),)),),
        groups,
        table_of(groups, 4),
    )


def _regret(gain: pl.DataFrame, regret: pl.DataFrame) -> str:
    row = gain.row(0, named=True)
    saved = {name: decimal(value, 4) for name, value in regret.select("allocation", "saved").rows()}
    low, high = decimal(row["rho_token_lo"]), decimal(row["rho_token_hi"])
    rho = f"{decimal(row['rho_token'])} ({low} to {high})"
    return (
        f"Within token ids, ffn_count and marginal gain correlate by {rho}: {row['verdict']}. "
        f"Moving compute between tokens at an equal total would save {saved['greedy']} nats/token "
        f"if the gains were known (an upper bound), {saved['by token id']} by a lookup of token "
        f"ids, and {saved['random']} at random."
    )
