"""Everything spectool raises on purpose.

::

    SpectoolError               exit 3   (never raised itself; the root to catch)
    ├── UsageError              exit 2   an argument or option that cannot be used
    ├── CheckpointError         exit 2   an input that cannot be read
    │   ├── UnrecognisedFormat  exit 2   no container spectool knows
    │   ├── CorruptFile         exit 2   the container contradicts itself or ends early
    │   └── LimitExceeded       exit 2   a safety limit was hit
    ├── GraphError              exit 2   the program in the file cannot be followed
    ├── NothingToAnalyse        exit 2   the file was read and holds no linear operator
    ├── OutputError             exit 2   the result cannot be written where it was asked for
    └── OperatorError           exit 2   one operator cannot be built (a row reports it; the others go on)

Each error says *what* went wrong and *what was found* in its message, and *what to do* in ``hint``.
"""

from __future__ import annotations


class SpectoolError(Exception):
    """Root of all errors raised on purpose.

    Args:
        message: What is wrong and what was found, one line.
        hint: What to do about it, one line; empty if there is nothing to advise.
    """

    exit_code: int = 3

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def in_full(self) -> str:
        """What is wrong and what to do, as one phrase: for rows, which have one place for both."""
        return f"{self}: {self.hint}" if self.hint else str(self)


class UsageError(SpectoolError):
    """An argument or option that cannot be used."""

    exit_code = 2


class CheckpointError(SpectoolError):
    """An input that cannot be read."""

    exit_code = 2


class UnrecognisedFormat(CheckpointError):
    """The bytes match no container spectool knows."""


class CorruptFile(CheckpointError):
    """The container contradicts itself or ends early."""


class LimitExceeded(CheckpointError):
    """A safety limit was hit; the message names it."""


class GraphError(SpectoolError):
    """The program in the file cannot be followed."""

    exit_code = 2


class NothingToAnalyse(SpectoolError):
    """The file was read and holds no linear operator."""

    exit_code = 2


class OutputError(SpectoolError):
    """The result cannot be written where it was asked for."""

    exit_code = 2


class OperatorError(SpectoolError):
    """One operator cannot be built or applied; its row reports it and the others go on."""

    exit_code = 2
