"""The section on serving: cache, placement and decode cost of one trace, in whole experts where
their size is not known.
"""

import polars as pl

from moe_lab.number_format import whole
from moe_lab.report import figures
from moe_lab.report.figure_blocks import Block, Variant, by_heading, looked_into, one_plot, table_of
from moe_lab.report.frames import Frames
from moe_lab.report.sources import Material, NamedTrace

MAX_SLOTS = 20_000_000
"""Slots of a trace that a page replays."""
DEVICES = (8, 4, 2)
"""The first that divides the experts is placed on."""
RESAMPLES = 200
UNKNOWN_BYTES = 1000.0
"""Of an expert whose size nobody says: a hundredth of a few experts is still some bytes."""
POLICIES = ("lru", "static", "clairvoyant")
WINDOWS = (1, 2, 4, 8, 16)


def serving_section(material: Material, frames: Frames) -> list[tuple[str, Block]]:
    """Headings and blocks of the traces that are looked into and that a page can replay."""
    usable = [named for named in material.traces if _usable(named, frames)]
    makers = {
        "What a cache of experts finds": _cache_block,
        "Load of devices": _placement_block,
        "Experts that a step touches": _distinct_block,
    }
    return by_heading(
        (heading, named.label, maker(named, frames))
        for named in looked_into(usable)
        for heading, maker in makers.items()
    )


def _usable(named: NamedTrace, frames: Frames) -> bool:
    """Whether the trace says which experts ran, is not too long to be replayed, and some ran."""
    slots = sum(layer.top_k for layer in named.trace.meta.layers) * named.trace.num_tokens
    if not named.trace.meta.zero_experts_known or not 0 < slots <= MAX_SLOTS:
        return False
    return frames(_counts, named.trace).filter(~pl.col("is_zero"))["count"].sum() > 0


def _cache_block(named: NamedTrace, frames: Frames) -> Block:
    from moe_lab.serving import expert_cache
    from moe_lab.serving.sentences import cache_sentences

    layers = named.trace.meta.layers
    known = all(layer.expert_bytes for layer in layers)
    data = frames(
        expert_cache, named.trace, None, POLICIES, expert_bytes=None if known else UNKNOWN_BYTES,
        resamples=RESAMPLES,
    )  # fmt: skip
    total = sum(
        layer.num_experts * (layer.expert_bytes if known else UNKNOWN_BYTES) for layer in layers
    )
    phase = "decode" if data.filter(phase="decode")["requests"].sum() else "all"
    rows = data.filter(phase=phase).with_columns(share=pl.col("budget") / total)
    caption = (
        f"n = {whole(rows['tokens'][0])} tokens of {named.label}, "
        f"{whole(rows['requests'][0])} requests of an expert in a step. The cache holds experts of "
        "all layers together, is empty at the start and goes on from one document to the next. "
        "static: a list chosen on other documents. clairvoyant knows the future. Bars are 95 % "
        f"intervals from resampling documents {RESAMPLES} times."
        + ("" if known else " Every expert is taken to have one size (1,000 bytes in the table).")
    )
    variant = Variant("hit rate", figures.expert_cache.canvas(rows))
    table = table_of(rows.select("policy", "share", "hit_rate", "bytes_per_token", "note"))
    summary = " ".join(cache_sentences(data)) if known else (
        "Share of requested experts that a cache finds, over its budget."
    )  # fmt: skip
    return one_plot("expert_cache", caption, summary, [variant], rows, table)


def _placement_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.errors import AnalysisError
    from moe_lab.serving import place, placement_load, placement_sentence, placement_transfer

    experts = {layer.num_experts for layer in named.trace.meta.layers}
    if len(experts) != 1:
        return None
    number = experts.copy().pop()
    devices = next((count for count in DEVICES if number % count == 0 and number > count), None)
    if devices is None:
        return None
    counts = frames(_counts, named.trace)
    tables = {
        method: frames(placement_load, frames(place, counts, devices, None, method), counts)
        for method in ("contiguous", "eplb")
    }
    variants = [
        Variant(name, figures.placement_load.canvas(tables[method]))
        for method, name in (("contiguous", "before: contiguous"), ("eplb", "after: EPLB"))
    ]
    try:
        summary = placement_sentence(
            frames(placement_transfer, named.trace, devices, resamples=RESAMPLES)
        )
    except AnalysisError:  # one document: nothing to judge a placement on
        summary = "Load of each device in each layer. One document cannot be chosen and judged on."
    data = pl.concat(
        table.select(pl.lit(method).alias("method"), "layer", "device", "load")
        for method, table in tables.items()
    )
    caption = (
        f"n = {whole(named.trace.num_tokens)} tokens of {named.label}, {devices} devices without "
        "replicas. Load of a device over the mean of its layer, of all tokens together: a batch "
        "is less even. Counts of the text that EPLB was chosen on, so without interval; how it "
        f"does elsewhere: {summary}"
    )
    return one_plot("placement_load", caption, summary, variants, data)


def _distinct_block(named: NamedTrace, frames: Frames) -> Block | None:
    from moe_lab.errors import AnalysisError
    from moe_lab.serving import distinct_experts
    from moe_lab.serving.sentences import decode_sentence

    try:
        data = frames(distinct_experts, named.trace, WINDOWS, WINDOWS, resamples=RESAMPLES)
    except AnalysisError:  # prompts alone
        return None
    rows = data.filter(pl.col("layer").is_null())
    caption = (
        f"n = {whole(named.trace.num_tokens)} tokens of {named.label}: different experts of a "
        "layer, mean over layers, that tokens in a row of one document, or one token of each of "
        "several documents, touch. Formulas: independent "
        "tokens of the measured load, and of equal load. Bars are 95 % intervals over documents."
    )
    variant = Variant("distinct experts", figures.distinct_experts.canvas(data))
    shown = rows.select("kind", "size", "measured", "lo", "hi", "by_load", "by_equal_load", "note")
    table = table_of(shown)
    return one_plot("distinct_experts", caption, decode_sentence(data), [variant], data, table)


def _counts(trace: object) -> pl.DataFrame:
    return trace.counts()  # type: ignore[attr-defined]
