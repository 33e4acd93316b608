"""How often the alarms are right: false alarms of healthy mini runs, faults that are found, and the
steps that it takes.

    python experiments/alarms/judge.py runs/alarms --write-docs

It reads the readings that ``record.py`` recorded and writes, beside itself, ``runs.parquet`` (one
row per run and alarm) and ``roc.parquet`` (false and found runs at every
threshold), and with ``--write-docs`` the tables of docs/alarms.md. Without a folder it reads the
committed ``runs.parquet``. Only runs of the split "judge" count in the tables; the thresholds were
set on the others ("set", "again").
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import beta

from moe_lab.files import atomic_path, write_text
from moe_lab.training.alarms import ALARMS, AlarmRule
from moe_lab.training.readings import LayerReading
from moe_lab.versions import provenance

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "alarms.md"
BEGIN, END = "<!-- alarm rates -->", "<!-- end of alarm rates -->"
FINDS = (
    ("no_balance", "dead_experts"),
    ("no_balance", "router_collapse"),
    ("no_balance", "load_drift"),
    ("reversed_loss", "load_drift"),
    ("reversed_loss", "router_collapse"),
    ("wrong_sign", "bias_direction"),
    ("bias_rate", "bias_runaway"),
    ("router_lr", "router_speed"),
    ("frozen_router", "router_frozen"),
    ("zero_expert", "dead_experts"),
    ("flattened", "entropy_high"),
    ("sharpened", "entropy_low"),
    ("balance_loss", "balance_dominates"),
    ("stale_bias", "zero_share"),
    ("budget", "budget_drift"),
)
"""Fault and an alarm that may find it; another alarm does not count."""

PLANTED = {
    "no_balance": "no balance loss, 10 times the learning rate",
    "wrong_sign": "the controller moves the selection bias the wrong way",
    "bias_rate": "the controller's rate is 100 times too large",
    "router_lr": "30 times the learning rate on the router",
    "frozen_router": "the router's parameters are not trained",
    "zero_expert": "one expert's matrices are zero, from step 0 or 40 on",
    "flattened": "router logits 100 times too small",
    "sharpened": "a loss that lowers the entropy of the router, coefficient 1",
    "balance_loss": "a balance loss 1,000 times too large",
    "stale_bias": "another model's bias, and a controller that is not called, from step 0 or 40 on",
    "budget": "sharpened scores (fixed p), or p, lambda or cut-offs moved and then left, from "
    "step 40 on",
    "reversed_loss": "a balance loss of the wrong sign, from step 0 or 40 on",
}


def observed(
    rule: type[AlarmRule], readings: list[list[LayerReading]], onset: int
) -> dict[str, Any]:
    """What one alarm does in a run: the most alarming value that it held after the onset, the steps
    from the onset until it is raised (null where it is not), and whether it was raised before.

    An alarm that was raised before the onset and is still active is not raised again.
    """
    peak, raised, early = None, None, False
    rules = [rule() for _ in readings[0]]
    for step in readings:
        for each, reading in zip(rules, step, strict=True):
            begun = each.raised(reading, rule.threshold) is not None
            if reading.step <= onset:
                early |= begun
                continue
            if begun and raised is None:
                raised = reading.step - onset
            if len(each.past) == rule.patience:
                value = max(each.past) if rule.below else min(each.past)
                worse = peak is None or (value < peak if rule.below else value > peak)
                peak = value if worse else peak
    return {"peak": peak, "raised": raised, "early": early}


def replay(folder: Path) -> pl.DataFrame:
    """[split, fault, arm, size, seed, onset, alarm, peak, raised, early] of the recorded runs."""
    from record import cases, load

    rows = []
    for case in cases():
        path = folder / f"{case.name}.npz"
        if not path.exists():
            continue
        readings = load(path)[: case.steps]
        for alarm, rule in ALARMS.items():
            if not case.fault or (case.fault, alarm) in FINDS:
                names = ("split", "fault", "arm", "size", "seed", "onset")
                fields = {name: getattr(case, name) for name in names}
                rows.append(fields | {"alarm": alarm} | observed(rule, readings, case.onset))
    small: Any = {"seed": pl.Int16, "onset": pl.Int16, "raised": pl.Int16, "peak": pl.Float32}
    frame = pl.DataFrame(rows, infer_schema_length=None).cast(small)
    return frame.sort("split", "fault", "alarm", "arm", "size", "seed", "onset")


def false_alarms(runs: pl.DataFrame) -> pl.DataFrame:
    """[alarm, measured, false, upper]: healthy runs with a value, those that raised the alarm, and
    the upper end of the rate's 95 % interval (Clopper-Pearson).
    """
    healthy = runs.filter(pl.col("fault") == "")
    table = healthy.group_by("alarm").agg(
        measured=pl.col("peak").is_not_null().sum(), false=pl.col("raised").is_not_null().sum()
    )
    n, k = table["measured"].to_numpy(), table["false"].to_numpy()
    upper = np.where(k < n, beta.ppf(0.975, k + 1, np.maximum(n - k, 1)), 1.0)
    return table.with_columns(upper=pl.Series(upper)).sort("alarm")


def found_faults(runs: pl.DataFrame) -> pl.DataFrame:
    """[fault, alarm, planted, found, delay, longest]: runs with each fault, those in which its
    alarm was raised after the onset, and the median and largest number of steps until then.
    """
    return (
        runs.filter(pl.col("fault") != "")
        .group_by("fault", "alarm")
        .agg(
            planted=pl.len(),
            found=pl.col("raised").is_not_null().sum(),
            delay=pl.col("raised").median(),
            longest=pl.col("raised").max(),
        )
        .sort("fault", "alarm")
    )


def roc(runs: pl.DataFrame) -> pl.DataFrame:
    """[fault, alarm, threshold, false, found]: shares of the healthy and of the faulty runs past
    every threshold at which one of them changes.
    """
    rows = []
    for fault, alarm in FINDS:
        sign = -1 if ALARMS[alarm].below else 1
        healthy, faulty = (
            (sign * part["peak"]).fill_null(-np.inf).to_numpy()
            for part in (_of(runs, "", alarm), _of(runs, fault, alarm))
        )
        for threshold in np.unique([*healthy, *faulty])[::-1]:
            shares = [float((values >= threshold).mean()) for values in (healthy, faulty)]
            place = {"fault": fault, "alarm": alarm, "threshold": sign * float(threshold)}
            rows.append(place | {"false": shares[0], "found": shares[1]})
    return pl.DataFrame(rows).cast({"threshold": pl.Float32})


def _of(runs: pl.DataFrame, fault: str, alarm: str) -> pl.DataFrame:
    return runs.filter(pl.col("fault") == fault, pl.col("alarm") == alarm)


def area(curve: pl.DataFrame) -> float:
    """The area under one ROC curve: 1 where a threshold separates healthy from faulty runs."""
    return float(np.trapezoid([0.0, *curve["found"]], [0.0, *curve["false"]]))


def tables(runs: pl.DataFrame) -> str:
    """Both tables of the docs, in Markdown."""
    runs = runs.filter(pl.col("split") == "judge")
    false, found, curves = false_alarms(runs), found_faults(runs), roc(runs)
    lines = ["| alarm | raised at a value | held for | false alarms |", "|---|---|---|---|"]
    for alarm, rule in ALARMS.items():
        (row,) = false.filter(pl.col("alarm") == alarm).iter_rows(named=True)
        rate = f"{row['false']} of {row['measured']} (at most {row['upper']:.1%})"
        side = "below" if rule.below else "above"
        readings = f"{rule.patience} reading" + "s" * (rule.patience > 1)
        lines.append(f"| `{alarm}` | {side} {rule.threshold:g} | {readings} | {rate} |")
    lines += [
        "",
        "| fault | alarm | found | delay in steps: median, largest | area under the ROC |",
        "|---|---|---|---|---|",
    ]
    for fault, alarm in FINDS:
        (row,) = _of(found, fault, alarm).iter_rows(named=True)
        cells = [
            PLANTED[fault],
            f"`{alarm}`",
            f"{row['found']} of {row['planted']}",
            "-" if row["delay"] is None else f"{row['delay']:.0f}, {row['longest']}",
            f"{area(_of(curves, fault, alarm)):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="what record.py recorded")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs")
    args = parser.parse_args()
    if args.folder is not None:
        runs = replay(args.folder)
        for name, frame in (("runs", runs), ("roc", roc(runs.filter(pl.col("split") == "judge")))):
            with atomic_path(HERE / f"{name}.parquet") as temporary:
                frame.with_columns(
                    pl.lit(value).alias(key) for key, value in provenance().items()
                ).write_parquet(temporary, compression="zstd", compression_level=19)
    text = tables(pl.read_parquet(HERE / "runs.parquet"))
    print(text)
    if args.write_docs:
        page = DOCS.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        write_text(DOCS, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
