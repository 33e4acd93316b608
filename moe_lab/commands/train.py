"""``moe-lab train``: one model, from flags or from a run's ``config.json``; on many devices under
``torchrun -m moe_lab train``.
"""

import argparse
import json
import os
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.commands.options import (
    UNITS,
    add_device,
    add_json,
    add_number,
    add_out,
    add_seed,
    add_text,
    examples,
    layers_of,
    load_sentence,
    print_json,
    terms,
    text_config,
)
from moe_lab.errors import ConfigError, FieldError, expected, require
from moe_lab.json_input import read_json_file
from moe_lab.model.minis import MINIS
from moe_lab.number_format import listing
from moe_lab.progress import shown, tell
from moe_lab.runs.layout import TRACE
from moe_lab.terminal import say

if TYPE_CHECKING:
    from moe_lab.progress import Meter
    from moe_lab.training import RunConfig

SHOWN = ("load_cv", "max_violation", "mean_ffn_count")
"""Means over layers that each printed step has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = examples(
        "moe-lab train --experts 32 --top-k 3 --zero-experts 16 --text my_texts/",
        "moe-lab train --mini longcat_flash_mini",
        "moe-lab train --router sigmoid_topk --loss load_balancing=0.01 --tokens 1M",
        "moe-lab train --set model.num_layers=6 --set optimizer.lr=0.001",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="FILE",
        help="a run's config.json to start from",
    )
    parser.add_argument(
        "--mini",
        default=None,
        metavar="NAME",
        help=f"a published architecture in small: {', '.join(MINIS)}",
    )
    add_number(
        parser,
        "--experts",
        16,
        whole=True,
        default=None,
        help="real experts of a layer (without --config: 16)",
    )
    add_number(
        parser, "--top-k", 2, whole=True, default=None, help="slots per token (without --config: 2)"
    )
    add_number(
        parser,
        "--zero-experts",
        8,
        whole=True,
        least=0,
        default=None,
        help="zero-computation experts; any at all makes the router LongCat's",
    )
    parser.add_argument(
        "--router",
        default=None,
        metavar="KIND",
        help="kind of router (moe-lab list routers); fields that it does not read fall back, "
        "with a note",
    )
    parser.add_argument(
        "--loss",
        action="append",
        default=[],
        metavar="NAME=COEFFICIENT",
        help="a further loss on the routing of each MoE layer (moe-lab list losses); may be "
        "repeated",
    )
    add_number(
        parser,
        "--tokens",
        "200k",
        whole=True,
        units=UNITS,
        default=None,
        metavar="N",
        help="training tokens (without --config: 200k)",
    )
    add_number(
        parser, "--lr", 0.003, default=None, help="peak learning rate (without --config: 0.003)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the run, such as model.num_layers=6; may be repeated",
    )
    parser.add_argument(
        "--on-alarm",
        choices=("record", "stop"),
        default=None,
        help="what an alarm about a layer's routing does: record the alarm, or record it and stop "
        "the run (default: record)",
    )
    add_number(
        parser,
        "--validate-every",
        200,
        whole=True,
        least=1,
        default=None,
        metavar="STEPS",
        help="validate before the first step and after so many steps (default: only at the end)",
    )
    parser.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        default=None,
        help="how the ranks of torchrun hold the model: whole (ddp, the default) or in shards",
    )
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        choices=("tensorboard", "wandb", "trackio"),
        help="mirror the metrics there too (extra 'track'); may be repeated",
    )
    add_out(parser, "the run's folder (default: runs/train/<config hash>)")
    add_seed(parser)
    add_device(parser)
    add_text(parser)
    add_json(parser)


def main(args: argparse.Namespace) -> int:
    import torch

    from moe_lab.routing.facts import LATER_TOKENS
    from moe_lab.training import RankError, keep_freed_memory, train

    require(
        args.parallel is None or "RANK" in os.environ,
        "--parallel under torchrun",
        "one process",
        f"torchrun --nproc-per-node 2 -m moe_lab train --parallel {args.parallel}",
        field="--parallel",
    )
    torch.set_num_threads(1)
    keep_freed_memory()
    config = run_config(args)
    _refuse_too_large(config)
    folder = args.out or Path("runs") / "train" / config.hash()
    try:
        with shown(not args.json) as meter:
            tell("training", 0, config.steps)
            result = train(
                config,
                folder,
                on_step=None if args.json else lambda row: _print_row(row, config.steps, meter),
                parallel=args.parallel,
                loggers=args.track,
            )
    except RankError as error:
        if error.reported:  # the rank that failed prints the one line
            return 2
        raise
    if os.environ.get("RANK", "0") != "0":
        return 0
    if args.json:
        print_json(result.record)
    else:
        record = result.record
        loss = f"{record['loss']:.4f} nats/token, {record['bits_per_byte']:.4f} bits/byte"
        say(terms(*SHOWN))
        print(f"{record['total_params']:,} parameters, {record['active_params']:,.0f} active")
        if record.get("sees_later_tokens"):
            say(f"note: {LATER_TOKENS}")
        if (result.folder / TRACE).is_dir():
            say(load_sentence(layers_of(result.folder / TRACE)))
        if alarms := listing([f"{kind} ({n})" for kind, n in record.get("alarms", {}).items()]):
            say(f"alarms: {alarms}; alarms.parquet in the run's folder has their sentences")
        say(f"validation loss {loss}, {record['eval_tokens']:,} tokens")
        print(f"run: {result.folder}")
        print(f"next: moe-lab report {shlex.quote(str(result.folder))}")
    return 0


def run_config(args: argparse.Namespace) -> "RunConfig":
    """The run that the flags describe, on resolved text and with the tokenizer's vocabulary."""
    from moe_lab.routing.config import drop_unread, reads
    from moe_lab.training import RunConfig

    if args.config is not None and args.mini is not None:
        raise ConfigError(expected("one of --config and --mini", "both"))
    values = (
        _read(args.config)
        if args.config is not None
        else (_mini(args.mini) if args.mini is not None else _default()).to_dict()
    )
    router = values["model"]["moe"]["router"] if values["model"].get("moe") else None
    flags = {
        "kind": args.router,
        "num_experts": args.experts,
        "top_k": args.top_k,
        "num_zero_experts": args.zero_experts,
    }
    changes = {name: value for name, value in flags.items() if value is not None}
    if changes and router is None:
        raise ConfigError(
            expected(
                "an MoE layer for --router, --experts, --top-k and --zero-experts",
                "a dense one",
            )
        )
    if router is not None:
        router |= changes
        if args.zero_experts:
            router |= {
                "kind": "longcat",
                "norm_topk_prob": False,
                "controller": _controller(router),
            }
            router["routed_scaling_factor"] = (
                router["num_experts"] + router["num_zero_experts"]
            ) / router["top_k"]
    values |= {
        name: value
        for name, value in (
            ("train_tokens", args.tokens),
            ("seed", args.seed),
            ("on_alarm", args.on_alarm),
            ("validate_every", args.validate_every),
        )
        if value is not None
    }
    values["device"] = args.device
    if args.lr is not None:
        values["optimizer"]["lr"] = args.lr
    kind = None if router is None else router["kind"]
    for item in args.set:
        _assign(values, item)
    router = (values["model"].get("moe") or {}).get("router")
    if router is not None and (args.router or router["kind"] != kind):
        given = {item.partition("=")[0].rpartition(".")[2] for item in args.set}
        for name in drop_unread(router):
            if args.config is None and args.mini is None and name not in given:
                continue  # a default of this command, that was not asked for
            note = f"kind {router['kind']!r} does not read {name}, which falls back"
            print(f"moe-lab train: {note}", file=sys.stderr)
    if args.loss:
        values["losses"] = [*values.get("losses", ()), *map(_loss, args.loss)]
    by_token_id = router is not None and reads(router["kind"], "vocab_size")
    if router is not None and by_token_id and router.get("vocab_size") is None:
        router["vocab_size"] = values["model"]["vocab_size"]
    try:
        config = RunConfig.from_dict(values)
    except FieldError as error:
        for item in args.set:  # in the words of the option that set the field
            path = item.partition("=")[0]
            if path.rpartition(".")[2] == error.field:
                what, hint = f"--set {path} as {error.what}", f"--set {path}={error.example}"
                raise ConfigError(expected(what, error.got, hint), error.field) from error
        raise
    text = text_config(args, config.text)
    model = config.model.replace(vocab_size=text.vocab_size)
    if by_token_id and model.moe is not None:
        table = model.moe.router.replace(vocab_size=text.vocab_size)
        model = model.replace(moe=model.moe.replace(router=table))
    return config.replace(text=text, model=model)


def _loss(text: str) -> dict[str, Any]:
    name, _, coefficient = text.partition("=")
    try:
        return {"name": name, "coefficient": float(coefficient)}
    except ValueError:
        raise ConfigError(
            expected("--loss NAME=COEFFICIENT", repr(text), "--loss entropy=1e-3")
        ) from None


def _default() -> "RunConfig":
    from moe_lab.model import DecoderConfig, MoEConfig
    from moe_lab.routing import RouterConfig
    from moe_lab.training import RunConfig

    moe = MoEConfig(
        d_model=64, d_expert=64, router=RouterConfig(num_experts=16, top_k=2, norm_topk_prob=True)
    )
    return RunConfig(
        name="train",
        model=DecoderConfig(num_layers=3, d_model=64, num_heads=2, context_length=128, moe=moe),
        batch_size=8,
    )


def _mini(name: str) -> "RunConfig":
    from moe_lab.model import preset
    from moe_lab.model.minis import find_mini
    from moe_lab.training import RunConfig

    return RunConfig(
        name=name, arm=name, model=preset(name), batch_size=8, **find_mini(name).training
    )


def _controller(router: dict[str, Any]) -> dict[str, Any]:
    """LongCat's proportional rule with the target that uniform load gives."""
    target = (
        router["top_k"]
        * router["num_experts"]
        / (router["num_experts"] + router["num_zero_experts"])
    )
    return {"kind": "proportional", "rate": 0.1, "target_ffn_count": target}


def _read(path: Path) -> dict[str, Any]:
    values = read_json_file(path, "config.json of a run")
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ConfigError(
            expected(
                f"a run's configuration in {path}",
                "JSON without a model",
                "the config.json of a run",
            )
        )
    values.setdefault("optimizer", {})
    return values


def _paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all fields in nested dictionaries."""
    names = []
    for key, value in values.items():
        names += [f"{prefix}{key}"]
        names += _paths(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return names


def _assign(values: dict[str, Any], item: str) -> None:
    """``a.b=1`` into nested dictionaries; the value is JSON if it parses as such, else a string."""
    path, equals, raw = item.partition("=")
    *parents, leaf = path.split(".")
    fields = _paths(values)
    paths = [name for name in fields if name.endswith(f".{leaf}")] or get_close_matches(
        path, fields
    )
    for parent in parents:
        values = values.get(parent) if isinstance(values.get(parent), dict) else {}  # type: ignore[assignment]
    require(
        equals and leaf in values,
        "--set FIELD=VALUE with a field of the run's config.json",
        repr(item),
        " or ".join(f"--set {name}=VALUE" for name in paths) or "--set model.num_layers=6",
    )
    was = values[leaf]
    try:
        values[leaf] = json.loads(raw)
    except ValueError:
        values[leaf] = raw
    require(
        isinstance(values[leaf], dict) or not isinstance(was, dict),
        f"--set {path} as an object of fields, or one of them",
        repr(raw),
        f"--set {path}.{next(iter(was), 'FIELD') if isinstance(was, dict) else ''}=VALUE",
        field=leaf,
    )


def _refuse_too_large(config: "RunConfig") -> None:
    """Refuse a run that is expected to need more memory than is free; ranks that share a model are
    not checked.
    """
    from moe_lab.sweeps import free_memory, run_memory

    need, room = run_memory(config), free_memory(config.device)
    if room is not None and need > room and os.environ.get("WORLD_SIZE", "1") == "1":
        what = f"a run within the {room / 1e9:,.1f} GB of memory that runs may take here"
        hint = "fewer --experts, or --set model.num_layers=2"
        raise ConfigError(expected(what, f"one that needs {need / 1e9:,.1f} GB", hint))


def _print_row(row: dict[str, Any], steps: int, meter: "Meter | None") -> None:
    """One logged step; on a terminal also how far the training is."""
    if meter is not None:
        meter.clear()
    parts = [f"step {row['step']:6d}", f"loss {row['loss']:.4f}"]
    parts += [f"{name} {row[name]:.3f}" for name in SHOWN if name in row]
    print("  ".join([*parts, f"{row['tokens_per_second']:,.0f} tok/s"]), flush=True)
    tell("training", row["step"], steps)
