"""The verdict on the sparsity wall as a page says it, and its evidence as figures and tables, drawn
from a `scaling.WallStudy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from moe_lab.errors import MoELabError
from moe_lab.number_format import NOTHING, count_of, decimal, listing, magnitude
from moe_lab.report import wall_figures as draw
from moe_lab.report.canvas import Canvas
from moe_lab.report.figure_blocks import Block, Plot, Table, Variant, in_words, table_of
from moe_lab.report.frames import Frames
from moe_lab.report.sections import Folded

if TYPE_CHECKING:
    from moe_lab.scaling import WallStudy

ALMOST = 0.03
"""A share of simulated sweeps this near to 0 or 1 counts as never or always: its interval."""
TITLES = {
    "wall_compute": "Compute saved, beside published frontiers",
    "law_fit": "The law that follows these runs best",
    "wall_gain": "Gain per doubling, against the margin",
    "wall_elasticity": "Elasticity",
    "wall_power": "What this grid could tell",
    "against_experts": "Instead of more experts",
}
COMPUTE_CAPTION = (
    "Compute saved is exp(gain / (dL/dlnC)) with dL/dlnC = {slope:z.3f}; bars are 90 % intervals. "
    "Published: the laws of Ludziejewski and Ling at this size and budget, Clark's S-BASE at 15M "
    "and 1.3B (there compute is parameters), Kimi K2's slope (8-48); the column beyond of the data "
    "says where a law leaves the runs it was fitted on. Marin's frontier is of other text, tokens "
    "and sizes: compare its slope, not its level."
)
LAW_CAPTION = (
    "Every run of the largest budget and, of {count} laws of the ratio alone, the one with the "
    "smallest AICc. R2 {r2:.3f}; rmse {rmse:.4f} nats{seeds}; {held}. AICc above it: {rivals}. "
    "Drawn without interval: moe-lab scaling fit gives those of the coefficients. A law that fits "
    "says nothing of ratios that were not run."
)
GAIN_CAPTION = (
    "Bars are {level:g} % intervals. Grey: gains worth less than 5 % of compute. W1 asks for every "
    "interval inside the grey from some ratio on; a bar that merely crosses zero proves nothing."
)
ELASTICITY_CAPTION = (
    "How much compute, in per cent, a per cent of ratio is worth over the last two doublings (W3), "
    "with 90 % intervals; published: the same two doublings by Ludziejewski's and Ling's laws "
    "here, and Kimi K2's slope."
)
POWER_CAPTION = (
    "simulated sweeps per point on this grid at {tokens} tokens, noise {noise:.4f} nats ({how}). "
    "Settled: a right verdict, by the truth's own last gain and average over the last two "
    'doublings; "cannot tell" never is one. Below 1M tokens per expert every sweep cannot tell. A '
    "share of .9 has a 90 % interval of ±.03."
)
FORMS_NOTE = (
    "ΔAICc against the best form on all ratios; a break counts when it leads line and power law by "
    "6 (W2). A form that fits is not yet a law: the miss is measured less expected at the largest "
    "ratio, left out of the fit."
)
OPTIMA_NOTE = "This is apart from the verdict: such an optimum exists without any wall."
ALTERNATIVES_CAPTION = (
    "pairs of runs per point: the same seed, the same total parameters (within 2 %), and no more "
    "training FLOPs than the runs with experts. Below 0 the alternative is better. Bars are 95 % "
    "Student t-intervals over the pairs, not corrected for how many there are. {crossings}. "
    "Compute is exp(-difference / (dL/dlnC)) with dL/dlnC = {slope:z.3f}; differences worth less "
    "than 5 % of it count as none."
)


@dataclass(frozen=True)
class JudgedRuns:
    """The study of the finished runs; the error that says why they cannot be judged; None where no
    run has a loss. With its figures under their headings, and what is folded below them.
    """

    study: WallStudy | MoELabError | None
    blocks: tuple[tuple[str, Block], ...] = ()
    folded: tuple[Folded, ...] = ()

    @property
    def evidence(self) -> WallStudy | None:
        """The study, where its figures are drawn."""
        return self.study if self.blocks and not isinstance(self.study, MoELabError) else None


def judged_runs(finished: pl.DataFrame, drawn: bool, frames: Frames | None = None) -> JudgedRuns:
    """Judge ``run_table`` of the finished runs; without figures unless ``drawn``."""
    study = (frames or Frames())(_study, finished)
    if study is None or isinstance(study, MoELabError) or not drawn:
        return JudgedRuns(study)
    blocks, folded = wall_blocks(study), wall_folded(study)
    for name in ("means", "settles"):  # what the first screen asks for
        getattr(study, name)
    return JudgedRuns(study, blocks, folded)


def _study(finished: pl.DataFrame) -> WallStudy | MoELabError | None:
    from moe_lab.scaling import wall_study

    runs = finished.drop_nulls("loss").with_columns(tokens=pl.col("train_tokens"))
    if not runs.height:
        return None
    rated = runs.drop_nulls("ratio")
    try:
        return wall_study(rated if rated.height else runs)
    except MoELabError as error:
        return error


def wall_blocks(study: WallStudy) -> tuple[tuple[str, Block], ...]:
    """Headings and figures of ``study``."""
    blocks = (_compute(study), _law(study), _gain(study), _elasticity(study), _power(study))
    alternatives = _alternatives(study)
    shown = (*blocks, alternatives) if alternatives else blocks
    return tuple((TITLES[block.name], block) for block in shown)


def wall_folded(study: WallStudy) -> tuple[Folded, ...]:
    """Reasons, shapes of the frontier, the best ratio under a constraint (W4) and confounds."""
    verdict, runs = study.verdict, study.judged
    judged = (
        f"Judged on {count_of(runs.height, 'run')} of arm {study.arm or 'without a name'}: "
        f"{count_of(runs['ratio'].n_unique(), 'ratio')}, "
        f"{count_of(runs['seed'].n_unique(), 'seed')}."
    )
    confounds = Table(
        ("confound", "status", "detail"), tuple(study.confounds.rows()), (False, False, False)
    )
    best = tuple(f"Arm {name}: {optimum.sentence}." for name, optimum in study.optima.items())
    parts = [
        Folded("Reasons for the verdict", notes=(judged,), items=verdict.reasons),
        Folded("What else could have made, or hidden, a wall", confounds),
        Folded("Shapes of the frontier", _forms(study), (FORMS_NOTE,)),
    ]
    if best:
        parts.append(Folded("The best ratio under a constraint", notes=(*best, OPTIMA_NOTE)))
    return tuple(parts)


def _block(
    name: str, caption: str, summary: str, canvas: Canvas, data: pl.DataFrame, digits: int
) -> Block:
    """A block of one plot whose table is its data."""
    plot = Plot(summary, (Variant("", canvas),))
    return Block(name, caption, (plot,), data, table_of(data, digits))


def _compute(study: WallStudy) -> Block:
    variants = (
        Variant(
            "compute saved, with published frontiers",
            draw.wall_compute.canvas(study.compute_saved, study.published),
        ),
        Variant(
            "loss against compute, with Marin's frontier",
            draw.wall_loss.canvas(study.best_of_budgets, study.marin),
        ),
    )
    last = study.compute_saved.row(-1, named=True)
    summary = (
        f"At equal loss, ratio {last['ratio']:g} saves a factor of {last['compute']:.2f} of the "
        "compute of the smallest ratio; published frontiers are drawn beside it."
    )
    caption = (
        f"n = {count_of(study.judged.height, 'run')} of arm {study.arm or 'without a name'}. "
        + COMPUTE_CAPTION.format(slope=study.verdict.compute_slope)
    )
    saved = study.compute_saved.with_columns(frontier=pl.lit("this sweep"))
    data = pl.concat([saved, study.published], how="diagonal")
    plot = Plot(summary, variants)
    return Block("wall_compute", caption, (plot,), data, table_of(study.compute_saved))


def _law(study: WallStudy) -> Block:
    from moe_lab.scaling import law_curves

    found, worth = study.law
    drawn = law_curves(found)
    sd = worth.seed_sd
    seeds = f", {worth.rmse / sd:.1f} times the noise between seeds" if sd else ""
    held = (
        f"without ratio {worth.held_out['held_out'][0]:g} it misses that ratio by "
        f"{abs(worth.held_out['bias'][0]):.4f} nats"
        if worth.held_out.height
        else "nothing was held out"
    )
    rivals = [f"{law} {delta:.1f}" for law, delta in worth.rivals.select("law", "delta").rows()]
    law_caption = LAW_CAPTION.format(
        count=worth.rivals.height,
        r2=worth.r2,
        rmse=worth.rmse,
        seeds=seeds,
        held=held,
        rivals=", ".join(rivals[1:]) or "none could be fitted",
    )
    title = found.law.title[:1].upper() + found.law.title[1:]
    caption = f"n = {count_of(found.runs, 'run')}. {title}. {law_caption}"
    canvas = draw.law_fit.canvas(drawn.points, drawn.curves, drawn.variable)
    summary = f"{title} beside its runs; rmse {worth.rmse:.4f} nats."
    return _block("law_fit", caption, summary, canvas, drawn.points, 4)


def _gain(study: WallStudy) -> Block:
    gains = study.verdict.gain_table()
    last = gains.row(-1, named=True)
    summary = (
        f"The last doubling bought {last['gain']:z.4f} nats ({last['lo']:z.4f} to "
        f"{last['hi']:z.4f}); the margin is {last['margin']:z.4f}."
    )
    level = 100 * study.verdict.confidence
    caption = f"n = {count_of(gains.height, 'step')}. {GAIN_CAPTION.format(level=level)}"
    return _block("wall_gain", caption, summary, draw.wall_gain.canvas(gains), gains, 4)


def _elasticity(study: WallStudy) -> Block:
    table, verdict = study.elasticities, study.verdict
    margin = 0.05 / math.log(2)
    low, high = verdict.interval
    summary = (
        f"Elasticity of {table['what'][0]}: {verdict.elasticity:z.2f}, {low:z.2f} to {high:z.2f}; "
        f"the margin is {margin:.2f}."
    )
    caption = f"n = {count_of(study.judged.height, 'run')}. {ELASTICITY_CAPTION}"
    canvas = draw.wall_elasticity.canvas(table, margin)
    return _block("wall_elasticity", caption, summary, canvas, table, 3)


def _power(study: WallStudy) -> Block:
    noise, known = study.noise
    shown = ("truth", "seeds", "wall", "below_margin", "no_wall", "cannot_tell", "settled")
    table = study.power.select(shown)
    caption = POWER_CAPTION.format(
        tokens=magnitude(study.power["tokens"][0]),
        noise=noise,
        how="as measured here" if known else "typical of the size",
    )
    caption = f"n = {study.power['draws'][0]} {caption}"
    if table["settled"].is_between(ALMOST, 1 - ALMOST).not_().all():
        return in_words("wall_power", f"{_settled_or_not(table)} {caption}", table)
    summary = f"The chance of the right verdict at {noise:.4f} nats of noise, by seeds."
    return _block("wall_power", caption, summary, draw.wall_power.canvas(table), table, 2)


def _settled_or_not(table: pl.DataFrame) -> str:
    """From how many seeds each candidate truth is settled, where it always or never is."""
    least = table.filter(pl.col("settled") > 0.5).group_by("truth").agg(pl.col("seeds").min())
    truths = table["truth"].unique(maintain_order=True).to_list()
    seeds = dict(least.rows())
    settled = [
        f"{truth} from {count_of(seeds[truth], 'seed')}" for truth in truths if truth in seeds
    ]
    never = [truth for truth in truths if truth not in seeds]
    high = f"{table['seeds'].max()} seeds at each ratio"
    parts = [f"settles {listing(settled)}"] if settled else []
    parts += [f"never settles {listing(never)}"] if never else []
    return f"With up to {high}, this grid {' and '.join(parts)}."


def _alternatives(study: WallStudy) -> Block | None:
    """None where no arm is an alternative to experts."""
    from moe_lab.scaling import crossing

    try:
        table = study.alternatives
    except MoELabError:  # an arm of that name in another design, or a sweep that is not at its end
        return None
    if table.is_empty():
        return None
    crossings = "; ".join(
        f"{kind} {crossing(part)}"
        for (kind,), part in table.group_by("alternative", maintain_order=True)
    )
    seeds = table["seeds"]
    number = f"{seeds.min()}" if seeds.n_unique() == 1 else f"{seeds.min()} to {seeds.max()}"
    caption = f"n = {number} " + ALTERNATIVES_CAPTION.format(
        crossings=crossings[:1].upper() + crossings[1:], slope=study.verdict.compute_slope
    )
    summary = f"Loss of each alternative less that of more experts, by ratio: {crossings}."
    canvas = draw.against_experts.canvas(table)
    return _block("against_experts", caption, summary, canvas, table, 4)


def _forms(study: WallStudy) -> Table:
    """AICc on all ratios beside the misses at the ratio that was held out: a form that fits may
    still not foresee.
    """
    missed = {row["form"]: row for row in study.band.forms.iter_rows(named=True)}
    rows = tuple(
        (
            form.name,
            decimal(form.delta_aicc, 1),
            decimal(form.weight, 2),
            NOTHING if form.break_at is None else f"{form.break_at:.3g}",
            decimal(missed[form.name]["error"], 4),
        )
        for form in study.verdict.forms
    )
    return Table(
        ("form", "ΔAICc", "weight", "break at ratio", "miss at the held-out ratio, nats"),
        rows,
        (False, True, True, True, True),
    )
