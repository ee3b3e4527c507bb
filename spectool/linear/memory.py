"""Operators that are too large: refused where their sizes say so, else when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from spectool.errors import OperatorError

_LITTLE = 1 << 28
"""Bytes that are not worth asking the system about."""
VECTORS = 40
"""Vectors in float32, of the size of the larger side, that computing one singular value takes about; measured: 34."""

_SAYINGS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "Storage size calculation overflowed",
)


def check_memory(what: str, device: torch.device | str, *shapes: Sequence[int]) -> None:
    """Refuse shapes for whose vectors there is not enough memory: a file of a few bytes can state any size.

    Without this a system that grants more than it has would end the program in the middle of its work.

    Args:
        what: What has them, for the message.
        device: Where to compute.
        *shapes: Shapes without the batch axis.

    Raises:
        OperatorError: If ``VECTORS`` vectors of one of them take more than what is available.
    """
    count, shape = max(((math.prod(shape), tuple(shape)) for shape in shapes), default=(0, ()))
    need = VECTORS * 4 * count
    if need < _LITTLE:
        return
    there = available_bytes(device)
    if there is not None and need > there:
        raise OperatorError(
            f"{what} of shape {shape}: {count:,} entries take about {need / 1e9:,.1f} GB to compute with, "
            f"and {there / 1e9:,.1f} GB are available",
            hint="give a smaller input size",
        )


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return how much memory can still be used on a device; None where that cannot be told."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [amount for amount in (_system(), _container()) if amount is not None]
    return min(found, default=None)


def _system() -> int | None:
    """What Linux counts as available without swapping."""
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container() -> int | None:
    """What the process's control group has left; what it keeps of files can be dropped."""
    most, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if not (most.isdigit() and used.isdigit()):
        return None
    lines = (line.split() for line in _text("/sys/fs/cgroup/memory.stat").splitlines())
    kept = sum(int(amount) for name, amount in lines if name in ("active_file", "inactive_file"))
    return max(0, int(most) - int(used) + kept)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn running out of memory into the error of one operator, so that the others go on.

    Raises:
        OperatorError: If an allocation fails.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _SAYINGS):
            raise
        raise OperatorError(
            "there is not enough memory for an operator of this size", hint="give a smaller input size"
        ) from error
