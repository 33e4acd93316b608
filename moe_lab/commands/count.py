"""``moe-lab count``: parameters and work of one model, of two side by side, of a mini and its
original, with edits, of a trace's tokens.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_lab.accounting.flop_count import PHASES, FlopCount, flops
from moe_lab.accounting.measured import ActiveDistribution, active_distribution
from moe_lab.accounting.model_names import facts, find_model
from moe_lab.accounting.parameter_count import CONVENTIONS, ParameterCount, count
from moe_lab.accounting.published import models
from moe_lab.accounting.ratios import ratios
from moe_lab.accounting.stored import StoredSize, stored_size
from moe_lab.commands.options import add_number
from moe_lab.cost.parts import Part
from moe_lab.errors import ConfigError, expected, require
from moe_lab.model.minis import MINIS, find_mini

_CONVENTION_TEXT = {"A": "everything", "B": "without lookups", "C": "without lookups and head"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        metavar="ID_OR_PATH",
        help="a published model, a mini (shown beside its original), a config.json or its "
        "folder; two are compared",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        default=[],
        help="what if: another value of a field (repeatable)",
    )
    add_number(
        parser,
        "--context",
        4096,
        whole=True,
        default=4096,
        help="tokens of context for the operations per token",
    )
    add_number(parser, "--batch", 1, whole=True, default=1, help="sequences that decode together")
    parser.add_argument(
        "--trace",
        metavar="FOLDER",
        help="a trace of the model: active parameters as measured, token by token",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="list the published models of which a condition holds, such as 'sparsity > .95 and "
        "total < 1e12'; columns as in moe_lab.accounting.models()",
    )
    parser.add_argument(
        "--defaults",
        choices=["hf"],
        help="fill what a configuration leaves out from transformers' class, and say so",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (a list for two models)")


def main(args: argparse.Namespace) -> int:
    if args.where is not None:
        alone = not (args.models or args.set or args.trace)
        require(alone, "--where alone or with --json", "a model beside it")
        return _list_where(args.where, args.json)
    if not args.models:
        print("\n".join((*(entry["name"] for entry in facts()), *MINIS)))
        return 0
    names = list(args.models)
    if len(names) == 1 and names[0] in MINIS and not args.trace:
        names.append(find_mini(names[0]).original)
    require(len(names) <= 2, "one model, or two to compare", f"{len(names)} of them")
    require(not args.trace or len(names) <= 1, "one model with --trace", "two of them")
    edits = dict(_edit(text) for text in args.set)
    # What if is asked of what was named, not of the original that stands beside a mini.
    counted = [
        count(name, edits if number < len(args.models) else {}, defaults=args.defaults)
        for number, name in enumerate(names)
    ]
    work = [
        {phase: flops(one, args.context, phase, batch=args.batch) for phase in PHASES}
        for one in counted
    ]
    measured = _measure(args.trace, counted[0]) if args.trace else None
    if args.json:
        print(_as_json(names, counted, work, measured))
    else:
        print("\n".join(_table(names, counted, work, measured, bool(edits))))
    return 0


def _list_where(condition: str, as_json: bool) -> int:
    """Print the published models of which ``condition`` holds, the newest last."""
    import polars as pl

    frame = models()
    try:
        # Of SQL, polars takes one expression here: no statement, no file.
        found = frame.filter(pl.sql_expr(condition))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first = (str(error).splitlines() or ["an error"])[0][:100]
        what = f"a condition on columns such as {', '.join(LISTED[1:])}"
        raise ConfigError(expected(what, f"{condition[:60]!r} ({first})")) from error
    if as_json:
        print(found.with_columns(pl.col("date").cast(pl.String)).write_json())
        return 0
    for name, *values in [LISTED, *found.select(LISTED).iter_rows()]:
        print(f"{name:44}" + "".join(f"{_listed(value):>28}" for value in values))
    print(f"{len(found)} of {len(frame)} published models")
    return 0


LISTED = ("name", "date", "total", "active", "sparsity", "expert_sparsity")


def _listed(value: Any) -> str:
    return _number(value) if isinstance(value, int | float) else str(value)


def _edit(text: str) -> tuple[str, Any]:
    field, mark, value = text.partition("=")
    require(mark and field, "--set FIELD=VALUE", repr(text))
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def _measure(folder: str, counted: ParameterCount) -> ActiveDistribution:
    import polars as pl

    from moe_lab.trace import open_trace

    counts: dict[int, Any] = {}
    trace = open_trace(folder)
    routing = trace.routing.select("layer", "doc", "pos", "ffn_count")
    if trace.meta.loops:  # the mean over the runs of a layer, which is stored once
        routing = (
            routing.join(trace.layers.lazy().select("layer", "model_layer"), on="layer")
            .group_by(pl.col("model_layer").alias("layer"), "doc", "pos")
            .agg(pl.col("ffn_count").mean())
        )
    ordered = routing.sort("layer", "doc", "pos").collect()
    for (layer,), rows in ordered.group_by("layer", maintain_order=True):
        counts[int(layer)] = rows["ffn_count"].to_numpy()  # type: ignore[call-overload]
    return active_distribution(counted, counts)


def _as_json(
    names: list[str],
    counted: list[ParameterCount],
    work: list[dict[str, FlopCount]],
    measured: ActiveDistribution | None,
) -> str:
    rows = [
        {
            "name": name,
            **one.to_dict(),
            "flops": {phase: done.to_dict() for phase, done in phases.items()},
        }
        for name, one, phases in zip(names, counted, work, strict=True)
    ]
    for row, name in zip(rows, names, strict=True):
        if (size := _stored(name)) is not None:
            row["stored"] = vars(size)
    if measured is not None:
        rows[0]["measured"] = measured.to_dict()
    return json.dumps(rows[0] if len(rows) == 1 else rows, indent=1)


# --------------------------------------------------------------------------------------------------
# text

Row = tuple[str, list[float | None]]


def _table(
    names: list[str],
    counted: list[ParameterCount],
    work: list[dict[str, FlopCount]],
    measured: ActiveDistribution | None,
    edited: bool,
) -> list[str]:
    blocks = [
        ("parameters", list(_parameter_rows(counted))),
        (
            "active parameters per token (mean, and range where it varies)",
            list(_active_rows(counted)),
        ),
        ("ratios, embeddings told apart", list(_ratio_rows(counted))),
        (
            f"operations per token at a context of {work[0]['train'].context:,}",
            list(_work_rows(work)),
        ),
    ]
    lines = ["  ".join(_heading(names))]
    for title, rows in blocks:
        lines += ["", title, *(_line(row) for row in rows)]
    if measured is not None:
        lines += ["", *_measured_lines(measured)]
    for name, one, phases in zip(names, counted, work, strict=True):
        assumed = phases["decode"].assumed
        lines += [] if edited else _published_lines(name)
        lines += [f"\n{name}: {find_mini(name).left_out}"] if name in MINIS else []
        notes = (
            [f"{one.phantom:,} further rows are stored or allocated by transformers and never read"]
            if one.phantom
            else []
        )
        lines += (
            [f"\n{name}: assumed", *(f"  {sentence}" for sentence in assumed)] if assumed else []
        )
        if (size := _stored(name)) is not None and not edited:
            notes = [*notes, size.sentence(one.total, one.mtp)]
        lines += [f"\n{name}: {note}" for note in notes]
    return lines


def _stored(name: str) -> StoredSize | None:
    return stored_size(name) if Path(name).exists() else None


def _published_lines(name: str) -> list[str]:
    """What the laboratory says, and in which convention it is right."""
    entry = None if Path(name).exists() else find_model(name)
    if entry is None:
        return []
    published = entry["published"]
    active = published.get("active")
    if active is None and "active_min" in published:
        active = f"{published['active_min']} to {published['active_max']}"
    figures = f"{published['total']} total, " + (
        f"{active} active in convention {published['convention']}" if active else "no active figure"
    )
    note = f"; {entry['note']}" if "note" in entry else ""
    return [f"\n{name}: published as {figures} ({published['source']}){note}"]


def _heading(names: list[str]) -> list[str]:
    return [
        f"{'':34}",
        *(f"{name[-34:]:>34}" for name in names),
        *(["       ratio"] if len(names) == 2 else []),
    ]


def _parameter_rows(counted: list[ParameterCount]) -> Iterable[Row]:
    yield "total", [one.total for one in counted]
    parts = [one.by_part for one in counted]
    if any(table[Part.NGRAM_TABLE] for table in parts):
        apart: list[float | None] = [one.total - one.by_part[Part.NGRAM_TABLE] for one in counted]
        yield "  without tables that are read by row", apart
    for part in parts[0]:
        if part != "mtp" and any(table[part] for table in parts):
            yield f"  {part.replace('_', ' ')}", [table[part] for table in parts]
    if any(one.mtp for one in counted):
        yield "multi-token prediction, apart", [one.mtp for one in counted]


def _active_rows(counted: list[ParameterCount]) -> Iterable[Row]:
    for convention in CONVENTIONS:
        yield (
            f"{convention}: {_CONVENTION_TEXT[convention]}",
            [one.active(convention) for one in counted],
        )
        if any(one.active_min != one.active_max for one in counted):
            yield "  least", [one.active(convention, "least") for one in counted]
            yield "  most", [one.active(convention, "most") for one in counted]
        if any(one.has_phases for one in counted):
            yield "  in prefill", [one.active(convention, phase="prefill") for one in counted]
        if convention == "A" and any(one.by_part[Part.NGRAM_TABLE] for one in counted):
            yield "  without tables read by row", [one.active_without_tables() for one in counted]
    yield "sparsity (1 - B / total)", [1 - one.active("B") / one.total for one in counted]


def _ratio_rows(counted: list[ParameterCount]) -> Iterable[Row]:
    tables = [ratios(one) if one.moe_layers else {} for one in counted]
    for key, text in _RATIOS.items():
        if any(table.get(key) for table in tables):
            yield text, [table.get(key) for table in tables]


_RATIOS = {
    "experts_per_active": "experts / experts per token",
    "zero_share": "zero-computation share of choices",
    "shared_share": "shared share of active experts",
    "layer_active": "active share of a MoE layer",
    "sparsity": "sparsity of all layers",
    "table_share": "n-gram share",
    "embedding_share": "embedding and head, of the total",
}


def _work_rows(work: list[dict[str, FlopCount]]) -> Iterable[Row]:
    yield "forward", [phases["train"].forward for phases in work]
    for part in dict.fromkeys(part for phases in work for part in phases["train"].by_part):
        yield (
            f"  {part.replace('_', ' ')}",
            [phases["train"].by_part.get(part, 0.0) for phases in work],
        )
    yield "training (forward and backward)", [phases["train"].training for phases in work]
    if any(phases["prefill"].forward != phases["train"].forward for phases in work):
        yield "prefill", [phases["prefill"].forward for phases in work]
    yield "decoding the next token", [phases["decode"].forward for phases in work]
    batch = work[0]["decode"].batch
    yield (
        f"weight bytes per token, batch {batch}",
        [phases["decode"].weight_bytes_per_token for phases in work],
    )
    yield (
        "weight bytes of a prefill, in all",
        [phases["prefill"].weight_bytes for phases in work],
    )
    if batch > 1:
        yield "  distinct experts per layer", [phases["decode"].distinct_experts for phases in work]


def _line(row: Row) -> str:
    name, values = row
    cells = [f"{_number(value):>34}" for value in values]
    first, last = values[0], values[-1]
    ratio = [f"{last / first:>12.3f}"] if len(values) == 2 and first and last is not None else []
    return "  ".join([f"{name:34}", *cells, *ratio]).rstrip()


def _number(value: float | None) -> str:
    """Whole numbers in full with their short form beside, the rest with four digits."""
    if value is None:
        return "-"
    if abs(value) < 1e4:
        return f"{value:.4g}"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value:,.0f} ({value / unit:.4g}{letter})"
    return f"{value:,.0f}"


def _measured_lines(measured: ActiveDistribution) -> list[str]:
    least, mean, most = measured.nominal
    rows: list[Row] = [
        ("mean", [measured.mean]),
        ("standard deviation", [measured.sd]),
        ("lowest, highest token", [measured.lowest, measured.highest]),
        ("5 %, 95 % of tokens", [measured.quantiles[0.05], measured.quantiles[0.95]]),
        ("nominal mean", [float(mean)]),
        ("nominal range", [float(least), float(most)]),
    ]
    cells = (
        f"{name:34}  " + "  ".join(f"{_number(value):>34}" for value in values)
        for name, values in rows
    )
    return [f"measured over {measured.tokens:,} tokens (convention {measured.convention})", *cells]
