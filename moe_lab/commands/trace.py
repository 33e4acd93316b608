"""``moe-lab trace``: where a trained run, a pretrained model or the records of an engine send the
tokens of a text.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lab.commands.options import (
    UNITS,
    add_device,
    add_documents,
    add_forward_pass,
    add_json,
    add_layers,
    add_number,
    add_out,
    examples,
    layer_numbers,
    layers_of,
    load_sentence,
    print_frame,
    print_json,
    read_documents,
    refuse_ignored,
)
from moe_lab.errors import (
    ArgumentError,
    ConfigError,
    TraceError,
    TraceExistsError,
    expected,
    require,
)
from moe_lab.number_format import count_of
from moe_lab.progress import shown
from moe_lab.terminal import say

KINDS = (
    "vllm",
    "sglang",
    "trtllm",
    "megatron",
    "moe-atlas",
    "stratamoe",
    "route-trace",
    "llama-cpp",
    "counts",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab trace runs/x --text my_texts/",
        "moe-lab trace --hf path/or/id --text my_texts/ --out traces/x --max-tokens 1k",
        "moe-lab trace --import vllm routes.npz --out traces/y --config config.json",
        "moe-lab trace --import counts counts.csv --out traces/z --num-experts 64 --top-k 8",
    )
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="the folder of a finished run; with --import, the records to take",
    )
    parser.add_argument(
        "--hf",
        metavar="ID_OR_PATH",
        help="a pretrained MoE model instead; a folder never uses the network",
    )
    parser.add_argument(
        "--import",
        dest="kind",
        choices=KINDS,
        help="take the records of an engine or tool at RUN instead",
    )
    add_documents(parser, "a folder, .txt, .jsonl or .parquet of documents")
    add_out(
        parser,
        "the trace's folder (default for a run: trace-<name of the text> in its folder)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished trace in that folder"
    )
    pretrained = parser.add_argument_group("with --hf")
    add_forward_pass(pretrained, 4096, "auto")
    pretrained.add_argument(
        "--device-map", default=None, metavar="MAP", help="auto, balanced, ... (needs accelerate)"
    )
    pretrained.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that came with the model (default: refuse)",
    )
    imported = parser.add_argument_group("with --import")
    imported.add_argument(
        "--config",
        default=None,
        metavar="PATH",
        help="config.json of the model, or its folder: experts, slots, layers",
    )
    add_number(
        imported,
        "--num-experts",
        64,
        whole=True,
        most=65_535,
        default=None,
        help="real experts of a layer, if neither the source nor --config has the number",
    )
    add_number(
        imported,
        "--num-zero-experts",
        0,
        whole=True,
        most=65_535,
        least=0,
        default=None,
        help="zero-compute experts of the model",
    )
    add_number(
        imported, "--top-k", 8, whole=True, most=255, default=None, help="slots of each token"
    )
    add_layers(imported, "numbers of its MoE layers, such as 1-60 or 3,7")
    add_number(
        imported,
        "--tokens",
        "200k",
        whole=True,
        units=UNITS,
        default=None,
        help="tokens of the text, for counts whose layers left slots unused",
    )
    imported.add_argument(
        "--model", default="", help="name of the model, or which of several models in the records"
    )
    add_device(parser)
    add_json(parser)


SHOWN = (
    *("layer", "n_tokens", "n_docs", "mean", "sd", "sd_lo", "sd_hi", "zero_share"),
    *("load_cv", "max_violation", "effective_experts", "dead"),
)
"""Columns of the printed table; ``--json`` has all."""
OPTIONAL = ("n_tokens", "n_docs", "effective_experts", "sd_lo", "sd_hi")
"""Those that a narrow terminal leaves out, the first of them first."""
_OF_TEXT = {"text", "text_column", "max_tokens", "device"}
_OF_PRETRAINED = {"dtype", "device_map", "batch_tokens", "trust_remote_code"}
_OF_RECORDS = {"config", "num_experts", "num_zero_experts", "top_k", "layers", "tokens", "model"}
_IGNORED = {
    "RUN": _OF_PRETRAINED | _OF_RECORDS,
    "--hf": _OF_RECORDS,
    "--import": _OF_PRETRAINED | _OF_TEXT,
}
"""What is traced -> the options that are not read: refused where one was given."""


def main(args: argparse.Namespace) -> int:
    given = [args.hf is not None, args.kind is not None, args.run is not None and args.kind is None]
    require(
        sum(given) == 1,
        "one of RUN, --hf ID_OR_PATH or --import KIND SRC",
        "several" if any(given) else "none",
    )
    mode = "--hf" if args.hf is not None else "--import" if args.kind is not None else "RUN"
    refuse_ignored(args, add_arguments, _IGNORED[mode], mode)
    if mode != "--import" and args.text is None:
        raise ConfigError(expected("a text to trace", "none", "--text PATH"))
    try:
        return {"RUN": _run, "--hf": _pretrained, "--import": _import}[mode](args)
    except TraceExistsError as error:
        raise TraceExistsError(error.got, "--overwrite") from error
    except ArgumentError as error:
        message = error.message(lambda name: "--" + name.replace("_", "-"))
        raise TraceError(message, error.field) from error


def _import(args: argparse.Namespace) -> int:
    from moe_lab.trace import import_trace

    if args.run is None or args.out is None:
        raise ConfigError(
            expected("--import KIND SRC --out FOLDER", "no SRC" if args.run is None else "no --out")
        )
    sizes = {
        "num_experts": args.num_experts,
        "num_zero_experts": args.num_zero_experts,
        "top_k": args.top_k,
        "layers": None if args.layers is None else layer_numbers(args.layers),
        "tokens": args.tokens,
    }
    trace = import_trace(
        args.kind,
        args.run,
        args.out,
        config=args.config,
        model=args.model,
        overwrite=args.overwrite,
        **sizes,
    )
    return _report(args, {"tokens": trace.num_tokens}, trace.meta.notes, args.out)


def _pretrained(args: argparse.Namespace) -> int:
    from moe_lab.trace.capturing.hub import Loading, trace_pretrained

    if args.out is None:
        raise ConfigError(expected("a folder for the trace", "none", "--out FOLDER"))
    trace = trace_pretrained(
        args.hf,
        read_documents(args),
        args.out,
        max_tokens=args.max_tokens,
        batch_tokens=args.batch_tokens,
        loading=Loading(args.dtype, args.device, args.device_map, args.trust_remote_code),
        created_from="moe-lab trace --hf",
        progress=not args.json,
        overwrite=args.overwrite,
    )
    loss = trace.tokens.select("loss").collect()["loss"].mean()
    documents = trace.tokens.select("doc").collect()["doc"].n_unique()
    summary = {"loss": loss, "tokens": trace.num_tokens, "documents": documents}
    return _report(args, summary, trace.meta.notes, args.out)


def _report(
    args: argparse.Namespace, summary: dict[str, Any], notes: Sequence[str], out: Path
) -> int:
    """The layers, then the load, the loss and the next command."""
    layers = layers_of(out)
    if args.json:
        print_json(summary | {"notes": notes, "trace": out, "layers": layers.to_dicts()})
        return 0
    shown_columns = [name for name in SHOWN if name in layers.columns]
    print_frame(layers.select(shown_columns), explain=True, optional=OPTIONAL)
    for note in notes:
        say(f"note: {note}")
    say(load_sentence(layers))
    counts = {name: value for name, value in summary.items() if isinstance(value, int)}
    parts = [count_of(value, name.removesuffix("s")) for name, value in counts.items()]
    units = {"loss": "nats/token", "bits_per_byte": "bits/byte"}
    parts += [f"{summary[name]:.4f} {unit}" for name, unit in units.items() if summary.get(name)]
    say(", ".join(parts))
    print(f"trace: {out}")
    print(f"next: moe-lab report {shlex.quote(str(out))}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from moe_lab.text import tokenize_documents
    from moe_lab.training import Excerpt, evaluate, load_run
    from moe_lab.training.finished_run import trace_meta

    run = load_run(args.run, args.device)
    require(
        run.config.model.moe_layers, "a run with MoE layers to trace", f"the dense run {args.run}"
    )
    corpus = read_documents(args)
    out = args.out or args.run / f"trace-{Path(args.text).stem}"
    documents = tokenize_documents(corpus.documents, run.tokenizer)
    lengths = [len(document.ids[: args.max_tokens]) for document in documents]
    excerpts = [Excerpt(index, 0, length) for index, length in enumerate(lengths) if length > 1]
    meta = trace_meta(run.config, run.tokenizer.hash, corpus.hash)
    with shown(not args.json):
        evaluation = evaluate(
            run.model,
            documents,
            run.tokenizer,
            seq_length=run.config.seq_length,
            excerpts=excerpts,
            trace=(out, meta.replace(max_tokens=args.max_tokens)),
            overwrite=args.overwrite,
        )
    summary = {
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "tokens": sum(excerpt.stop for excerpt in excerpts),
        "documents": evaluation.num_documents,
    }
    repeated = f"documents left out because they repeat another's text: {corpus.num_repeated}"
    return _report(args, summary, [repeated] if corpus.num_repeated else [], out)
