"""``moe-lab difficulty RUN_OR_TRACE``: does compute follow difficulty?

Tables as Parquet, a verdict in one sentence, and a page.
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.commands.options import (
    add_device,
    add_documents,
    add_json,
    add_number,
    add_out,
    add_seed,
    examples,
    output_folder,
    place,
    print_frame,
    print_json,
    read_documents,
    refuse_ignored,
    refuse_other,
)
from moe_lab.progress import shown
from moe_lab.runs.layout import STUDY_FOLDER, STUDY_VERDICT
from moe_lab.terminal import say

if TYPE_CHECKING:
    import polars as pl

    from moe_lab.training import LoadedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab difficulty runs/x",
        "moe-lab difficulty traces/x --resamples 500",
        "moe-lab difficulty runs/x --text my_texts/ --no-gain",
    )
    parser.add_argument(
        "source",
        type=place,
        help="the folder of a finished run, or a trace with a token table, or its URL",
    )
    add_documents(
        parser,
        "documents to judge a run on (default: those of its corpus that it never saw)",
        "read only the first tokens of each unseen document of a run",
        default=1000,
    )
    add_number(
        parser,
        "--resamples",
        2000,
        whole=True,
        least=100,
        default=2000,
        help="number of times that whole documents are drawn for the intervals",
    )
    parser.add_argument(
        "--no-gain",
        action="store_true",
        help="leave out the marginal gain, which passes the text through the run three more times",
    )
    add_out(
        parser,
        "folder of the tables (default: difficulty in the run's folder, <trace>-difficulty "
        "beside a trace; of a URL, in this folder)",
    )
    add_seed(parser)
    add_device(parser)
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    from moe_lab.analysis.difficulty.difficulty_verdict import study_verdict
    from moe_lab.files import write_json, write_parquet
    from moe_lab.runs.done_file import digests_of

    remote = not isinstance(args.source, Path)
    is_trace = remote or (args.source / "meta.json").is_file()
    folder = Path(str(args.source).rstrip("/").rpartition("/")[2]) if remote else args.source
    out = args.out or (
        folder.with_name(f"{folder.name}-{STUDY_FOLDER}") if is_trace else folder / STUDY_FOLDER
    )
    if is_trace:
        ignored = {"text", "text_column", "max_tokens", "no_gain", "device"}
        refuse_ignored(args, add_arguments, ignored, "a trace")
    elif args.text is None:
        refuse_ignored(args, add_arguments, {"text_column"}, "a run without --text")
    output_folder(out)
    refuse_other(out, "difficulty", ["association.parquet"], STUDY_VERDICT)
    with shown(not args.json):
        tables = _of_trace(args) if is_trace else _of_run(args)
    for name, table in tables.items():
        write_parquet(out / f"{name}.parquet", table)
    verdict, sentence = study_verdict(tables["association"])
    digests = digests_of(out, (f"{name}.parquet" for name in tables))
    found = {"verdict": verdict, "sentence": sentence, "source": str(args.source)}
    write_json(out / STUDY_VERDICT, found | {"digests": digests})
    if args.json:
        print_json({"verdict": verdict, "sentence": sentence, "tables": sorted(tables), "out": out})
        return 0
    _print(tables)
    print(f"verdict: {verdict}")
    say(sentence)
    print(f"tables: {out}")
    print(f"next: moe-lab report {shlex.quote(str(args.source))}")
    return 0


def _of_trace(args: argparse.Namespace) -> "dict[str, pl.DataFrame]":
    from moe_lab.analysis.difficulty import difficulty_frame
    from moe_lab.analysis.difficulty.study import NGRAM, difficulty_study
    from moe_lab.trace import open_trace
    from moe_lab.trace.reader import fetched_once

    with fetched_once([open_trace(args.source)]) as (trace,):
        frame = difficulty_frame(trace, seed=args.seed)
        return difficulty_study(frame, NGRAM, args.seed, resamples=args.resamples)


def _of_run(args: argparse.Namespace) -> "dict[str, pl.DataFrame]":
    import torch

    from moe_lab.analysis.difficulty import gain_association, marginal_gain, reallocation_regret
    from moe_lab.analysis.difficulty.gain import can_shift
    from moe_lab.analysis.difficulty.study import NGRAM, difficulty_study
    from moe_lab.errors import require
    from moe_lab.training import load_run

    torch.set_num_threads(1)
    run = load_run(args.source, args.device)
    require(run.config.model.moe_layers, "a run with MoE layers", f"the dense run {args.source}")
    frame, ids, numbers = _unseen(run, args)
    tables = difficulty_study(frame, NGRAM, args.seed, resamples=args.resamples)
    if not args.no_gain and all(
        can_shift(layer.router) for layer in run.model.moe_layers().values()
    ):
        gains = marginal_gain(run.model, ids, numbers, seq_length=run.config.seq_length)
        tables |= {
            "gains": gains,
            "gain": gain_association(gains, args.seed, resamples=args.resamples),
        }
        tables["regret"] = reallocation_regret(gains, seed=args.seed)
    return tables


def _unseen(run: "LoadedRun", args: argparse.Namespace) -> "tuple[pl.DataFrame, list, list[int]]":
    """The frame to judge, and the ids and numbers of its documents: those of ``--text``, or the
    validation and reference documents of the run's own corpus.
    """
    import numpy as np
    import polars as pl

    from moe_lab.analysis.difficulty.alignment import HALVES
    from moe_lab.analysis.difficulty.scored_documents import score
    from moe_lab.analysis.difficulty.study import NGRAM
    from moe_lab.text import (
        Split,
        difficulty_columns,
        load_tokens,
        ngram_halves,
        token_classes,
        tokenize_documents,
    )

    if args.text is not None:
        judged = tokenize_documents(read_documents(args).documents, run.tokenizer)
        others, counts = [], None
    else:
        text = load_tokens(run.config.text)
        judged = [*text.documents(Split.VALIDATION), *text.documents(Split.REFERENCE)]
        others, counts = text.documents(Split.TRAIN), text.counts()
    judged = [document for document in judged if len(document.ids) > 1]
    every, vocabulary = [*judged, *others], run.tokenizer.vocab_size
    columns = difficulty_columns(every, vocabulary, seed=args.seed)
    halves = ngram_halves([document.ids for document in every], vocabulary, seed=args.seed)
    columns = columns.with_columns(
        pl.Series(NGRAM + end, np.concatenate(half).astype(np.float32)).fill_nan(None)
        for end, half in zip(HALVES, halves, strict=True)
    )
    classes = pl.concat([token_classes(document, run.tokenizer, counts) for document in judged])
    ids = [document.ids[: args.max_tokens] for document in judged]
    numbers = [document.index for document in judged]
    scored = score(run.model, ids, numbers, seq_length=run.config.seq_length).frame()
    described = classes.select(
        "doc", "pos", "lexer", "freq_band", "subword", "copy", "boundary"
    ).join(columns, on=["doc", "pos"])
    return (
        scored.join(
            described.cast({"doc": pl.Int64, "pos": pl.Int64}), on=["doc", "pos"], how="left"
        ),
        ids,
        numbers,
    )


def _print(tables: "dict[str, pl.DataFrame]") -> None:
    from moe_lab.analysis.difficulty.association import SHOWN

    optional = ("n_docs", "n_tokens", "rho_strata", "q")
    print_frame(tables["association"].select(SHOWN), explain=True, optional=optional)
    if "gain" in tables:
        row = tables["gain"].row(0, named=True)
        say(
            "marginal gain: rank correlation with ffn_count within ids "
            f"{row['rho_token'] or 0:+z.3f} ({row['verdict']})"
        )
        print_frame(tables["regret"])
