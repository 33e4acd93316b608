"""Process groups of gloo on a machine that others use too."""

import signal
import socket
from collections.abc import Callable
from typing import TypeVar

from torch.multiprocessing import ProcessExitedException

ATTEMPTS = 3
ABORTED = ProcessExitedException("aborted", 0, 0, -signal.SIGABRT, "SIGABRT")
"""What an attempt raises that sees it otherwise than by ``torch.multiprocessing``."""
T = TypeVar("T")


def free_port() -> int:
    """A port that no other process is given for a minute: a connection on it that this side closed
    still waits there, which stops nobody who asks for this very port.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()):
            server.accept()[0].close()
        return server.getsockname()[1]


def unless_aborted(attempt: Callable[[int], T]) -> T:
    """``attempt(0)``, or the next one where gloo aborted a process.

    Its listening thread does so where a connection was closed before it is asked who called
    (https://github.com/pytorch/gloo/issues/514), which happens on a busy machine. Such an abort,
    and nothing else, is tried again.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt(number)
        except ProcessExitedException as error:
            if error.signal_name != "SIGABRT" or number == ATTEMPTS - 1:
                raise
    raise AssertionError
