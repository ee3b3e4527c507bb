"""The bytes of a file with some runs of them replaced; nothing is held in memory but one run at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from spectool.checkpoint.source import Source

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Splice:
    """One run of bytes that is replaced.

    Attributes:
        start: First byte replaced, in the original.
        stop: End of the run in the original.
        length: Bytes that take its place.
        make: Returns them, as anything with the buffer interface.
    """

    start: int
    stop: int
    length: int
    make: Callable[[], Any]

    def shifted(self, by: int) -> Splice:
        """Return the same replacement in a file where everything stands ``by`` bytes later."""
        return Splice(self.start + by, self.stop + by, self.length, self.make)


def fixed(start: int, stop: int, data: bytes) -> Splice:
    """Return a splice whose bytes are at hand."""
    return Splice(start, stop, len(data), lambda: data)


class Content:
    """A source with splices.

    Args:
        source: The original bytes.
        splices: What is replaced, in any order.

    Raises:
        ValueError: If two splices overlap or one leaves the source; callers see to it that none do.
    """

    def __init__(self, source: Source, splices: list[Splice]) -> None:
        self.source = source
        self.splices = sorted(splices, key=lambda splice: (splice.start, splice.stop))
        at = 0
        for splice in self.splices:
            if splice.start < at or splice.stop < splice.start:
                raise ValueError(f"{source.path}: two changes overlap at byte {splice.start}")
            at = splice.stop
        if at > source.size:
            raise ValueError(f"{source.path}: a change ends at byte {at}, behind the end of the file")

    @property
    def in_place(self) -> bool:
        """Whether every run is replaced by one of the same length."""
        return all(splice.length == splice.stop - splice.start for splice in self.splices)

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return self.source.size + sum(s.length - (s.stop - s.start) for s in self.splices)

    def changed(self) -> list[tuple[int, int]]:
        """Return start and stop of the replaced runs in the result."""
        runs, shift = [], 0
        for splice in self.splices:
            runs.append((splice.start + shift, splice.start + shift + splice.length))
            shift += splice.length - (splice.stop - splice.start)
        return runs

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """Yield the result in blocks.

        Args:
            start: First byte, as a position in the original; no splice may straddle it.
            stop: End, likewise; the end of the file if None.
        """
        end = self.source.size if stop is None else stop
        at = start
        for splice in self.splices:
            if splice.stop <= start and splice.start < start:
                continue
            if splice.start >= end:
                break
            yield from self._original(at, splice.start)
            yield memoryview(splice.make()).cast("B")
            at = splice.stop
        yield from self._original(at, end)

    def _original(self, start: int, stop: int) -> Iterator[memoryview]:
        for at in range(start, stop, _BLOCK):
            yield memoryview(self.source.read(at, min(_BLOCK, stop - at)))
