"""``moe-lab ablate RUN_OR_MODEL``: what the model loses on held-out text without each expert."""

import argparse
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.commands.options import (
    add_device,
    add_documents,
    add_forward_pass,
    add_json,
    add_layers,
    add_number,
    add_out,
    add_seed,
    examples,
    layer_numbers,
    output_folder,
    print_frame,
    print_json,
    read_documents,
    refuse_ignored,
)
from moe_lab.errors import ConfigError, MoELabError, TraceError, expected, require
from moe_lab.number_format import count_of, listing
from moe_lab.progress import clock, shown
from moe_lab.runs.layout import CONFIG, DONE
from moe_lab.terminal import say
from moe_lab.worth.worth_files import META, SHORT, WORTH_FOLDER, read_meta, refuse_taken

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from moe_lab.text import Corpus, TokenizedDocument
    from moe_lab.worth.ablation import Ablation

SHOWN = 5
"""Experts at each end of the printed table."""

FURTHER = ("curves", "top_k", "top_k_alone", "pairs", "exchanges")
"""Tables of ``--curves``, ``--alone`` and ``--pairs``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab ablate runs/x --plan",
        "moe-lab ablate runs/x",
        "moe-lab ablate models/olmoe --text my_texts/ --out worth/olmoe --experts 8 --layers 0-3",
        "moe-lab ablate runs/x --edit silence --out worth/x",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_MODEL",
        help="the folder of a finished run, or of a pretrained MoE model",
    )
    add_documents(
        parser,
        "documents that the model was not trained on (default for a run: the validation "
        "documents of its corpus)",
        "read only the first tokens of each document (default: those of one pass, --batch-tokens)",
        least=2,
    )
    parser.add_argument(
        "--experts",
        type=_experts,
        default=None,
        metavar="N",
        help="experts of each layer, drawn with --seed, or all (default: all)",
    )
    add_layers(parser, "numbers of the layers, such as 1-3,7 (default: all with experts)")
    parser.add_argument(
        "--edit",
        choices=("forbid", "silence"),
        default="forbid",
        help="forbid: the router chooses among the others; silence: nothing takes its place",
    )
    parser.add_argument(
        "--by-class",
        action="append",
        default=[],
        metavar="COLUMN",
        help="also by class of the predicted token: lexer, subword, copy, ...; repeatable",
    )
    parser.add_argument(
        "--curves",
        action="store_true",
        help="also the loss against the share of experts removed, and against k",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="with --curves and --by-class: also the loss of each class where its tokens alone "
        "have k experts",
    )
    add_number(
        parser,
        "--pairs",
        8,
        whole=True,
        default=None,
        help="also so many pairs of experts of each layer: removed together, and exchanged",
    )
    parser.add_argument("--plan", action="store_true", help="say how long it takes, and stop")
    add_out(parser, "folder of the tables (default for a run: worth in its folder)")
    add_forward_pass(parser, 2048, None)
    add_seed(parser)
    add_device(parser)
    add_json(parser)


def _experts(text: str) -> int | None:
    """A number above 0; None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) == 0:
        what = "--experts as a whole number above 0 or all"
        raise MoELabError(expected(what, repr(text), "--experts 8"), "--experts")
    return int(text)


def main(args: argparse.Namespace) -> int:
    require(
        not args.alone or (args.curves and args.by_class),
        "--alone with --curves and --by-class",
        "it without both",
        field="--alone",
    )
    is_run = (args.source / DONE).exists()
    require(
        is_run or (args.source / CONFIG).exists(),
        "the folder of a finished run or of a pretrained model",
        args.source,
        error=TraceError,
        field="source",
    )
    out = args.out or (args.source / WORTH_FOLDER if is_run else None)
    if out is None and not args.plan:
        raise ConfigError(expected("a folder for the tables", "none", "--out FOLDER"))
    if out is not None and (args.out or not args.plan):
        refuse_taken(output_folder(out))
    if is_run:
        refuse_ignored(args, add_arguments, {"dtype"}, "a run")
        if args.text is None:
            refuse_ignored(args, add_arguments, {"text_column"}, "a run without --text")
    ablation = _of_run(args) if is_run else _of_model(args)
    unfinished = out is not None and not (out / META).exists()
    minutes = ablation.minutes(out if unfinished else None)
    number = sum(ablation.measured.values())
    parts = ", ".join(f"{name} {clock(60 * value)}" for name, value in minutes.items())
    plan = (
        f"{count_of(number, 'expert')} of {count_of(len(ablation.measured), 'layer')}, "
        f"{count_of(len(ablation.documents), 'document')}, {ablation.tokens:,} tokens: about "
        f"{clock(60 * sum(minutes.values()))} ({parts})"
    )
    if ablation.pass_bytes is not None:
        plan += f"; predictions of a pass take {ablation.pass_bytes / 1e9:.3f} GB"
    if args.plan and args.json:
        print_json({"plan": plan, "minutes": minutes})
    if not args.json:
        say(plan)
    if args.plan or out is None:
        return 0
    facts = {"source": str(args.source), "layers": list(ablation.measured)}
    with shown(not args.json):
        tables = ablation.run(out, facts | {"planned_minutes": minutes})
    _print(args, tables, out)
    return 0


def _print(args: argparse.Namespace, tables: "dict[str, pl.DataFrame]", out: Path) -> None:
    import polars as pl

    meta = read_meta(out)
    sentences = [*meta["sentences"], *(f"note: {note}" for note in meta["notes"])]
    ranked = tables["worth"].sort("d_loss", descending=True)
    every = ranked.filter(pl.col("class").is_null())
    ends = every if every.height <= 2 * SHOWN else pl.concat([every.head(SHOWN), every.tail(SHOWN)])
    best = tables["agreement"].filter(pl.col("layer").is_null()).sort("rho", descending=True)
    by_class = ranked.filter(pl.col("class").is_not_null()).drop_nulls("lo")
    needed = by_class.group_by("by", "class", maintain_order=True).first()
    if args.json:
        shown_tables = {"experts": every, "scores": best, "classes": needed}
        shown_tables |= {name: tables[name] for name in FURTHER if name in tables}
        parts = {name: table.to_dicts() for name, table in shown_tables.items()}
        print_json({"sentences": sentences, **parts, "out": out})
        return
    columns = ("layer", "expert", "d_loss", "lo", "hi", "d_loss_used", "used", "tokens", "docs")
    say(sentences[0])
    print_frame(ends.select(columns), optional=("docs", "tokens", "d_loss_used"))
    if needed.height:
        say("The most needed expert of each class of tokens:")
        print_frame(needed.select("by", "class", *columns[:5]))
    for sentence in sentences[1:]:
        say(sentence)
    print_frame(best.select("score", "rho", "lo", "hi", "top", "top_chance"))
    print(f"tables: {out}")
    if (args.source / DONE).exists():
        print(f"next: moe-lab report {shlex.quote(str(args.source))}")


def _of_run(args: argparse.Namespace) -> "Ablation":
    """The measurement of a finished run, on the text or on its validation documents."""
    from moe_lab.text import Split, load_tokens, tokenize_documents
    from moe_lab.training import load_run

    run = load_run(args.source, args.device)
    require(run.config.model.moe_layers, "a run with MoE layers", f"the dense run {args.source}")
    counts = corpus = None
    if args.text is None:
        text = load_tokens(run.config.text)
        judged, counts = text.documents(Split.VALIDATION), text.counts()
    else:
        corpus = read_documents(args)
        judged = tokenize_documents(corpus.documents, run.tokenizer)
    return _ablation(args, run.model, judged, run.tokenizer, counts, corpus)


def _of_model(args: argparse.Namespace) -> "Ablation":
    """The measurement of a pretrained model in a folder."""
    from moe_lab.trace.capturing.class_columns import Described
    from moe_lab.trace.capturing.hub import Loading, load_pretrained, tokenized

    if args.text is None:
        raise ConfigError(expected("a text to judge the experts on", "none", "--text PATH"))
    model, tokenizer = load_pretrained(args.source, Loading(args.dtype or "auto", args.device))
    text_config = model.config.get_text_config()
    corpus = read_documents(args)
    judged, _ = tokenized(corpus, tokenizer, None, None)
    describer = Described(tokenizer, text_config.vocab_size) if args.by_class else None
    return _ablation(args, model, judged, describer, None, corpus)


def _ablation(
    args: argparse.Namespace,
    model: Any,
    documents: "Sequence[TokenizedDocument]",
    tokenizer: Any,
    counts: "np.ndarray | None",
    corpus: "Corpus | None",
) -> "Ablation":
    """The measurement on documents, each cut as the options say.

    Args:
        corpus: where they are from, which says what was left out; None: the run's own.
    """
    from moe_lab.worth.ablation import Ablation
    from moe_lab.worth.measures import EditKind

    given = len(documents if corpus is None else corpus.documents)
    documents = [document for document in documents if len(document.ids) > 1]
    left_out = {SHORT: given - len(documents)}
    if corpus is not None:
        left_out |= {"blank": corpus.num_blank, "repeated": corpus.num_repeated}
    longest = args.max_tokens or args.batch_tokens
    return Ablation(
        model,
        [document.ids[:longest] for document in documents],
        experts=args.experts,
        layers=None if args.layers is None else layer_numbers(args.layers),
        edit=EditKind(args.edit),
        classes=_classes(args.by_class, documents, longest, tokenizer, counts),
        batch_tokens=args.batch_tokens,
        seed=args.seed,
        curves=args.curves,
        alone=args.alone,
        pairs=args.pairs,
        left_out=left_out,
    )


def _classes(
    names: Sequence[str],
    documents: "Sequence[TokenizedDocument]",
    longest: int | None,
    tokenizer: Any,
    counts: "np.ndarray | None",
) -> "dict[str, list[pl.Series]] | None":
    """The class columns of each document that were asked for."""
    from moe_lab.text import CLASSES, token_classes

    if not names:
        return None
    frames = [token_classes(document, tokenizer, counts) for document in documents]
    known = [name for name in CLASSES if all(name in frame.columns for frame in frames)]
    for name in names:
        what = f"--by-class with one of {listing(known)}"
        hint = " or ".join(get_close_matches(name, known))
        require(name in known, what, repr(name), hint, field="by_class")
    return {name: [frame[name][:longest] for frame in frames] for name in dict.fromkeys(names)}
