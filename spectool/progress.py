"""How long work reports where it is: a callback that receives ``Step`` records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One report of progress.

    Attributes:
        task: What is being worked on, e.g. the key of a row.
        index: Which item this is, from 0.
        total: How many items there are; 0 if unknown.
        matvecs: Operator applications spent on this item so far.
        residual: Relative residual of the worst wanted pair, if the solver has one yet.
        message: Anything worth saying in words.
    """

    task: str
    index: int = 0
    total: int = 0
    matvecs: int = 0
    residual: float | None = None
    message: str = ""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Ignore a step; the default everywhere."""
