"""``moe-lab``: one module per command in ``moe_lab.commands``, imported when it is called, so that
``--help`` stays instant.

A ``MoELabError`` is caused by input: it is printed as one line and the exit code is 2. Anything
else is a bug and keeps its traceback.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from moe_lab import __version__
from moe_lab.errors import MoELabError, expected, require
from moe_lab.plain_text import one_line, plain_output
from moe_lab.plugins import load

COMMANDS = {
    "demo": (
        "moe_lab.commands.demo",
        "train a small grid on text that every Python ships, and write its report",
    ),
    "sweep": (
        "moe_lab.commands.sweep",
        "plan or run a designed grid of runs, or say how far it is",
    ),
    "watch": ("moe_lab.commands.watch", "a page of runs while they train, on this machine alone"),
    "train": ("moe_lab.commands.train", "train one model"),
    "trace": ("moe_lab.commands.trace", "record every routing decision of a trained run on a text"),
    "scaling": (
        "moe_lab.commands.scaling",
        "what laws expect of more experts; a verdict on runs of your own; a law fitted to them",
    ),
    "difficulty": (
        "moe_lab.commands.difficulty",
        "does compute follow difficulty, once the token's identity is held fixed?",
    ),
    "cache": (
        "moe_lab.commands.cache",
        "hit rate of a cache of experts within a budget of memory, beside the best possible",
    ),
    "place": (
        "moe_lab.commands.place",
        "which device holds which experts, judged on text it was not chosen on",
    ),
    "decode": (
        "moe_lab.commands.decode",
        "how many experts a batch or a window touches, and when speculation pays",
    ),
    "compare": (
        "moe_lab.commands.compare",
        "do two traces of one text hold the same routing, and if not, why",
    ),
    "ablate": (
        "moe_lab.commands.ablate",
        "what a model loses without each expert, and which score says so",
    ),
    "report": ("moe_lab.commands.report", "one offline HTML page from sweeps, runs or traces"),
    "count": (
        "moe_lab.commands.count",
        "exact parameters and FLOPs of a published model or a configuration",
    ),
    "list": (
        "moe_lab.commands.list",
        "the names of routers, losses, controllers, backends, laws, models, minis or presets",
    ),
    "doctor": (
        "moe_lab.commands.doctor",
        "versions, device, extras and default corpus of this machine",
    ),
}


WITH_PLUGINS = frozenset(
    {"demo", "sweep", "train", "trace", "difficulty", "ablate", "report", "count", "list"}
)
"""Commands that build or read models."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Says a default once: where the help does not say it already, and never that there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default is False or action.default in (None, "", [], argparse.SUPPRESS)
        if silent or not action.option_strings or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, and whose options are spelt out: ``--text``
    must not be taken for ``--text-column``. Parsers of subcommands are of the same class.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        usual = {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(*args, **{**usual, **options})
        self._negative_number_matcher = re.compile(r"-[.\d]")  # -5k is a value, not an option

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; try {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hint = _near(unknown[0].partition("=")[0], self._options(), f"{self.prog} --help")
            raise MoELabError(
                expected(f"an option or argument of {self.prog}", unknown[0], hint), unknown[0]
            )
        return values

    def _options(self) -> Iterable[str]:
        """The options of this parser and of its subcommands."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name, names = _name(action), list(map(str, action.choices))
            what = f"{name} among {', '.join(names)}"
            hint = _near(str(value), names, f"{self.prog} --help")
            raise MoELabError(expected(what, repr(value), hint), name)

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            name = _name(action)
            hint = f"{self.prog} --help"
            raise MoELabError(expected(f"a value after {name}", "none", hint), name) from None


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


def _near(name: str, names: Iterable[str], otherwise: str) -> str:
    """The names that begin with ``name``, else those that look like it, as a hint."""
    known = list(dict.fromkeys(names))
    begin = [one for one in known if one.startswith(name)]
    return " or ".join(begin[:2] or get_close_matches(name, known, n=2)) or otherwise


def _top_parser() -> Parser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        prog="moe-lab",
        description="Train, trace and judge Mixture-of-Experts models.",
        epilog=f"commands:\n{listing}\n\nmoe-lab COMMAND --help has options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"moe-lab {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 an error of the caller's or a failed run,
    130 interrupted).
    """
    with plain_output():
        return _run(list(sys.argv[1:] if argv is None else argv))


def command_parsers(name: str) -> tuple[Parser, Parser]:
    """The parser of ``--plugin`` alone, and that of all that a command takes."""
    module = importlib.import_module(COMMANDS[name][0])
    plugins = Parser(prog=f"moe-lab {name}", add_help=False)
    if name in WITH_PLUGINS:
        plugins.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="FILE_OR_MODULE",
            help="a Python file or module that adds routers, losses, ...; repeatable, at any place",
        )
    parser = Parser(prog=f"moe-lab {name}", description=COMMANDS[name][1], parents=[plugins])
    module.add_arguments(parser)
    return plugins, parser


def _run(arguments: list[str]) -> int:
    if not arguments:
        _top_parser().print_help()
        return 2
    name = ""
    try:
        name = _top_parser().parse_args(arguments[:1]).command
        return _run_command(name, arguments)
    except MoELabError as error:
        print(f"moe-lab {name}".rstrip() + f": {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"moe-lab {name}: interrupted; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run_command(name: str, arguments: list[str]) -> int:
    if name == "sweep" and len(arguments) > 1 and arguments[1].endswith(".py"):
        arguments[1:2] = ["run", "--ask", arguments[1]]
    module = importlib.import_module(COMMANDS[name][0])
    plugins, parser = command_parsers(name)
    for before, text in zip(["", *arguments], arguments, strict=False):
        require(_is_utf8(text), "arguments in UTF-8", ascii(text), "renaming that file or folder")
        empty = not text or (text.startswith("--") and text.find("=") == len(text) - 1)
        require(not empty, f"a value after {text[:-1] or before}", "an empty one")
    # Before the command's own options, which may name what a plugin adds.
    known, remaining = plugins.parse_known_args(arguments[1:])
    for source in getattr(known, "plugin", ()):
        load(source)
    return module.main(parser.parse_args(remaining))


def _is_utf8(text: str) -> bool:
    """False for a name of other bytes, which Python reads as unpaired surrogates."""
    return text == text.encode(errors="replace").decode()


if __name__ == "__main__":
    sys.exit(main())
