"""``moe-lab sweep {plan,run,status}``: designed grids.

``moe-lab sweep RECIPE`` shows the plan; on a terminal it asks whether to run it.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.commands.options import (
    add_device,
    add_json,
    add_number,
    add_seed,
    add_text,
    examples,
    launcher_options,
    output_page,
    output_place,
    place,
    print_json,
    refuse_ignored,
    text_changes,
)
from moe_lab.errors import MoELabError, expected, require
from moe_lab.terminal import dot_plot, print_table, say, window_width

if TYPE_CHECKING:
    import polars as pl

    from moe_lab.model import DecoderConfig
    from moe_lab.sweeps import SweepConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab sweep plan experiments/sparsity_wall.py --preset small",
        "moe-lab sweep run experiments/sparsity_wall.py --preset small --out runs/small",
        "moe-lab sweep status runs/small",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="{plan,run,status}", required=True)
    plan_parser = verbs.add_parser(
        "plan",
        help="the table of runs, their cost and a time estimate",
        epilog=examples(
            "moe-lab sweep plan experiments/sparsity_wall.py --preset small",
            "moe-lab sweep plan experiments/sparsity_wall.py --preset small --power",
        ),
    )
    _add_recipe(plan_parser)
    add_number(
        plan_parser,
        "--workers",
        4,
        whole=True,
        default=None,
        help="processes to plan for (default: one a core)",
    )
    plan_parser.add_argument(
        "--no-calibration", action="store_true", help="leave out the time estimate"
    )
    _add_power(plan_parser)
    add_seed(plan_parser, "first of the seeds")
    add_device(plan_parser)
    add_text(plan_parser)
    add_json(plan_parser)
    run_parser = verbs.add_parser(
        "run",
        help="do every run that is not finished, then write the report",
        epilog=examples(
            "moe-lab sweep run experiments/sparsity_wall.py --preset small --out runs/small",
            "moe-lab sweep run experiments/sparsity_wall.py --alternative ngram --max-hours 12",
            "moe-lab sweep run experiments/sparsity_wall.py --preset gpu --device cuda "
            "--launcher slurm --launcher-option partition=gpu",
        ),
    )
    _add_recipe(run_parser)
    run_parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)
    add_run_arguments(run_parser, out=None)
    status_parser = verbs.add_parser(
        "status",
        help="how far each run of a folder is",
        epilog=examples("moe-lab sweep status runs/small"),
    )
    status_parser.add_argument("folder", type=place, help="the sweep's folder or URL")
    add_json(status_parser)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, help="a recipe file, such as experiments/sparsity_wall.py"
    )
    parser.add_argument(
        "--preset",
        default=None,
        help="which of the recipe's presets: moe-lab list presets RECIPE (default: demo, else its "
        "first)",
    )
    parser.add_argument(
        "--alternative",
        default=None,
        metavar="NAME",
        help="compare more experts with ngram, depth or width at the same total",
    )


def _add_power(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "power", "what the sweep could tell, and the cheapest one that could"
    )
    group.add_argument(
        "--power",
        action="store_true",
        help="the chance of each verdict instead of the table of runs",
    )
    add_number(
        group,
        "--noise",
        0.006,
        default=None,
        metavar="NATS",
        help="noise between seeds, in nats (default: typical of the size)",
    )
    group.add_argument(
        "--ratios",
        type=_ratios,
        default=None,
        metavar="1,2,4,...",
        help="ratios in place of the recipe's",
    )
    add_number(
        group,
        "--seeds",
        2,
        whole=True,
        default=None,
        metavar="N",
        help="seeds per ratio in place of the recipe's",
    )
    group.add_argument(
        "--truth",
        action="append",
        default=None,
        metavar="KIND",
        help="line, saturation:300, wall:32, law:ludziejewski; repeatable",
    )
    add_number(
        group, "--draws", 500, whole=True, default=500, help="simulated sweeps per truth and design"
    )
    add_number(
        group,
        "--target",
        0.9,
        most=1,
        default=0.9,
        help="probability with which every truth is to be settled",
    )


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = sorted({float(part) for part in text.split(",")})
    except ValueError:
        ratios = []
    if len(ratios) < 3 or not all(1 <= ratio < math.inf for ratio in ratios):
        what = "--ratios as three or more numbers of at least 1 with commas between"
        raise MoELabError(expected(what, repr(text), "--ratios 1,2,4,8"), "--ratios")
    return tuple(ratios)


def add_run_arguments(parser: argparse.ArgumentParser, out: str | None) -> None:
    """The options of everything that runs a sweep."""
    parser.add_argument(
        "--out",
        type=output_place,
        default=out and Path(out),
        metavar="PLACE",
        help="the sweep's folder, or a URL such as s3://bucket/sweep (extra store)"
        + ("" if out else " (default: runs/<sweep name>)"),
    )
    add_number(
        parser,
        "--workers",
        4,
        whole=True,
        default=None,
        help="processes (default: one a core, or one a GPU)",
    )
    parser.add_argument(
        "--launcher",
        choices=("local", "ray", "slurm"),
        default="local",
        help="what runs the workers",
    )
    parser.add_argument(
        "--launcher-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="local: stall_minutes; ray: address, cpus, gpus, memory_gb; "
        "slurm: cluster, minutes, cpus, gpus, memory_gb, partition, account, qos, requeues",
    )
    add_number(
        parser,
        "--max-hours",
        12,
        least=0,
        default=None,
        help="start no further run after this many hours",
    )
    add_number(
        parser,
        "--max-flops",
        "1e18",
        least=0,
        default=None,
        metavar="N",
        help="start no run that would take this call past N training FLOPs "
        "(as `sweep plan` counts them)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="train runs again that failed in an earlier call",
    )
    parser.add_argument(
        "--report",
        type=output_page,
        default=None,
        metavar="FILE",
        help="where the page goes "
        "(default: report.html in the folder; of a URL, in runs/<sweep name>)",
    )
    add_seed(parser, "first of the seeds")
    add_device(parser)
    add_text(parser)
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    return {"plan": plan, "run": run, "status": status}[args.verb](args)


def plan(args: argparse.Namespace) -> int:
    from moe_lab import sweeps

    timed = args.workers is None or not args.no_calibration
    require(timed, "--workers with a time estimate", "--no-calibration", "leaving one out")
    if not args.power:
        power = {"noise", "ratios", "seeds", "truth", "draws", "target"}
        refuse_ignored(args, _add_power, power, "a plan without --power")
    sweep = _sweep(args)
    frame = sweeps.plan(sweep, calibrate=not args.no_calibration)
    if args.power:
        return _power(args, frame)
    if args.json:
        print(frame.write_json())
        return 0
    print_table(sweeps.PLAN_COLUMNS, sweeps.plan_rows(frame))
    print(sweeps.plan_totals(frame))
    device = sweep.runs[0].device
    if (room := sweeps.free_memory(device)) and (
        line := sweeps.too_large(dict(frame.select("name", "memory_bytes").rows()), room)
    ):
        say(line)
    if not args.no_calibration:
        print(f"about {sweeps.wall_minutes(frame, args.workers):.1f} minutes in all")
    return 0


def _power(args: argparse.Namespace, frame: "pl.DataFrame") -> int:
    """The chance of each verdict of the sweep's main arm, and the cheapest design that settles
    every truth.
    """
    from moe_lab import sweeps
    from moe_lab.scaling import parse_truth, plan_power

    design = sweeps.design_of(frame, ratios=args.ratios, seeds=args.seeds)
    truths = None if args.truth is None else [parse_truth(text) for text in args.truth]
    speed = None if args.no_calibration else sweeps.flops_per_second(frame, args.workers)
    power = plan_power(
        design,
        noise_sd=args.noise,
        truths=truths,
        draws=args.draws,
        target=args.target,
        flops_per_second=speed,
    )
    if args.json:
        best = (
            None
            if power.best is None
            else power.best.to_dict() | {"flops": power.best.flops, "runs": power.best.runs}
        )
        print_json(
            {
                "design": design.to_dict() | {"flops": design.flops, "runs": design.runs},
                "noise": power.noise,
                "noise_source": power.noise_source,
                "power": power.own.to_dicts(),
                "cheapest": best,
                "tried": power.others.to_dicts(),
            }
        )
        return 0
    say(sweeps.power_text(power, speed))
    names = [name.replace("_", " ") for name in sweeps.POWER_COLUMNS]
    print_table(["were the truth", *names], sweeps.power_rows(power))
    say(sweeps.cheapest_text(power, speed))
    return 0


def run(args: argparse.Namespace) -> int:
    """Run, report, and say in one line what came of it: exit code 0 when every run finished, 2 when
    some failed, 130 interrupted.
    """
    from moe_lab import sweeps

    sweep = _sweep(args)
    if getattr(args, "ask", False) and not _confirmed(args, sweep):
        return 0
    out = args.out or Path("runs") / sweep.name
    outcome = sweeps.run(
        sweep,
        out,
        workers=args.workers,
        progress=not args.json,
        launcher=args.launcher,
        launcher_options=launcher_options(args.launcher_option),
        max_hours=args.max_hours,
        max_flops=args.max_flops,
        retry_failed=args.retry_failed,
    )
    page, judged = None, None
    if outcome.finished and not outcome.interrupted:
        from moe_lab.report import write_report

        page = (
            args.report
            or (out if isinstance(out, Path) else Path("runs") / sweep.name) / "report.html"
        )
        with sweeps.readable(out) as folder:
            write_report(
                [folder],
                page,
                title=f"moe_lab report: {folder.name if folder == out else out}",
                command=_command(args),
            )
            judged = _judged(folder)
    if args.json:
        failed = [
            {"run": run.run, "name": run.name, "reason": run.reason} for run in outcome.failed
        ]
        ended = {
            "finished": outcome.finished,
            "failed": failed,
            "interrupted": outcome.interrupted,
            "stopped": outcome.stopped,
        }
        verdict = None if judged is None else {"verdict": judged[0], "sentence": judged[1]}
        print_json(ended | {"verdict": verdict, "report": page, "out": out})
    else:
        minutes = f"{outcome.seconds / 60:.1f} minutes"
        print(f"{len(outcome.finished)} of {len(sweep.runs)} runs finished in {minutes}")
        for failure in outcome.failed:
            print(f"failed: {failure.name} ({failure.run}): {failure.reason}", file=sys.stderr)
        if outcome.failed:
            print(
                f"`moe-lab sweep status {shlex.quote(str(out))}` shows their last lines, "
                "--retry-failed trains them again",
                file=sys.stderr,
            )
        if outcome.stopped:
            say(outcome.stopped)
        if judged is not None:
            print("\n".join(judged[2]))
            say(f"verdict: {judged[1]}")
        if page is not None:
            print(f"report: {page}")
            print(f"next: moe-lab scaling verdict {shlex.quote(str(out))}")
    return 130 if outcome.interrupted else 2 if outcome.failed else 0


def _confirmed(args: argparse.Namespace, sweep: "SweepConfig") -> bool:
    """Show the plan; on a terminal, ask whether to run it."""
    from moe_lab import sweeps

    frame = sweeps.plan(sweep, calibrate=False)
    if args.json:
        print(frame.write_json())
        return False
    print_table(sweeps.PLAN_COLUMNS, sweeps.plan_rows(frame))
    print(sweeps.plan_totals(frame))
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print(f"next: moe-lab sweep run {shlex.quote(str(args.recipe))}, with the same options")
        return False
    return input(f"run these {frame.height} runs? [y/N] ").strip().lower() in ("y", "yes")


def _judged(folder: Path) -> tuple[str, str, list[str]]:
    """The verdict on the finished runs, its sentence, and loss against ratio as lines of text."""
    from moe_lab.scaling import read_runs, wall_study

    try:
        study = wall_study(read_runs(folder))
    except MoELabError as error:
        return "cannot tell", f"cannot tell: {error}", []
    runs = study.judged.filter(study.judged["tokens"] == study.judged["tokens"].max())
    losses = runs.group_by("ratio").agg("loss").sort("ratio")
    rows = [(f"ratio {ratio:g}", values) for ratio, values in losses.rows()]
    arm = f" of arm {study.arm}" if study.arm else ""
    title = f"loss{arm} in nats/token at each ratio: mean (o) and range of its seeds"
    lines = [title, *dot_plot(rows, window_width() or 100)]
    return study.verdict.outcome.value, study.verdict.sentence, lines


def status(args: argparse.Namespace) -> int:
    from moe_lab import sweeps

    frame = sweeps.status(args.folder)
    if args.json:
        print(frame.write_json())
        return 0
    shown = sweeps.status_rows(frame)
    print_table(shown.columns, shown.rows())
    for line in sweeps.status_lines(frame):
        say(line)
    return 0


def _sweep(args: argparse.Namespace) -> "SweepConfig":
    """The recipe's sweep on the text that was asked for, with the content hash of each corpus
    recorded in its runs.
    """
    from moe_lab.sweeps import load_recipe

    sweep = load_recipe(
        args.recipe,
        args.preset,
        seed=args.seed,
        device=args.device,
        alternative=getattr(args, "alternative", None),
    )
    changes = text_changes(args)
    resolved = {}
    for run in sweep.runs:
        if run.text not in resolved:
            text = type(run.text).from_dict(
                run.text.to_dict() | ({"corpus_hash": None} | changes if changes else {})
            )
            resolved[run.text] = text if text.corpus_hash else text.resolve()
    models: dict[tuple[DecoderConfig, int], DecoderConfig] = {}
    runs = []
    for run in sweep.runs:
        text, model = resolved[run.text], run.model
        if model.vocab_size != text.vocab_size:
            wanted = model, text.vocab_size
            model = models[wanted] = models.get(wanted) or model.replace(vocab_size=text.vocab_size)
        runs.append(
            run if text == run.text and model is run.model else run.replace(text=text, model=model)
        )
    return (
        sweep
        if all(new is old for new, old in zip(runs, sweep.runs, strict=True))
        else sweep.replace(runs=tuple(runs))
    )


def _command(args: argparse.Namespace) -> str:
    """The command line that makes this report again."""
    if getattr(args, "verb", None) is None:
        return f"moe-lab demo --out {shlex.quote(str(args.out))}"
    chosen = f" --alternative {args.alternative}" if args.alternative else ""
    preset = f" --preset {args.preset}" if args.preset else ""
    recipe = f"{shlex.quote(str(args.recipe))}{preset}{chosen}"
    return f"moe-lab sweep run {recipe} --out {shlex.quote(str(args.out or 'runs/...'))}"
