"""The first screen of a page: its question, the answer in one sentence with its interval, the
figure that shows it, and up to three cards. What they are depends on what the page is about: a
sweep, one run, a trace, or several traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import polars as pl

from moe_lab.errors import MoELabError
from moe_lab.number_format import count_of, decimal, listing, magnitude, whole
from moe_lab.report.figure_blocks import Block
from moe_lab.report.frames import Frames
from moe_lab.report.sections import Answer, Card
from moe_lab.report.sources import Material, NamedTrace
from moe_lab.runs import RunRecord, RunState
from moe_lab.runs.record import number

if TYPE_CHECKING:
    from moe_lab.scaling import WallStudy

QUESTIONS = {
    "sweep": "How does the loss change with the ratio of total to active experts?",
    "run": "How did this run train, and how even is the load of its experts?",
    "trace": "Which experts did the tokens of this trace go to?",
    "traces": "What differs between these traces?",
}
CARDS = {
    "frontier": ("Loss against ratio", "frontier"),
    "compare": ("Change over depth", "compare"),
    "load_shift": ("Change of the experts", "compare"),
    "load_interval": ("Evenness of the load", "load"),
    "expert_load": ("Expert load", "load"),
    "class_profile": ("By class of token", "compute"),
    "coactivation": ("Experts that run together", "whose"),
}
"""Block -> title of its card, and the section that it jumps to."""
CARDS_OF = {
    "sweep": ("frontier", "load_interval", "class_profile", "expert_load"),
    "run": ("load_interval", "class_profile", "expert_load"),
    "trace": ("expert_load", "class_profile", "coactivation"),
    "traces": ("load_shift", "load_interval", "class_profile"),
}
LEADS = {
    "sweep": ("frontier", "training_curves"),
    "run": ("training_curves", "load_interval", "expert_load"),
    "trace": ("load_interval", "expert_load"),
    "traces": ("compare", "load_shift", "load_interval", "expert_load"),
}
"""The figure of the first screen: the first of these that the page has."""


def answer(
    material: Material,
    study: WallStudy | MoELabError | None,
    blocks: Mapping[str, Block],
    frames: Frames,
) -> Answer:
    """The first screen; ``blocks`` are the figures of the page by name."""
    about = material.about
    drawn = {name: block for name, block in blocks.items() if block.plots}
    lead = next((drawn[name] for name in LEADS[about] if name in drawn), None)
    cards = tuple(
        Card(CARDS[name][0], blocks[name].finding, CARDS[name][1])
        for name in CARDS_OF[about]
        if name in blocks and blocks[name].finding
    )[:3]
    questions = material.questions or (QUESTIONS[about],)
    if about == "sweep":
        outcome, sentence, notes = _verdict(study)
        notes = (*_progress(material), *notes)
        return Answer(questions, sentence, outcome, notes, lead, cards)
    if about == "run":
        (run,) = material.runs
        named = next(iter(material.traces), None)
        return Answer(questions, _loss_of(run, named, frames), "", (), lead, cards, _run_facts(run))
    found = lead.finding if lead is not None else "The trace holds no token."
    facts = tuple(
        fact for named in material.traces for fact in _trace_facts(named, material, frames)
    )
    return Answer(questions, found, "", (), lead, cards, facts)


def _verdict(study: WallStudy | MoELabError | None) -> tuple[str, str, tuple[str, ...]]:
    """Outcome, sentence and notes."""
    if study is None:
        return "", "No run has a loss yet: there is nothing to judge.", ()
    if isinstance(study, MoELabError):
        return "cannot tell", f"Cannot tell whether there is a wall: {study}.", ()
    verdict = study.verdict
    last = verdict.gain_table().row(-1, named=True)
    gain, low, high = last["gain"], last["lo"], last["hi"]
    known = low is not None and decimal(low) != decimal(float("nan"))
    level = f"{100 * verdict.confidence:g} % interval"
    ends = f"{level} {decimal(low, 4)} to {decimal(high, 4)}" if known else "no interval: one seed"
    first, second = last["ratio_from"], last["ratio_to"]
    step = (
        f"Doubling the ratio from {first:g} to {second:g}"
        if second == 2 * first
        else f"Each doubling of the ratio between {first:g} and {second:g}"
    )
    sentence = (
        f"{step} lowered the loss of {study.arm or 'these runs'} by {decimal(gain, 4)} nats per "
        f"token ({ends}); a doubling pays above {decimal(verdict.margin, 4)}."
    )
    settles = (f"What would settle it: {study.settles}.",) if study.settles else ()
    return str(verdict.outcome), sentence, (verdict.sentence, *settles)


def _progress(material: Material) -> tuple[str, ...]:
    """How far a sweep came; nothing where all its runs are finished."""
    number_of = {
        state: sum(run.state is state for run in material.runs)
        for state in (RunState.RUNNING, RunState.INTERRUPTED, RunState.PENDING, RunState.FAILED)
    }
    if not any(number_of.values()):
        return ()
    parts = [f"{count} {state.value}" for state, count in number_of.items() if count]
    return (
        f"Finished are {len(material.finished)} of {count_of(len(material.runs), 'run')} "
        f"({listing(parts)}); the answer is of the finished ones.",
    )


def _loss_of(run: RunRecord, named: NamedTrace | None, frames: Frames) -> str:
    from moe_lab.analysis import token_loss

    loss, tokens = (number(run.result.get(name)) for name in ("loss", "train_tokens"))
    if loss is None:
        progress = run.progress
        now = "" if progress.loss is None else f"; its training loss is {decimal(progress.loss)}"
        return f"This run is {run.state.value} at step {progress.step} of {progress.steps}{now}."
    sentence = (
        f"The validation loss is {decimal(loss, 4)} nats per token after {magnitude(tokens)} "
        "training tokens"
    )
    if named is None or not named.trace.meta.per_token:
        return f"{sentence} (one seed, without an interval)."
    traced = frames(token_loss, named.trace).row(0, named=True)
    if traced["lo"] is None:
        return f"{sentence} (one seed, without an interval)."
    return (
        f"{sentence}; over the {whole(traced['n_docs'])} traced documents it is "
        f"{decimal(traced['loss'])} (95 % interval {decimal(traced['lo'])} to "
        f"{decimal(traced['hi'])})."
    )


def _run_facts(run: RunRecord) -> tuple[tuple[str, str], ...]:
    result = run.result
    zero = number(result.get("num_zero_experts"))
    experts = f"{whole(number(result.get('num_experts')))}, k = {result.get('top_k')}"
    facts = {
        "Router": _router_of(run),
        "Experts": (experts + (f", {whole(zero)} zero-computation experts" if zero else ""))
        if result.get("num_experts") is not None
        else "",
        "Parameters": f"{magnitude(number(result.get('total_params')))} total, "
        f"{magnitude(number(result.get('active_params')))} active",
        "Training tokens": magnitude(number(result.get("train_tokens"))),
        "Seed": str(result.get("seed", "")),
        "Device": str(result.get("device", "")),
    }
    return tuple((name, text) for name, text in facts.items() if text)


def _router_of(run: RunRecord) -> str:
    """The kind of its router, by its own name; "" where the configuration does not say."""
    try:
        return str(run.config["model"]["moe"]["router"]["kind"])
    except (KeyError, TypeError):  # a dense model, or a configuration of another program
        return ""


def _trace_facts(
    named: NamedTrace, material: Material, frames: Frames
) -> tuple[tuple[str, str], ...]:
    """Model, layers, experts, k, text, documents, tokens and loss; of several traces in one row."""
    from moe_lab.analysis import token_loss

    meta = named.trace.meta
    of_layers = pl.DataFrame(
        [(layer.num_experts, layer.num_zero_experts, layer.top_k) for layer in meta.layers],
        schema=["experts", "zero", "k"],
        orient="row",
    )
    experts, zero, k = (_span(of_layers[name]) for name in of_layers.columns)
    facts = {
        "Model": meta.model,
        "Layers": f"{len(meta.layers)} with experts ({_span(pl.Series(named.layers))})",
        "Experts": experts + ("" if zero == "0" else f", {zero} zero-computation experts"),
        "k": k,
        "Text": f"{meta.phase}, corpus {meta.corpus_hash}" if meta.corpus_hash else meta.phase,
        "Made by": meta.created_from,
        "Tokens": whole(named.trace.num_tokens),
    }
    if meta.per_token:
        row = frames(token_loss, named.trace).row(0, named=True)
        facts["Documents"] = whole(row["n_docs"])
        if row["loss"] is not None:
            ends = "" if row["lo"] is None else f" ({decimal(row['lo'])} to {decimal(row['hi'])})"
            facts["Loss"] = f"{decimal(row['loss'])}{ends} nats per token"
    shown = [(name, text) for name, text in facts.items() if text]
    if len(material.traces) == 1:
        return tuple(shown)
    return ((named.label, "; ".join(f"{name} {text}" for name, text in shown)),)


def _span(values: pl.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}"
