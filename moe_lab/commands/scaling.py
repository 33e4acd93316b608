"""``moe-lab scaling {step,verdict,fit}``: what the laws expect of more experts, a verdict on runs
of one's own, a law fitted to them.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.commands.options import (
    UNITS,
    add_json,
    add_number,
    add_out,
    examples,
    print_json,
    refuse_other,
)
from moe_lab.errors import AnalysisError, MoELabError, expected, require
from moe_lab.number_format import magnitude
from moe_lab.progress import shown
from moe_lab.terminal import print_table, say

if TYPE_CHECKING:
    import polars as pl

    from moe_lab.scaling import Fit, Quality, Verdict, WallStudy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab scaling step --total 1.6T --active 48B --add 135B --tokens 35T",
        "moe-lab scaling verdict runs/small",
        "moe-lab scaling fit chinchilla runs.parquet",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="{step,verdict,fit}", required=True)
    step_parser = verbs.add_parser(
        "step",
        help="what each law expects of adding expert parameters",
        epilog=examples(
            "moe-lab scaling step --total 1.6T --active 48B --add 135B --tokens 35T",
            "moe-lab scaling step --total 48B --active 3B --add 48B --tokens 10T --granularity 8",
        ),
    )
    for name, what in (
        ("total", "parameters before the step"),
        ("active", "active parameters per token"),
        ("add", "expert parameters to add"),
    ):
        add_number(
            step_parser, f"--{name}", "48B", units=UNITS, required=True, metavar="N", help=what
        )
    add_number(
        step_parser,
        "--tokens",
        "35T",
        units=UNITS,
        required=True,
        metavar="N",
        help="training tokens",
    )
    step_parser.add_argument(
        "--included", action="store_true", help="the total is the one after the step"
    )
    add_number(
        step_parser,
        "--routed",
        "1.5T",
        units=UNITS,
        default=None,
        metavar="N",
        help="parameters of the total that are in routed experts (default: all)",
    )
    add_number(
        step_parser,
        "--granularity",
        12,
        units=UNITS,
        default=12.0,
        metavar="G",
        help="granularity of the experts, for laws that have it",
    )
    add_number(
        step_parser,
        "--noise",
        0.0005,
        units=UNITS,
        default=0.0005,
        metavar="NATS",
        help="noise between seeds, in nats",
    )
    add_json(step_parser)
    verdict_parser = verbs.add_parser(
        "verdict",
        help="wall, below margin, no wall or cannot tell, of runs of your own",
        epilog=examples(
            "moe-lab scaling verdict runs/small",
            "moe-lab scaling verdict runs.csv --column loss=val_loss --unit bits --by-budget",
        ),
    )
    verdict_parser.add_argument(
        "runs", type=Path, help="Parquet, CSV or JSON lines with a row per run, or a sweep's folder"
    )
    verdict_parser.add_argument(
        "--arm", default=None, help="which arm (default: the one with most ratios)"
    )
    _add_column(verdict_parser)
    verdict_parser.add_argument(
        "--by-budget", action="store_true", help="one verdict per token budget"
    )
    add_number(
        verdict_parser,
        "--noise",
        0.0005,
        units=UNITS,
        default=None,
        metavar="NATS",
        help="noise between seeds in nats, known from other runs",
    )
    add_number(
        verdict_parser,
        "--vocab-size",
        50257,
        whole=True,
        default=None,
        help="size of the vocabulary, by which losses in bits are recognised",
    )
    add_out(
        verdict_parser,
        "a folder for runs, gains, forms and confounds as Parquet and the verdict as text",
    )
    add_json(verdict_parser)
    fit_parser = verbs.add_parser(
        "fit",
        help="a law's coefficients with bootstrap intervals",
        epilog=examples(
            "moe-lab scaling fit chinchilla runs.parquet",
            "moe-lab scaling fit saturation runs/small --bootstrap 200 --out fits/saturation",
        ),
    )
    fit_parser.add_argument(
        "law",
        help="clark, hoffmann (or chinchilla), ludziejewski, abnar, line, saturation, ...: "
        "moe-lab list laws",
    )
    fit_parser.add_argument(
        "runs", type=Path, help="as for verdict; columns loss and the law's variables"
    )
    fit_parser.add_argument(
        "--arm", default=None, help="which arm (default: the one with most ratios)"
    )
    _add_column(fit_parser)
    add_number(
        fit_parser,
        "--bootstrap",
        1000,
        whole=True,
        least=0,
        default=1000,
        metavar="N",
        help="repetitions of the bootstrap; 0 for none",
    )
    fit_parser.add_argument(
        "--cluster", default=None, metavar="COLUMN", help="redraw whole groups of runs"
    )
    fit_parser.add_argument(
        "--squares", action="store_true", help="least squares instead of Huber's loss of 1e-3"
    )
    add_out(
        fit_parser,
        "a folder for the coefficients and the law beside your runs, as Parquet and a figure",
    )
    add_json(fit_parser)


def _add_column(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--column",
        type=_renamed,
        action="append",
        default=[],
        metavar="OURS=YOURS",
        help="a column of yours under our name, such as loss=val_loss; may be repeated",
    )
    parser.add_argument(
        "--unit",
        choices=("nats", "bits", "bpb", "perplexity"),
        default=None,
        help="of the losses: nats or bits per token, bits per byte (with --bytes-per-token), or "
        "perplexity (default: nats; it must be given where the column's name says another)",
    )
    add_number(
        parser,
        "--bytes-per-token",
        4.5,
        units=UNITS,
        default=None,
        metavar="N",
        help="bytes per token of the text, for losses in bits per byte",
    )


def _runs(args: argparse.Namespace) -> "pl.DataFrame":
    from moe_lab.scaling import LossUnit, read_runs

    unit = None if args.unit is None else LossUnit(args.unit)
    return read_runs(args.runs, names=args.column, unit=unit, bytes_per_token=args.bytes_per_token)


def _renamed(text: str) -> tuple[str, str]:
    ours, _, theirs = text.partition("=")
    if not (ours.strip() and theirs.strip()):
        what, hint = "--column OURS=YOURS", "--column loss=val_bpb"
        raise MoELabError(expected(what, repr(text), hint), "--column")
    return ours.strip(), theirs.strip()


def main(args: argparse.Namespace) -> int:
    return {"step": step, "verdict": verdict, "fit": fit}[args.verb](args)


def step(args: argparse.Namespace) -> int:
    from moe_lab.scaling import expected_gain

    after = args.total if args.included else args.total + args.add
    before = after - args.add
    routed = before if args.routed is None else args.routed
    require(
        before >= args.active,
        "a total before the step of at least the active parameters",
        f"{before:g}",
        error=AnalysisError,
    )
    options = {"routed": routed, "granularity": args.granularity, "noise_sd": args.noise}
    table = expected_gain(before, args.active, args.add, args.tokens, **options)
    if args.json:
        print(table.write_json())
        return 0
    say(f"+{magnitude(args.add)} on {magnitude(routed)} is {_growth(args.add, routed)}.")
    if not args.included and args.routed is None:
        say(
            f"If the {magnitude(args.total)} hold the {magnitude(args.add)} already "
            f"(--included), it is {_growth(args.add, routed - args.add)}."
        )
    rows = [
        (
            f"{row['law']} {row['coefficients']}",
            f"{row['gain']:z.4f}",
            "more than any"
            if math.isinf(row["compute"])
            else f"{100 * (row['compute'] - 1):+z.1f} %",
            "-" if row["seeds"] is None else f"{row['seeds']:,}",
            row["extrapolated"] or "no",
        )
        for row in table.iter_rows(named=True)
    ]
    print_table(
        ("law", "nats", "compute", "seeds to see it", "beyond the runs it was fitted on"),
        rows,
    )
    least, most = table["gain"].min(), table["gain"].max()
    say(
        f"The laws expect {least:.4f} to {most:.4f} nats. Seeds: of each arm, for the gain to "
        f"be seen nine times in ten at a noise of"
    )
    say(
        f"{args.noise:g} nats between seeds; - where none is expected. A note names the "
        f"range that a law was fitted on if this step leaves it."
    )
    say(_cautions([str(name) for name in table["law"]]))
    return 0


def _growth(add: float, routed: float) -> str:
    return (
        f"{100 * add / routed:.1f} %, {math.log2(1 + add / routed):.3f} of a doubling"
        if routed > 0
        else "all of it"
    )


def _cautions(names: list[str]) -> str:
    from moe_lab.scaling import LAWS

    cautions = {name: LAWS[name].caution for name in names}
    return "\n".join(f"{name}: {text}" for name, text in cautions.items() if text)


def verdict(args: argparse.Namespace) -> int:
    from moe_lab.scaling import MissingColumnsError, SeveralBudgetsError, wall_study

    if args.out is not None:
        refuse_other(args.out, "scaling verdict", [f"{name}.parquet" for name in TABLES], VERDICT)
        own = args.runs.is_file() and args.runs.resolve() == (args.out / "runs.parquet").resolve()
        require(not own, "a folder without the runs that are read", args.out, "another --out")
    try:
        with shown(not args.json):
            study = wall_study(
                _runs(args),
                arm=args.arm,
                by_budget=args.by_budget,
                noise_sd=args.noise,
                vocab_size=args.vocab_size,
            )
            _ = study.settles  # simulates, before anything is printed
    except MissingColumnsError as error:
        mapped = " ".join(f"--column {name}=YOURS" for name in error.missing)
        got = f"only {', '.join(error.columns)}"
        raise AnalysisError(expected(f"a column {', '.join(error.missing)}", got, mapped)) from None
    except SeveralBudgetsError as error:
        raise AnalysisError(expected("one token budget", error.budgets, "--by-budget")) from None
    if args.out is not None:
        _write(args.out, study)
    if args.json:
        print_json([_as_json(study, tokens, one) for tokens, one in study.verdicts.items()])
    else:
        _print(study)
    return 0


def _print(study: "WallStudy") -> None:
    verdicts = study.verdicts.items()
    say("\n\n".join(_verdict_text(study, tokens, one) for tokens, one in verdicts))
    for tokens, one in verdicts:
        say(f"\nGains per doubling{_at(tokens)}")
        rows = [
            (
                f"{g.ratio_from:g}",
                f"{g.ratio_to:g}",
                f"{g.gain:z.4f}",
                f"{g.lo:z.4f} to {g.hi:z.4f}",
                f"x{g.compute:.2f}",
            )
            for g in one.gains
        ]
        print_table(("from", "to", "nats", "90 % interval", "compute"), rows)
    if study.alternatives.height:
        say("\nInstead of more experts, at the same total: loss less that of the experts")
        header = ("alternative", "ratio", "pairs", "nats", "95 % interval", "compute", "result")
        rows = [_alternative(row) for row in study.alternatives.iter_rows(named=True)]
        print_table(header, rows)
    if study.settles:
        say(f"\nWhat would settle it: {study.settles}.")
    for name, best in study.optima.items():
        say(f"\nW4, apart from the verdict, arm {name}: {best.sentence}")
    say("\nWhat else could have made or hidden a wall")
    print_table(("confound", "status", "detail"), study.confounds.rows())


def _alternative(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Alternative, ratio, pairs, nats, interval, compute and result as text."""
    return (
        row["alternative"],
        f"{row['ratio']:g}",
        f"{row['seeds']}",
        f"{row['difference']:+z.4f}",
        "-" if row["lo"] is None else f"{row['lo']:+z.4f} to {row['hi']:+z.4f}",
        f"x{row['compute']:.2f}",
        row["result"],
    )


def _at(tokens: float | None) -> str:
    return "" if tokens is None else f" at {magnitude(tokens)} tokens"


def _verdict_text(study: "WallStudy", tokens: float | None, one: "Verdict") -> str:
    """Outcome, sentence and reasons."""
    arm = f" (arm {study.arm})" if study.arm else ""
    reasons = [f"- {reason}" for reason in one.reasons]
    return "\n".join([f"{one.outcome.upper()}{_at(tokens)}{arm}", one.sentence, *reasons])


JSON_FIELDS = (
    "outcome",
    "at",
    "elasticity",
    "interval",
    "sentence",
    "reasons",
    "margin",
    "compute_slope",
    "noise_sd",
    "r_star",
    "pays",
    "outlier",
    "without",
    "caveats",
)


def _as_json(study: "WallStudy", tokens: float | None, one: "Verdict") -> dict[str, Any]:
    tables = {
        "gains": one.gain_table(),
        "forms": one.form_table(),
        "confounds": study.confounds,
        "against_experts": study.alternatives,
    }
    return (
        {"tokens": tokens, "arm": study.arm, "settles": study.settles or None}
        | {name: getattr(one, name) for name in JSON_FIELDS}
        | {name: table.to_dicts() for name, table in tables.items()}
    )


TABLES = ("runs", "confounds", "gains", "forms", "against_experts")
VERDICT = "verdict.md"
"""What ``scaling verdict --out`` writes."""
FIT_TABLES = ("coefficients", "points", "curves")
FIT_FIGURE = "law.html"
"""What ``scaling fit --out`` writes."""


def _write(folder: Path, study: "WallStudy") -> None:
    import polars as pl

    from moe_lab.files import write_parquet, write_text
    from moe_lab.versions import provenance

    origin = {name: pl.lit(value) for name, value in provenance().items() if name != "command"}
    frames = {"runs": study.runs.with_columns(**origin), "confounds": study.confounds}
    for name, method in (("gains", "gain_table"), ("forms", "form_table")):
        frames[name] = pl.concat(
            getattr(one, method)().with_columns(tokens=pl.lit(tokens, pl.Float64))
            for tokens, one in study.verdicts.items()
        )
    if study.alternatives.height:
        frames["against_experts"] = study.alternatives
    for name, frame in frames.items():
        write_parquet(folder / f"{name}.parquet", frame)
    write_text(folder / VERDICT, _markdown(study))


def _markdown(study: "WallStudy") -> str:
    verdicts = (_verdict_text(study, tokens, one) for tokens, one in study.verdicts.items())
    parts = ["\n\n".join(verdicts)]
    if study.settles:
        parts.append(f"What would settle it: {study.settles}.")
    for name, best in study.optima.items():
        parts.append(f"W4, apart from the verdict, arm {name}: {best.sentence}")
    if study.alternatives.height:
        rows = map(_alternative, study.alternatives.iter_rows(named=True))
        lines = [
            f"- {name} at ratio {ratio}: {nats} nats ({interval}, {pairs} pairs), {compute} in "
            f"compute: {result}"
            for name, ratio, pairs, nats, interval, compute, result in rows
        ]
        parts.append("\n".join(["Instead of more experts, at the same total", *lines]))
    lines = [f"- {name}: {status}; {detail}" for name, status, detail in study.confounds.rows()]
    parts.append("\n".join(["Confounds", *lines]))
    return "\n\n".join(parts) + "\n"


def fit(args: argparse.Namespace) -> int:
    from moe_lab import scaling

    if args.out is not None:
        refuse_other(
            args.out, "scaling fit", [f"{name}.parquet" for name in FIT_TABLES], FIT_FIGURE
        )
    clusters = args.cluster is None or args.bootstrap
    require(clusters, "--cluster with a bootstrap", "--bootstrap 0", "leaving --cluster out")
    runs, arm = scaling.main_arm(_runs(args), args.arm)
    delta = scaling.SQUARES if args.squares else scaling.HUBER
    result = scaling.fit(args.law, runs, delta=delta)
    if args.bootstrap > 0 and result.law.terms:
        kind = "cluster" if args.cluster else "runs"
        result = scaling.bootstrap(result, args.bootstrap, kind=kind, cluster=args.cluster)
    limit = ""
    if result.law.terms and result.law.shape and not result.unidentified:
        limit = scaling.saturation(result).sentence if result.law.output == "loss" else ""
    found = scaling.quality(result)
    if args.out is not None:
        _write_fit(args.out, result)
    if args.json:
        print_json(_fit_json(result, found, limit))
        return 0
    unit = "ln loss" if result.log else "loss, nats"
    how = "squares" if args.squares or not result.log else "Huber 1e-3"
    arm = f" of arm {arm}" if arm else ""
    say(f"{result.law.title} ({result.law.source}) on {result.runs} runs{arm}, by {how} on {unit}")
    print_table(
        ("coefficient", "value", "95 % interval"),
        [_coefficient(result, name, value) for name, value in result.coefficients.items()],
    )
    if result.unidentified:
        say(
            f"not identified: {', '.join(result.unidentified)}; these runs do not vary what would "
            "tell them apart (one size, or tokens tied to it)"
        )
    say(
        f"objective {result.objective:.10g}, rmse of {unit} {result.rmse:.4g}, "
        f"AICc {result.aicc:.2f}"
    )
    if result.agreed < 0.25:
        say(
            f"only {result.agreed:.0%} of the best starts ended here: the runs hardly fix these "
            "coefficients"
        )
    _print_quality(found)
    caution = _cautions([result.law.name]) if result.law.name in scaling.LAWS else ""
    say("\n".join(text for text in (limit, caution) if text))
    return 0


def _write_fit(folder: Path, result: "Fit") -> None:
    import polars as pl

    from moe_lab.files import atomic_path
    from moe_lab.report import figures
    from moe_lab.scaling import law_curves

    law = law_curves(result)
    rows = [_coefficient(result, name, value) for name, value in result.coefficients.items()]
    names = ["coefficient", "value", "interval"]
    frames = {
        "coefficients": pl.DataFrame(rows, schema=names, orient="row"),
        "points": law.points.rename({"x": law.variable}),
        "curves": law.curves.rename({"x": law.variable}),
    }
    for name, frame in frames.items():
        with atomic_path(folder / f"{name}.parquet") as path:
            frame.write_parquet(path)
    figure = figures.law_fit(law.points, law.curves, law.variable)
    with atomic_path(folder / FIT_FIGURE) as path:
        figure.write_html(path)


def _coefficient(result: "Fit", name: str, value: float) -> tuple[str, str, str]:
    if name in result.unidentified:
        return name, f"({value:.6g})", "not identified"
    if result.draws is None or name not in result.draws.columns:
        return name, f"{value:.6g}", "-"
    low, high = result.interval(name)
    return name, f"{value:.6g}", f"{low:.6g} to {high:.6g}"


def _print_quality(found: "Quality") -> None:
    seeds = (
        "no runs are repeated"
        if found.seed_sd is None
        else f"{found.rmse / found.seed_sd:.1f} times the {found.seed_sd:.4f} between repeated runs"
        if found.seed_sd
        else "repeated runs agree to the bit"
    )
    say(f"R2 of the loss {found.r2:.4f}; rmse {found.rmse:.4f} nats, {seeds}")
    rows = [
        (f"{size:.4g}", runs, f"{bias:+z.4f}", f"{rmse:.4f}")
        for size, runs, bias, rmse in found.by_size.rows()
    ]
    print_table((found.by_size.columns[0], "runs", "bias, nats", "rmse, nats"), rows)
    for value, runs, bias, rmse in found.held_out.rows():
        say(
            f"held out, {found.variable} {value:.4g} ({runs} runs): predicted less measured "
            f"{bias:+z.4f} nats, rmse {rmse:.4f}"
        )
    if found.rivals.height > 1:
        header = ("law on the same runs, least squares", "coefficients", "AICc above the best")
        rows = [
            (row["law"], row["coefficients"], f"{row['delta']:.1f}")
            for row in found.rivals.iter_rows(named=True)
        ]
        print_table(header, rows)


def _fit_json(result: "Fit", found: "Quality", limit: str) -> dict[str, Any]:
    drawn = [] if result.draws is None else result.draws.columns
    identified = [name for name in result.coefficients if name not in result.unidentified]
    numbers = ("objective", "rmse", "aicc", "runs", "agreed")
    tables = {name: getattr(found, name).to_dicts() for name in ("by_size", "held_out", "rivals")}
    return {
        "law": result.law.name,
        "coefficients": result.coefficients,
        "unidentified": list(result.unidentified),
        "intervals": {name: result.interval(name) for name in identified if name in drawn},
        **{name: getattr(result, name) for name in numbers},
        "unit": "ln loss" if result.log else "nats",
        "r2": found.r2,
        "rmse_nats": found.rmse,
        "seed_sd": found.seed_sd,
        **tables,
        "saturation": limit or None,
    }
