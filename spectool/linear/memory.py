"""Operators that are too large: refused where their sizes say so, else when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from spectool.errors import OperatorError

#: Entries of one input (padding included) or output past which nothing is computed: 1 GiB in float32. A file of a
#: few bytes can state any size.
MOST_ENTRIES = 1 << 28
_SAYINGS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "Storage size calculation overflowed",
)


def check_entries(what: str, *shapes: Sequence[int]) -> None:
    """Refuse shapes that no computation should begin with.

    Args:
        what: What has them, for the message.
        *shapes: Shapes without the batch axis.

    Raises:
        OperatorError: If one has more than ``MOST_ENTRIES`` entries.
    """
    for shape in shapes:
        count = math.prod(shape)
        if count > MOST_ENTRIES:
            raise OperatorError(
                f"{what} of shape {tuple(shape)} has {count:,} entries, more than the {MOST_ENTRIES:,} computed with",
                hint="give a smaller input size",
            )


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
