"""Runs from where users keep them: a Parquet, CSV or JSON-lines file with one row per run, or the
folder of a sweep.

Out: one frame with the columns that `wall_verdict`, `confounds` and `fit` name. A run of a sweep's
folder counts when its ``done`` file lies there; ``train_tokens`` is called tokens.
"""

import codecs
import csv
import math
import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import polars as pl

from moe_lab.errors import AnalysisError, RunError, expected, require
from moe_lab.files import parse_json, read_regular
from moe_lab.runs.done_file import check_seal
from moe_lab.runs.layout import DONE, RESULT
from moe_lab.runs.record import parse_object
from moe_lab.sandbox import read_parquet
from moe_lab.scaling.compute_slope import measured_slope
from moe_lab.scaling.confounds import SHORT
from moe_lab.scaling.sweep_losses import COLUMNS, MissingColumnsError

READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".parquet": lambda path: read_parquet(path, AnalysisError),
    ".csv": lambda path: _text(path),
    ".tsv": lambda path: _text(path),
    ".jsonl": lambda path: _json_lines(path),
}
MAX_COLUMNS = 4096
NOT_JSON = re.compile(rb":\s*(NaN|-?Infinity)\b")
SEPARATORS = (",", ";", "\t")
MARKS = ((".", ","), (",", "."))
"""Decimal mark and the thousands separator beside it."""
GROUPED = r"^[+-]?\d{{1,3}}({g}\d{{3}})+({d}\d*)?$"
"""A number with thousands separators."""
DECIMAL = (
    r"^[+-]?(\d*{d}(\d{{1,2}}|\d{{4,}})|(0*|\d{{4,}}){d}\d{{3}}"
    r"|\d+{d}\d+e[+-]?\d+|\d{{1,3}}({g}\d{{3}})+{d}\d+|\d{{1,3}}({g}\d{{3}}){{2,}})(e[+-]?\d+)?$"
)
"""A number in which ``d`` cannot stand before thousands, or ``g`` only there."""
NAMES = {
    "train_tokens": "tokens",
    "tokens_trained": "tokens",
    "training_tokens": "tokens",
    "final_loss": "loss",
    "val_loss": "loss",
    "validation_loss": "loss",
}


class LossUnit(StrEnum):
    NATS = "nats"
    BITS = "bits"
    BITS_PER_BYTE = "bpb"
    PERPLEXITY = "perplexity"


def read_runs(
    path: Path | str,
    *,
    names: Sequence[tuple[str, str]] = (),
    unit: LossUnit | None = None,
    bytes_per_token: float | None = None,
) -> pl.DataFrame:
    """One row per run, with ``loss`` in nats per token.

    Args:
        names: (our name, yours) of columns. Names are compared without case, spaces and signs, so
            "Active Params" is active_params.
        unit: of the losses: nats or bits per token, perplexity per token, or bits per byte, which
            also needs ``bytes_per_token`` of the text that the losses are of. None: nats, and a
            loss from a column whose name says bits or perplexity is refused.

    Raises ``AnalysisError`` in one line where there is nothing that can be read.
    """
    path = Path(path)
    if path.is_dir():
        frame = _folder(path)
    elif not path.exists():
        raise AnalysisError(
            expected(
                "a file of runs or a sweep's folder",
                f"no such path: {path}",
                "one written by moe-lab sweep run",
            )
        )
    elif path.suffix.lower() not in READERS:
        raise AnalysisError(
            expected(f"a file ending in {', '.join(READERS)} or a sweep's folder", path.name)
        )
    else:
        try:
            frame = READERS[path.suffix.lower()](path)
        except (
            pl.exceptions.PolarsError,
            pl.exceptions.PanicException,
            csv.Error,
            OSError,
            ValueError,
        ) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise AnalysisError(
                expected(f"a readable {path.suffix[1:].upper()} file", f"{path.name}: {first}")
            ) from error
    mapped = dict(names).get("loss", "loss")
    frame = _named(frame, names)
    if "loss" not in frame.columns:
        others = [name for name in frame.columns if _has_other_unit(name)]
        if others:
            raise _unit_needed(f"only {', '.join(others)}", "--column loss=YOURS and ")
        return frame
    if unit is None and _has_other_unit(mapped):
        raise _unit_needed(f"a loss from the column {mapped}")
    return _in_nats(frame, unit or LossUnit.NATS, bytes_per_token)


def _has_other_unit(name: str) -> bool:
    """Whether the name of a column says that it holds bits or perplexities."""
    parts = re.split(r"[^a-z]+", name.lower())
    return any(part.startswith(("bit", "bpb", "bpc", "bpt", "ppl", "perplex")) for part in parts)


def _unit_needed(got: str, first: str = "") -> AnalysisError:
    hint = (
        f"{first}--unit bits if it is bits per token, --unit bpb --bytes-per-token N if bits per "
        "byte, --unit perplexity if perplexities, --unit nats if the name is wrong"
    )
    return AnalysisError(
        expected("losses in nats per token, the unit of the margin and of the laws", got, hint)
    )


def _in_nats(frame: pl.DataFrame, unit: LossUnit, bytes_per_token: float | None) -> pl.DataFrame:
    per_byte = unit is LossUnit.BITS_PER_BYTE
    require(
        not per_byte or (bytes_per_token and 0 < bytes_per_token < math.inf),
        "bytes per token above 0 of the text that the losses are of, to make nats per "
        "token of bits per byte",
        bytes_per_token,
        "--bytes-per-token N (bytes of the text over its tokens)",
        error=AnalysisError,
    )
    if not per_byte and bytes_per_token is not None:
        raise AnalysisError(
            expected("bytes per token with bits per byte alone", f"the unit {unit}", "--unit bpb")
        )
    if unit is LossUnit.NATS:
        return frame
    require(
        frame["loss"].dtype.is_numeric(),
        "numbers in loss",
        frame["loss"].dtype,
        "casting the column",
        error=AnalysisError,
    )
    if unit is LossUnit.PERPLEXITY:
        return frame.with_columns(pl.col("loss").log())
    return frame.with_columns(pl.col("loss") * (math.log(2) * (bytes_per_token or 1.0)))


def main_arm(frame: pl.DataFrame, arm: str | None = None) -> tuple[pl.DataFrame, str]:
    """The runs of ``arm`` and its name ("" where the frame has none); by default of the arm with
    most ratios among those with three or more at one token budget, and of two such the one with
    more tokens.
    """
    if "arm" not in frame.columns:
        if arm is not None:
            raise AnalysisError(
                expected("a column arm to choose from", f"columns {', '.join(frame.columns)}")
            )
        return frame, ""
    if "ratio" not in frame.columns:
        raise MissingColumnsError(("ratio",), frame.columns)
    unnamed = frame["arm"].null_count()
    require(
        not unnamed,
        "a value of arm in every run",
        f"{unnamed} empty",
        "dropping those runs, or the column",
        error=AnalysisError,
    )
    tokens = pl.col("tokens").max() if "tokens" in frame.columns else pl.lit(0)
    single = (
        (pl.col("tokens").n_unique() == 1) & (pl.col("ratio").n_unique() >= 3)
        if "tokens" in frame.columns
        else pl.lit(True)
    )
    ratios = frame.group_by("arm", maintain_order=True).agg(
        pl.col("ratio").n_unique(), tokens.alias("tokens"), single.alias("single")
    )
    ratios = ratios.sort("single", "ratio", "tokens", descending=True, maintain_order=True)
    names = [str(name) for name in ratios["arm"]]
    if arm is not None and arm not in names:
        raise AnalysisError(expected(f"an arm of these runs ({', '.join(names)})", arm))
    chosen = arm if arm is not None else names[0]
    return frame.filter(pl.col("arm").cast(pl.String) == chosen), chosen


def with_budgets(frame: pl.DataFrame, arm: str) -> pl.DataFrame | None:
    """The runs of ``arm`` and of its shorter budget, from which dL/dlnC can be measured; None where
    there is no shorter budget, or the loss did not fall from it.
    """
    if not arm or arm + SHORT not in set(frame["arm"].cast(pl.String)):
        return None
    both = frame.filter(pl.col("arm").cast(pl.String).is_in([arm, arm + SHORT]))
    try:
        measured_slope(both)
    except AnalysisError:
        return None
    return both


def _named(frame: pl.DataFrame, names: Sequence[tuple[str, str]]) -> pl.DataFrame:
    """``frame`` with our column names: those given, those spelt otherwise, and known synonyms."""
    for ours, theirs in names:
        if theirs not in frame.columns:
            columns = ", ".join(frame.columns)
            raise AnalysisError(expected(f"a column of {columns}", theirs, f"{ours}=ONE OF THEM"))
    renamed = dict(names)
    frame = frame.with_columns(**{ours: pl.col(theirs) for ours, theirs in renamed.items()})
    frame = frame.drop(set(renamed.values()) - set(renamed))
    spelt = {_plain(name): name for name in reversed(frame.columns)}
    for theirs, ours in ({name: name for name in COLUMNS} | NAMES).items():
        found = spelt.get(_plain(theirs))
        if ours not in frame.columns and found in frame.columns:
            frame = frame.rename({found: ours})
    if "ratio" not in frame.columns and {"num_experts", "top_k"} <= set(frame.columns):
        frame = frame.with_columns(ratio=pl.col("num_experts") / pl.col("top_k"))
    return frame


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _text(path: Path) -> pl.DataFrame:
    """A table as text: any of comma, semicolon and tab between columns, UTF-8 or UTF-16, a decimal
    comma (where a number of the column, else of the file, can only be read so), thousands
    separators. Columns of numbers become numbers, also where a run that diverged is written as nan,
    NaN or inf.
    """
    data = read_regular(path)
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = data.decode("utf-16" if wide else "utf-8-sig")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    what = f"text of UTF-8, or of UTF-16 with its mark, in {path.name}"
    require("\0" not in text, what, "zero bytes", "saving it as UTF-8", error=AnalysisError)
    first = text.partition("\n")[0]
    header = re.sub(r'"[^"]*"', "", first)
    separator = max(SEPARATORS, key=header.count)
    if header.count(separator) >= MAX_COLUMNS:
        got = f"{header.count(separator) + 1}"
        raise AnalysisError(expected(f"at most {MAX_COLUMNS} columns in {path.name}", got))
    titles = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
    twice = [name for name in titles if name and titles.count(name) > 1]
    what = f"columns of different names in {path.name}"
    require(not twice, what, f"{twice[:1]} twice", "renaming one", error=AnalysisError)
    frame = pl.read_csv(
        text.encode(),
        separator=separator,
        infer_schema=False,
        null_values=["", "null", "None", "NA"],
    ).rename(str.strip)
    plain = [
        column.str.strip_chars().str.to_lowercase().str.replace_all(r"[\s_'\u00a0\u202f]", "")
        for column in frame
    ]
    mark = _decimal_mark(plain)
    if mark is None and separator == ",":
        mark = "."
    elif mark is None and any(
        column.str.contains(r"^[+-]?\d{1,3},\d{3}$").any() for column in plain
    ):
        mark = ","  # usual where columns are not parted by one
    read = [_numbers(column, _decimal_mark([column]) or mark) for column in plain]
    return frame.with_columns(number for number in read if number is not None)


def _json_lines(path: Path) -> pl.DataFrame:
    """A row for each line; NaN and Infinity, which Python writes for a run that diverged, are read
    as such.
    """
    data = read_regular(path)
    if not NOT_JSON.search(data):
        return pl.read_ndjson(data)
    rows = [parse_json(line) for line in data.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no object")
    return pl.DataFrame(rows, infer_schema_length=None)


def _decimal_mark(columns: Sequence[pl.Series]) -> str | None:
    """The mark that only decimals can have here, such as the comma of 2,5 or 0,512 or 1.024,5; None
    where no number tells (1,024), or two contradict each other.
    """
    told = [
        decimal
        for decimal, grouping in MARKS
        if any(
            text.str.contains(DECIMAL.format(d=re.escape(decimal), g=re.escape(grouping))).any()
            for text in columns
        )
    ]
    return told[0] if len(told) == 1 else None


def _numbers(text: pl.Series, decimal: str | None) -> pl.Series | None:
    """The column as numbers, in the first reading that fits all of it; None where none does."""
    for mark, grouping in MARKS:
        grouped = GROUPED.format(d=re.escape(mark), g=re.escape(grouping))
        held = text.filter(text.str.contains(grouping, literal=True))
        alone = decimal is None and held.is_empty()
        if alone or (decimal == mark and held.str.contains(grouped).all()):
            plain = text.str.replace_all(grouping, "", literal=True)
            number = plain.str.replace(mark, ".", literal=True).cast(pl.Float64, strict=False)
            if number.null_count() == text.null_count():
                return number
    return None


def _folder(folder: Path) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for run in sorted(folder.glob(f"*/{DONE}")):
        try:
            result = parse_object(run.parent / RESULT)
            check_seal(run.parent)
        except RunError as error:
            raise AnalysisError(
                expected(f"a readable {RESULT} in {run.parent}", str(error))
            ) from error
        rows.append(
            {name: value for name, value in result.items() if isinstance(value, int | float | str)}
        )
    require(
        rows,
        "a sweep's folder with finished runs",
        f"{folder} without any",
        "moe-lab sweep run",
        error=AnalysisError,
    )
    return pl.DataFrame(rows, infer_schema_length=None)
