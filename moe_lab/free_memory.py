"""The memory that is free on this machine or its GPUs."""

from pathlib import Path

SHARE = 0.9
"""Of the memory that is free this much is given to computations."""


def free_memory(device: str) -> int | None:
    """Bytes that computations on ``device`` may take, ``SHARE`` of what is free now; None where
    that is unknown.
    """
    free = (
        _free_on_gpus()
        if device.startswith("cuda")
        else _free_here(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))
    )
    return None if free is None else int(SHARE * free)


def _free_on_gpus() -> int | None:
    """Of all visible GPUs together: the local launcher deals them out to its workers in turn."""
    import torch

    if not torch.cuda.is_available():
        return None
    return sum(
        torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
    )


def _free_here(meminfo: Path, groups: Path) -> int | None:
    """The smaller of what the kernel calls available and what the control group (version 2 or 1)
    leaves.
    """
    limits = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        numbers = [_number(groups / limit), _number(groups / used)]
        if None not in numbers:
            limits.append(max(0, numbers[0] - numbers[1]))  # type: ignore[operator]
    try:
        line = next(
            line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")
        )
        limits.append(1024 * int(line.split()[1]))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    return min(limits, default=None)


def _number(path: Path) -> int | None:
    """The integer in a file; "max" is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
