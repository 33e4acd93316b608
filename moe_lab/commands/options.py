"""Options that several commands share, so that they mean the same everywhere."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.errors import expected

if TYPE_CHECKING:
    import polars as pl

    from moe_lab.text import TextConfig

TERMS = {
    "load_cv": "standard deviation of the experts' loads over their mean, 0 when even",
    "max_violation": "MaxVio, load of the busiest expert over the mean, less 1; 0 when even",
    "effective_experts": "how many evenly loaded experts would be as uneven",
    "dead": "experts that never ran",
    "mean": "real experts run for a token, on average",
    "mean_ffn_count": "real experts run for a token, on average",
    "sd": "standard deviation of that over tokens",
    "zero_share": "slots that went to zero-computation experts, over all slots",
    "rho_raw": "rank correlation of ffn_count (real experts run for a token) with difficulty",
    "rho_strata": "the same within token classes",
    "rho_token": "the same within token ids, with the ends of its 95 % interval",
    "q": "false discovery rate of rho_token over the rows",
}
"""What columns of printed tables mean (``moe_lab.measures`` defines them)."""

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def amount(text: str) -> float:
    """1.6T, 48B, 135e9, 300M, 5k."""
    digits = text.rstrip("kmbgtKMBGT")
    try:
        value = float(digits) * UNITS[text[len(digits) :].lower()]
    except (ValueError, KeyError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(
            expected("a number above 0, with k, M, B or T", repr(text), "1.6T")
        )
    return value


def whole_amount(text: str) -> int:
    """The same, of things that are counted: 200k tokens."""
    value = amount(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(
            expected("a whole number, with k, M, B or T", repr(text), "200k")
        )
    return int(value)


BYTE_UNITS = {"": 1, "b": 1} | {
    f"{letter}{mark}": (1024 if mark == "ib" else 1000) ** power
    for power, letter in enumerate("kmgt", 1)
    for mark in ("", "b", "ib")
}


def byte_amount(text: str) -> float:
    """4GiB, 500MB, 2e9: bytes."""
    digits = text.rstrip("kmgtibKMGTIB")
    try:
        value = float(digits) * BYTE_UNITS[text[len(digits) :].lower()]
    except (ValueError, KeyError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(
            expected("bytes above 0, with kB, MB, GB, KiB, MiB or GiB", repr(text), "4GiB")
        )
    return value


def add_expert_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default=None,
        metavar="ID_OR_PATH",
        help="the model: a published one, a mini, or a config.json; sizes of experts, and the rest",
    )
    parser.add_argument(
        "--bytes-per-parameter", type=float, default=2.0, help="of the weights, with --config"
    )
    parser.add_argument(
        "--expert-bytes", type=byte_amount, default=None, metavar="SIZE", help="of one expert"
    )


def expert_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``add_expert_sizes`` as arguments of the functions of ``serving``."""
    from moe_lab.accounting.model_names import named_config

    return {
        "config": None if args.config is None else named_config(args.config),
        "bytes_per_parameter": args.bytes_per_parameter,
        "expert_bytes": args.expert_bytes,
    }


def add_out(parser: argparse.ArgumentParser, default: str | None, what: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=None if default is None else Path(default),
        metavar="PATH",
        help=what,
    )


def place(text: str) -> "Path | str":
    """A folder, or a URL of an object store as it is: as a path it would lose a slash."""
    return text if "://" in text else Path(text)


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="first seed")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print JSON for machines instead of tables"
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        "--corpus",
        dest="corpus",
        default=None,
        metavar="PATH",
        help='a folder, .txt, .jsonl or .parquet; "stdlib" is this Python\'s own sources',
    )
    parser.add_argument("--text-column", default=None, help="column of a .jsonl or .parquet corpus")
    parser.add_argument("--vocab-size", type=int, default=None, help="of the BPE tokenizer")
    parser.add_argument(
        "--tokenizer", choices=("bpe", "byte"), default=None, help="what a token is"
    )


def text_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The text options that were given, as fields of ``TextConfig``."""
    names = ("corpus", "text_column", "vocab_size", "tokenizer")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def text_config(args: argparse.Namespace, default: "TextConfig") -> "TextConfig":
    """``default`` with the options that were given, resolved (the corpus is read and its content
    hash recorded).
    """
    return (
        type(default)
        .from_dict(default.to_dict() | {"corpus_hash": None} | text_changes(args))
        .resolve()
    )


def terms(*names: str) -> str:
    """One line that defines the names in ``TERMS`` among those given."""
    return "; ".join(f"{name}: {TERMS[name]}" for name in names if name in TERMS)


def print_frame(frame: "pl.DataFrame", *, explain: bool = False) -> None:
    """Print all rows and the columns that hold a value; what rounds to zero has no sign.

    With ``explain`` also what their names mean, where they are in ``TERMS``.
    """
    import polars as pl
    import polars.selectors as cs

    shown = frame.select(column for column in frame if column.null_count() < frame.height)
    shown = shown.with_columns(cs.float().round(3) + 0.0)
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=200,
        float_precision=3,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
    ):
        print(shown)
    if explain and (line := terms(*shown.columns)):
        print(line)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))
