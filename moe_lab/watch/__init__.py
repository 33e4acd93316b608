"""A page of runs while they train, on this machine alone: a place in, a page out that asks for what
changed.

``moe-lab watch PLACE`` serves it, ``--once FILE`` writes it (docs/watch.md).
"""

from moe_lab.watch.board import Board
from moe_lab.watch.page import write_page
from moe_lab.watch.place import open_place
from moe_lab.watch.server import WatchServer

__all__ = ["Board", "WatchServer", "open_place", "write_page"]
