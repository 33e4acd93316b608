"""Commands that are printed can be pasted into a shell."""

import shlex
from argparse import Namespace
from pathlib import Path

from moe_lab.commands.sweep import _command


def test_a_printed_command_quotes_a_path_with_a_space():
    out = Path("my runs") / "a"
    assert shlex.split(_command(Namespace(verb=None, out=out)))[-1] == str(out)
    arguments = Namespace(verb="run", recipe="r", preset="p", alternative=None, out=out)
    assert shlex.split(_command(arguments))[-1] == str(out)
