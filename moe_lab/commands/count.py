"""``moe-lab count``: parameters, memory and work of models side by side, of a mini beside its
original, of a model beside what ``--set`` makes of it, of a trace's tokens.
"""

import argparse
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from moe_lab.accounting.cache_size import CacheSize, cache_size
from moe_lab.accounting.flop_count import PHASES, FlopCount, flops
from moe_lab.accounting.measured import ActiveDistribution, active_distribution
from moe_lab.accounting.model_names import dense_facts, facts, find_model
from moe_lab.accounting.parameter_count import CONVENTIONS, ParameterCount, count
from moe_lab.accounting.published import models
from moe_lab.accounting.ratios import ratios
from moe_lab.accounting.stored import StoredSize, stored_size
from moe_lab.commands.options import UNITS, add_number, examples, refuse_ignored
from moe_lab.cost.parts import Part
from moe_lab.errors import ConfigError, expected, require
from moe_lab.model.minis import MINIS, find_mini
from moe_lab.number_format import magnitude
from moe_lab.terminal import print_table, say, window_width

_CONVENTION_TEXT = {"A": "everything", "B": "without lookups", "C": "without lookups and head"}
BYTES = {"bf16": 2.0, "fp8": 1.0, "4 bits": 0.5}
"""Bytes of one number, scales of quantized weights left out."""


class Model(NamedTuple):
    """A column: what was typed, ``--set`` in words, and what is counted of it."""

    name: str
    edits: str
    counted: ParameterCount
    work: dict[str, FlopCount]
    cache: CacheSize

    @property
    def title(self) -> str:
        return f"{self.name} with {self.edits}" if self.edits else self.name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab count deepseek-ai/DeepSeek-V3",
        "moe-lab count DeepSeek-V3 Qwen3-30B-A3B Llama-3.1-70B --context 128k --batch 64",
        "moe-lab count Qwen3-30B-A3B --set num_experts=256 --csv",
        "moe-lab count longcat_2_mini",
        'moe-lab count --where "sparsity > .965"',
        "moe-lab count runs/x/config.json --trace runs/x/trace",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="ID_OR_PATH",
        help="published models (moe-lab list models), minis (shown beside their originals), "
        "config.json files or their folders; several stand side by side",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        default=[],
        help="what if: another value of a field, counted beside the original; may be repeated",
    )
    add_number(
        parser,
        "--context",
        4096,
        whole=True,
        units=UNITS,
        default=4096,
        help="tokens that a sequence has: for the operations per token and the cache",
    )
    add_number(parser, "--batch", 1, whole=True, default=1, help="sequences that decode together")
    parser.add_argument(
        "--trace",
        metavar="FOLDER",
        help="a trace of the model, or its URL: active parameters as measured, token by token",
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
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (a list for several models)")
    form.add_argument("--csv", action="store_true", help="print CSV: section, quantity, models")


OF_MODELS = {"set", "context", "batch", "trace", "defaults"}
"""Options that only named models read."""


def main(args: argparse.Namespace) -> int:
    if args.where is not None:
        require(not args.models, "--where alone, with --json or --csv", "a model beside it")
        refuse_ignored(args, add_arguments, OF_MODELS, "--where")
        return _list_where(args.where, args)
    if not args.models:
        refuse_ignored(args, add_arguments, OF_MODELS | {"csv"}, "the list of models")
        names = [*(entry["name"] for entry in (*facts(), *dense_facts())), *MINIS]
        print(json.dumps(names, indent=1) if args.json else "\n".join(names))
        return 0
    edits = dict(_edit(text) for text in args.set)
    require(
        not args.trace or (len(args.models) == 1 and not edits),
        "one model, without --set, with --trace",
        "several",
    )
    columns = [column for name in args.models for column in _columns(name, edits, args)]
    if len(args.models) == 1 and args.models[0] in MINIS and not args.trace:
        columns.append(_column(find_mini(args.models[0]).original, {}, args))
    measured = _measure(args.trace, columns[0].counted) if args.trace else None
    if args.json:
        print(_as_json(columns, measured))
    elif args.csv:
        print(_as_csv(columns, measured), end="")
    else:
        _print(columns, measured)
    return 0


def _columns(name: str, edits: Mapping[str, Any], args: argparse.Namespace) -> list[Model]:
    """The model, and beside it what the edits make of it."""
    return [_column(name, {}, args), *([_column(name, edits, args)] if edits else [])]


def _column(name: str, edits: Mapping[str, Any], args: argparse.Namespace) -> Model:
    counted = count(name, edits, defaults=args.defaults)
    work = {phase: flops(counted, args.context, phase, batch=args.batch) for phase in PHASES}
    text = ", ".join(f"{field}={value}" for field, value in edits.items())
    return Model(name, text, counted, work, cache_size(counted, args.context))


def _list_where(condition: str, args: argparse.Namespace) -> int:
    """Print the published models of which ``condition`` holds, the newest last."""
    import polars as pl

    frame = models()
    try:
        # Of SQL, polars takes one expression here: no statement, no file.
        found = frame.filter(pl.sql_expr(condition))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        why = shorten(" ".join(str(error).split()), 100, placeholder=" ...")
        what = f"a condition on columns such as {', '.join(LISTED[1:])}"
        got = f"{shorten(condition, 60, placeholder=' ...')!r} ({why})"
        raise ConfigError(expected(what, got, '"sparsity > .95"'), "--where") from error
    if args.json:
        print(found.with_columns(pl.col("date").cast(pl.String)).write_json())
    elif args.csv:
        print(found.write_csv(), end="")
    else:
        terminal = window_width() is not None
        print_table(
            LISTED,
            [
                [magnitude(cell) if terminal and isinstance(cell, int) else cell for cell in row]
                for row in found.select(LISTED).iter_rows()
            ],
        )
        say(f"{len(found)} of {len(frame)} published models")
    return 0


LISTED = ("name", "date", "total", "active", "sparsity", "expert_sparsity")


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


def _as_json(columns: Sequence[Model], measured: ActiveDistribution | None) -> str:
    rows = [
        {
            "name": one.name,
            **({"edits": one.edits} if one.edits else {}),
            **one.counted.to_dict(),
            "weight_bytes": {form: size * one.counted.total for form, size in BYTES.items()},
            "cache": one.cache.to_dict()
            | {
                f"bytes_{what}": {
                    form: BYTES[form] * getattr(one.cache, what) for form in ("bf16", "fp8")
                }
                for what in ("per_token", "growth", "at_context", "state")
            },
            "flops": {phase: done.to_dict() for phase, done in one.work.items()},
        }
        for one in columns
    ]
    for row, one in zip(rows, columns, strict=True):
        if (size := _stored(one.name)) is not None:
            row["stored"] = vars(size)
    if measured is not None:
        rows[0]["measured"] = measured.to_dict()
    return json.dumps(rows[0] if len(rows) == 1 else rows, indent=1)


def _as_csv(columns: Sequence[Model], measured: ActiveDistribution | None) -> str:
    """A row for each quantity, numbers in full."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["section", "quantity", *(one.title for one in columns)])
    for title, rows in _sections(columns, measured):
        table.writerows([title, name.strip(), *values] for name, values in rows)
    return out.getvalue()


# --------------------------------------------------------------------------------------------------
# text

Row = tuple[str, Sequence[float | None]]
Sections = list[tuple[str, list[Row]]]


def _print(columns: Sequence[Model], measured: ActiveDistribution | None) -> None:
    width, sections = window_width(), _sections(columns, measured)
    if width is None:
        head = ["section", "quantity", *(one.title for one in columns)]
        print_table(
            head,
            [(title, name.strip(), *values) for title, rows in sections for name, values in rows],
        )
    else:
        print("\n".join(_table(columns, sections, width)))
    for note in _notes(columns):
        say(note)


def _sections(columns: Sequence[Model], measured: ActiveDistribution | None) -> Sections:
    counted, work = [one.counted for one in columns], [one.work for one in columns]
    context = columns[0].cache.context
    batch = work[0]["decode"].batch
    sections: Sections = [
        ("parameters", list(_parameter_rows(counted))),
        ("active parameters per token", list(_active_rows(counted))),
        (
            "weights, GB",
            [(form, [size * one.total / 1e9 for one in counted]) for form, size in BYTES.items()],
        ),
        ("cache of one sequence", list(_cache_rows([one.cache for one in columns]))),
        (
            f"bytes that decoding reads per token, batch {batch}, context {context:,}",
            list(_read_rows(columns)),
        ),
        ("ratios, without embeddings", list(_ratio_rows(counted))),
        (f"operations per token at a context of {context:,}", list(_work_rows(work))),
    ]
    if measured is not None:
        title = f"measured over {measured.tokens:,} tokens (convention {measured.convention})"
        sections.append((title, _measured_rows(measured)))
    return [(title, rows) for title, rows in sections if rows]


def _cache_rows(caches: Sequence[CacheSize]) -> Iterable[Row]:
    context = caches[0].context
    for form in ("bf16", "fp8"):
        yield f"bytes per token, {form}", [BYTES[form] * one.per_token for one in caches]
    if any(one.growth != one.per_token for one in caches):
        grown = [BYTES["bf16"] * one.growth for one in caches]
        yield "  once all windows are full, bf16", grown
    if any(one.state for one in caches):
        yield "bytes whatever the length, bf16", [BYTES["bf16"] * one.state for one in caches]
    for form in ("bf16", "fp8"):
        kept = [BYTES[form] * one.at_context / 1e9 for one in caches]
        yield f"GB at {context:,} tokens, {form}", kept


def _read_rows(columns: Sequence[Model]) -> Iterable[Row]:
    weights = [one.work["decode"].weight_bytes_per_token for one in columns]
    cache = [BYTES["bf16"] * one.cache.at_context for one in columns]
    yield "weights, bf16", list(weights)
    yield "cache, bf16, if all of it is read", list(cache)
    if columns[0].work["decode"].batch > 1:
        experts = [one.work["decode"].distinct_experts for one in columns]
        yield "distinct experts of a layer", experts
    yield (
        "weights of a prefill, in all, bf16",
        [one.work["prefill"].weight_bytes for one in columns],
    )


DECODING = (
    "assumed of decoding: a step reads each weight once for its whole batch, and of the experts "
    "those that the tokens choose, each on its own and all experts equally often; scales of "
    "quantized numbers, looked-up rows and MTP modules are left out"
)


def _notes(columns: Sequence[Model]) -> Iterable[str]:
    yield f"\n{DECODING}"
    for one in columns:
        if not one.edits:
            yield from _published_lines(one.name)
            if one.name in MINIS:
                yield f"\n{one.name}: {find_mini(one.name).left_out}"
        if assumed := one.work["train"].assumed:
            yield f"\n{one.title}: assumed"
            yield from (f"  {sentence}" for sentence in assumed)
        if one.counted.phantom:
            rows = f"{one.counted.phantom:,} further rows"
            yield f"\n{one.title}: {rows} are stored or allocated by transformers and never read"
        if not one.edits and (size := _stored(one.name)) is not None:
            yield f"\n{one.name}: {size.sentence(one.counted.total, one.counted.mtp)}"


def _table(columns: Sequence[Model], sections: Sections, width: int) -> list[str]:
    """Columns as wide as they need; with short numbers, and then below each other, where the window
    is narrow.
    """
    label = max(len(name) for _, rows in sections for name, _ in rows)
    heads = [
        one.title.replace("/", "/\n").replace(" with ", "\nwith ").split("\n") for one in columns
    ]

    def sizes(write: Any) -> list[int]:
        return [
            max(
                *map(len, head),
                *(len(write(values[place])) for _, rows in sections for _, values in rows),
            )
            for place, head in enumerate(heads)
        ]

    ratio = 10 if len(columns) == 2 else 0
    room = width - label - ratio
    write = next(
        (form for form in (_number, _short) if sum(sizes(form)) + 2 * len(columns) <= room), _short
    )
    lines: list[str] = []
    groups = _groups(sizes(write), room)
    for group in groups:
        tall = max(len(heads[place]) for place in group)
        wide = {place: sizes(write)[place] for place in group}
        paired = ratio and len(group) == 2
        for level in range(tall):
            cells = (
                f"  {([''] * (tall - len(heads[place])) + heads[place])[level]:>{wide[place]}}"
                for place in group
            )
            last = f"{'ratio':>{ratio}}" if paired and level == tall - 1 else ""
            lines.append((" " * label + "".join(cells) + last).rstrip())
        for title, rows in sections:
            lines += ["", title]
            for name, values in rows:
                cells = (f"  {write(values[place]):>{wide[place]}}" for place in group)
                last = _ratio(values, ratio) if paired else ""
                lines.append((f"{name:{label}}" + "".join(cells) + last).rstrip())
        lines.append("")
    return lines[:-1]


def _groups(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Which columns stand side by side in ``room`` characters."""
    groups: list[list[int]] = []
    left = 0
    for place, size in enumerate(sizes):
        if not groups or size + 2 > left:
            groups.append([])
            left = room
        groups[-1].append(place)
        left -= size + 2
    return groups


def _ratio(values: Sequence[float | None], width: int) -> str:
    first, last = values
    return f"{last / first:>{width}.3f}" if first and last is not None else ""


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
    figures = f"{published['total']} total"
    if active:
        figures += f", {active} active in convention {published['convention']}"
    elif "convention" in published:
        figures += ", no active figure"
    note = f"; {entry['note']}" if "note" in entry else ""
    return [f"\n{name}: published as {figures} ({published['source']}){note}"]


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


def _work_rows(work: Sequence[Mapping[str, FlopCount]]) -> Iterable[Row]:
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


def _number(value: float | None) -> str:
    """Large numbers in full with their short form beside, the rest with four digits."""
    large = value is not None and abs(value) >= 1e4
    return f"{value:,.0f} ({_short(value)})" if large else _short(value)


def _short(value: float | None) -> str:
    """Four digits, from 10,000 on with a letter."""
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) < 1e4 else magnitude(value, 4)


def _measured_rows(measured: ActiveDistribution) -> list[Row]:
    least, mean, most = measured.nominal
    return [
        ("mean", [measured.mean]),
        ("standard deviation", [measured.sd]),
        ("lowest token", [measured.lowest]),
        ("highest token", [measured.highest]),
        ("5 % of tokens", [measured.quantiles[0.05]]),
        ("95 % of tokens", [measured.quantiles[0.95]]),
        ("nominal mean", [float(mean)]),
        ("nominal least", [float(least)]),
        ("nominal most", [float(most)]),
    ]
