"""A worker for ``gpu.supervise`` that meets every misfortune. It imports no torch."""

import os
import time
from typing import Any

import gpu
import gpu_session
from gpu_session import DEAD, Session

CASES = [{"number": number} for number in range(4)]


def unlucky(session: Session, pieces: list[str]) -> None:
    """The device is lost in row 1, the process dies in row 2, piece ``slow`` hangs."""
    os.setpgid(0, 0)
    gpu_session.leave_if_dead = lambda device: os._exit(DEAD)

    def measure(number: int) -> dict[str, Any]:
        if number == 2:
            os._exit(9)
        if number == 1:
            raise RuntimeError("an illegal memory access")
        return {"value": float(number)}

    if "rows" in pieces:
        session.each("rows", CASES, measure)
    if "slow" in pieces:
        session.begin("slow", session.until(0.3))
        time.sleep(600)
    session.write("last", [{"value": 1.0}])


def patient(session: Session, pieces: list[str]) -> None:
    """Waits for longer than its parent lives."""
    gpu.end_with_parent()
    print("begun", flush=True)
    time.sleep(600)
