"""Options that several commands share, so that they mean the same everywhere."""

import argparse
import functools
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_lab import progress
from moe_lab.config import MAX_SEED
from moe_lab.errors import ConfigError, MoELabError, StorageError, expected, require
from moe_lab.files import cannot_write, json_text, read_regular
from moe_lab.number_format import count_of
from moe_lab.terminal import fits, print_table, say, window_width

if TYPE_CHECKING:
    import polars as pl

    from moe_lab.text import Corpus, TextConfig
    from moe_lab.trace import Trace

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


def examples(*lines: str) -> str:
    """The epilog of a parser: command lines that its users type."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


class Units(NamedTuple):
    """Suffixes of a number: in words, and in lower case -> factor."""

    words: str
    factors: Mapping[str, int]


NO_UNITS = Units("", {"": 1})
UNITS = Units(
    ", with k, M, B or T",
    {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12},
)
BYTE_UNITS = Units(
    ", with kB, MB, GB, KiB, MiB or GiB",
    {"": 1, "b": 1}
    | {
        f"{letter}{mark}": (1024 if mark == "ib" else 1000) ** power
        for power, letter in enumerate("kmgt", 1)
        for mark in ("", "b", "ib")
    },
)


def add_number(
    parser: argparse._ActionsContainer,
    option: str,
    example: object,
    *,
    whole: bool = False,
    least: int | None = None,
    most: int | None = None,
    units: Units = NO_UNITS,
    **settings: Any,
) -> None:
    """Add an option that takes a number.

    Args:
        example: what an error proposes.
        whole: no fraction.
        least, most: the range; without ``least`` the number is above 0.
        units: what may stand behind it: ``UNITS``, ``BYTE_UNITS``.
        settings: of ``add_argument``.

    The parser raises ``MoELabError`` with the option as its ``field`` for another value.
    """
    what = f"{option} as a {'whole ' * whole}number"
    what += " above 0" if least is None else f" of at least {least}"
    what += ("" if most is None else f" and at most {most}") + units.words
    letters = "".join(units.factors) + "".join(units.factors).upper()

    def read(text: str) -> float:
        digits = text.rstrip(letters)
        try:
            value = _digits(digits) * units.factors[text[len(digits) :].lower()]
        except (ValueError, KeyError):
            value = math.nan
        fits = math.isfinite(value) and (value > 0 if least is None else value >= least)
        if not fits or (most is not None and value > most) or (whole and value != int(value)):
            raise MoELabError(expected(what, repr(text), f"{option} {example}"), option)
        return int(value) if whole else float(value)

    parser.add_argument(option, type=read, **settings)


def _digits(text: str) -> float:
    """In full where the number is whole."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def add_expert_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default=None,
        metavar="ID_OR_PATH",
        help="the model: a published one, a mini, or a config.json; sizes of experts, and the rest",
    )
    add_number(
        parser,
        "--bytes-per-parameter",
        2,
        default=None,
        help="bytes of a weight, with --config (default: 2)",
    )
    add_number(
        parser,
        "--expert-bytes",
        "18MiB",
        units=BYTE_UNITS,
        default=None,
        metavar="SIZE",
        help="size of one expert",
    )


def expert_sizes(args: argparse.Namespace, trace: "Trace") -> dict[str, Any]:
    """The options of ``add_expert_sizes`` as arguments of the functions of ``serving``; says on the
    error stream where ``--config`` looks like another model than the traced one.
    """
    from moe_lab.accounting.model_names import named_config
    from moe_lab.hf.configuration import plain
    from moe_lab.serving.expert_bytes import other_model

    size = args.bytes_per_parameter
    require(size is None or args.config, "--bytes-per-parameter with --config", "no --config")
    config = None if args.config is None else named_config(args.config)
    if config is not None:
        values = plain(config) if isinstance(config, Path) else {"name": args.config}
        name = values.get("name") or values.get("_name_or_path") or ""
        if doubt := other_model(trace.meta, config, str(name)):
            progress.say(f"warning: {doubt}: sizes of experts may be of another model")
    return {
        "config": config,
        "bytes_per_parameter": 2.0 if size is None else size,
        "expert_bytes": args.expert_bytes,
    }


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """A folder to write, None by default."""
    parser.add_argument("--out", type=output_folder, default=None, metavar="PATH", help=what)


def place(text: str) -> "Path | str":
    """A folder, or a URL of an object store as it is: as a path it would lose a slash."""
    return text if "://" in text else Path(text)


def output_folder(text: "Path | str") -> Path:
    """A folder to write. Raises ``StorageError`` at once, not after the work, where that cannot be
    made or written.
    """
    _try_to_write(Path(text), Path(text))
    return Path(text)


def output_place(text: str) -> "Path | str":
    """A folder as ``output_folder``, or a URL."""
    return text if "://" in text else output_folder(text)


def output_file(text: "Path | str") -> Path:
    """A file to write, whose folder is tried as that of ``output_folder``."""
    path = Path(text)
    if path.is_dir():
        raise StorageError(expected("a file to write", f"the folder {path}", f"{path / 'NAME'}"))
    _try_to_write(path.parent, path)
    return path


def output_page(text: "Path | str") -> Path:
    """A page to write, as ``output_file``; another file of that name is not replaced."""
    path = output_file(text)
    is_page = path.exists() and read_regular(path, 99).lstrip().lower().startswith(
        b"<!doctype html"
    )
    if path.exists() and not is_page:
        what, hint = "a new file, or an older page", "another name, or removing it"
        raise StorageError(expected(what, f"another file, {path}", hint))
    return path


def _try_to_write(folder: Path, target: Path) -> None:
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(cannot_write(target, error)) from error


def refuse_other(folder: Path, of: str, names: Collection[str], ours: str) -> None:
    """Raise ``StorageError`` where files of these names in a folder would be replaced that are not
    of an earlier call of ``of``, which leaves ``ours``.
    """
    taken = [name for name in names if (folder / name).exists()]
    require(
        not taken or (folder / ours).exists(),
        f"a new folder, or one that {of} wrote",
        f"{', '.join(taken)} without {ours} in {folder}",
        "another --out",
        error=StorageError,
        field="--out",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Options of a command whose ``main`` is ``read_by_workers``."""
    add_number(
        parser,
        "--workers",
        4,
        whole=True,
        default=None,
        help="processes that read the trace, of one thread each (default: this one alone), or "
        "tasks of a cluster",
    )
    parser.add_argument(
        "--launcher", choices=("local", "ray"), default="local", help="what runs the workers"
    )
    parser.add_argument(
        "--launcher-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="ray: address, cpus, memory_gb",
    )
    parser.add_argument(
        "--partial-frames",
        type=output_folder,
        default=None,
        metavar="FOLDER",
        help="where workers' frames are kept until the command ends; after a kill the same command "
        "continues with them (default: in the cache folder)",
    )


def read_by_workers(
    command: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """A command whose analyses read their traces by the workers of ``add_workers``."""

    @functools.wraps(command)
    def main(args: argparse.Namespace) -> int:
        local = args.launcher == "local"
        options = launcher_options(args.launcher_option)
        require(not (local and options), "--launcher-option with --launcher ray", "it alone")
        if local and args.workers is None:
            require(args.partial_frames is None, "--partial-frames with --workers", "it alone")
            return command(args)
        from moe_lab.analysis.map_reduce import mapped

        workers = args.workers
        if not local:
            from moe_lab.sweeps.launchers.ray_tasks import RayTasks

            workers = RayTasks(args.workers, options)
        with warnings.catch_warnings(), mapped(workers, cache=args.partial_frames):
            warnings.simplefilter("always")
            warnings.showwarning = _say_warning
            return command(args)

    return main


def _say_warning(message: Warning | str, *_: Any) -> None:
    print(f"moe-lab: {message}", file=sys.stderr)


def launcher_options(texts: Sequence[str]) -> dict[str, str]:
    """Options of a launcher from ``KEY=VALUE`` texts. Raises ``ConfigError`` for another text."""
    pairs = [text.partition("=") for text in texts]
    for text, (key, sign, _) in zip(texts, pairs, strict=True):
        require(bool(key and sign), "a launcher option as KEY=VALUE", repr(text))
    return {key: value for key, _, value in pairs}


def add_seed(
    parser: argparse.ArgumentParser, help: str = "seed of what is drawn at random"
) -> None:
    add_number(parser, "--seed", 0, whole=True, least=0, most=MAX_SEED, default=0, help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print JSON for machines instead of tables"
    )


def refuse_ignored(
    args: argparse.Namespace,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    ignored: Collection[str],
    reader: str,
) -> None:
    """Raise ``ConfigError`` for an option that was given and that ``reader`` does not read.

    Args:
        ignored: the names of such options in ``args``.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for action in parser._actions:
        if action.dest in ignored and getattr(args, action.dest) != action.default:
            option = action.option_strings[0]
            hint = f"leaving {option} out"
            raise ConfigError(expected(f"options that {reader} reads", option, hint), option)


def add_documents(
    parser: argparse.ArgumentParser,
    what: str,
    max_tokens: str = "read only the first tokens of each document",
    **settings: Any,
) -> None:
    """Options for the documents that a model reads, which ``read_documents`` loads.

    Args:
        what, max_tokens: help of --text and --max-tokens.
        settings: of --max-tokens, as for ``add_number``; its default is None.
    """
    parser.add_argument("--text", "--corpus", dest="text", default=None, metavar="PATH", help=what)
    parser.add_argument(
        "--text-column", default=None, help="column of a .jsonl or .parquet (default: text)"
    )
    settings = {"default": None, **settings}
    add_number(parser, "--max-tokens", 1000, whole=True, units=UNITS, help=max_tokens, **settings)


def read_documents(args: argparse.Namespace) -> "Corpus":
    """The documents of ``add_documents``."""
    from moe_lab.text import load_corpus

    refuse_column(args.text, args.text_column)
    return load_corpus(args.text, args.text_column or "text")


def refuse_column(text: str | None, column: str | None) -> None:
    """Raise ``ConfigError`` for a column of a text that has none."""
    require(
        column is None or text is None or Path(text).suffix.lower() in (".jsonl", ".parquet"),
        "--text-column with a .jsonl or .parquet file",
        text,
        "leaving it out",
        field="--text-column",
    )


def add_forward_pass(
    parser: argparse._ActionsContainer, batch_tokens: int, dtype: str | None
) -> None:
    """Options for how a model runs: tokens of a pass and, of a pretrained one, its number format;
    ``dtype`` None: no default, so that an option that was given is known.
    """
    add_number(
        parser,
        "--batch-tokens",
        batch_tokens,
        whole=True,
        units=UNITS,
        default=batch_tokens,
        help="tokens of one forward pass",
    )
    parser.add_argument(
        "--dtype",
        default=dtype,
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number format of the weights of a pretrained model (default: auto)",
    )


def add_layers(parser: argparse._ActionsContainer, what: str) -> None:
    """An option that ``layer_numbers`` reads."""
    parser.add_argument("--layers", default=None, metavar="LIST", help=what)


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
    add_number(
        parser,
        "--vocab-size",
        4096,
        whole=True,
        default=None,
        help="size of the vocabulary of the BPE tokenizer",
    )
    parser.add_argument(
        "--tokenizer", choices=("bpe", "byte"), default=None, help="kind of tokenizer"
    )


def text_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The text options that were given, as fields of ``TextConfig``."""
    refuse_column(args.corpus, args.text_column)
    require(
        args.tokenizer != "byte" or args.vocab_size is None,
        "--vocab-size with the tokenizer bpe",
        "byte, whose vocabulary has one size",
        "leaving --vocab-size out",
        field="--vocab-size",
    )
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


def print_frame(
    frame: "pl.DataFrame", *, explain: bool = False, optional: Sequence[str] = ()
) -> None:
    """Print all rows and the columns that hold a value (``terminal.print_table``).

    With ``explain`` also what their names mean, where they are in ``TERMS``. Of the ``optional``
    columns, in this order, those are left out that a narrow terminal has no room for.
    """
    shown = frame.select(column for column in frame if column.null_count() < frame.height)
    width = window_width()
    for name in optional:
        if fits(shown.columns, shown.rows(), width):
            break
        shown = shown.drop(name, strict=False)
    print_table(shown.columns, shown.rows())
    if explain and (line := terms(*shown.columns)):
        say(line)


def layer_numbers(text: str) -> list[int]:
    """ "1-3,7" -> [1, 2, 3, 7]."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if match is None:
            raise ConfigError(
                expected("--layers as numbers and ranges", repr(text), "--layers 1-60,63")
            )
        layers = range(int(match[1]), int(match[2] or match[1]) + 1)
        require(layers, "--layers with ranges that ascend", repr(part), field="--layers")
        numbers += layers
    return numbers


def layers_of(source: "Path | Trace") -> "pl.DataFrame":
    """The load's unevenness, and mean and spread of ``ffn_count`` where the source recorded it, per
    layer of a trace, or of the one in a folder.
    """
    from moe_lab.analysis import ffn_spread, load_summary
    from moe_lab.trace import open_trace

    trace = open_trace(source) if isinstance(source, Path) else source
    load = load_summary(trace)
    recorded = trace.meta.per_token and trace.meta.zero_experts_known
    return ffn_spread(trace).join(load, on="layer") if recorded else load


def load_sentence(layers: "pl.DataFrame") -> str:
    """The load of all layers in a sentence, from ``layers_of``."""
    known = layers.drop_nulls("load_cv").sort("load_cv", descending=True)
    if known.is_empty():
        return "load: no real expert ran"
    worst = known.row(0, named=True)
    return (
        f"load over {count_of(len(layers), 'MoE layer')}: mean CV {layers['load_cv'].mean():.2f} "
        f"(0 is even), worst in layer {worst['layer']} with CV {worst['load_cv']:.2f} and MaxVio "
        f"{worst['max_violation']:.2f}; {count_of(int(layers['dead'].sum()), 'dead expert')}"
    )


def print_json(value: Any) -> None:
    """What is no finite number is null."""
    print(json_text(value, indent=1, default=str))
