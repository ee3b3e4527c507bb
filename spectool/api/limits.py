"""Which limit a row of ``check`` or ``clip`` has: ``--max 1.0``, ``--max 'layer4.*=0.8'``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from spectool.errors import UsageError

_ALL = "*"
_HINT = "write a positive number, 1.0, or a pattern and a number, 'layer4.*=0.8'"


@dataclass(frozen=True)
class Bounds:
    """Upper limits on σ₁, by row.

    A number without a pattern, or with the pattern ``*``, is the default of every row that no other pattern matches,
    wherever it stands; of several the last counts. Among patterns the last that matches counts.

    Attributes:
        default: Limit of rows that no pattern matches; None: they have none.
        patterns: (glob, limit) in the order given.
    """

    default: float | None = None
    patterns: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse limits that are no positive numbers."""
        for pattern, limit in self.patterns:
            _positive(limit, f"{pattern}={limit}")
        if self.default is not None:
            _positive(self.default, str(self.default))

    def __bool__(self) -> bool:
        """Whether there is any limit."""
        return self.default is not None or bool(self.patterns)

    def for_row(self, key: str, weights: Sequence[str] = ()) -> float | None:
        """Return the limit of a row; None if it has none.

        Args:
            key: The row's key.
            weights: Names of its weights; a pattern matches the key or any of them, as ``--layers`` does.
        """
        for pattern, limit in reversed(self.patterns):
            if _matches(pattern, key, weights):
                return limit
        return self.default

    def check_used(self, rows: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Refuse patterns that match nothing: a misspelt one would leave its rows without the limit meant.

        Args:
            rows: (key, weight names) of every row there is.

        Raises:
            UsageError: If a pattern matches none; the hint names the nearest keys.
        """
        rows = list(rows)
        for pattern, limit in self.patterns:
            if not any(_matches(pattern, key, weights) for key, weights in rows):
                keys = list(dict.fromkeys(key for key, _ in rows))
                near = difflib.get_close_matches(pattern, keys, n=3, cutoff=0.3) or keys[:3]
                raise UsageError(
                    f"the limit {pattern}={limit:g} matches no row",
                    hint=f"keys look like {', '.join(near)}; `spectool inspect FILE --list` shows all",
                )

    def to_dict(self) -> dict[str, float]:
        """Return pattern → limit as plain data, the default as ``*``; ``as_bounds`` takes it back."""
        table = {} if self.default is None else {"*": self.default}
        for pattern, limit in self.patterns:
            # A pattern given twice has its last place, too.
            table.pop(pattern, None)
            table[pattern] = limit
        return table


def parse_bounds(texts: Iterable[str]) -> Bounds:
    """Return the limits that ``--max`` texts give.

    Args:
        texts: Each ``1.0`` or ``GLOB=1.0``; the last ``=`` counts.

    Raises:
        UsageError: If one is neither, or a limit is no positive number.

    Example:
        >>> bounds = parse_bounds(["layer4.*=0.8", "1.0"])
        >>> bounds.for_row("layer4.0.conv1.weight"), bounds.for_row("fc.weight")
        (0.8, 1.0)
    """
    pairs: list[tuple[str, float]] = []
    for text in texts:
        pattern, equals, number = text.rpartition("=")
        try:
            limit = float(number)
        except ValueError as error:
            raise UsageError(f"--max {text!r} is no limit", hint=_HINT) from error
        if equals and not pattern.strip():
            raise UsageError(f"--max {text!r} has no pattern before the =", hint=_HINT)
        _positive(limit, text)
        pairs.append((pattern.strip() if equals else _ALL, limit))
    return _bounds(pairs)


def as_bounds(max: float | Mapping[str, float] | Bounds | None) -> Bounds:
    """Return what a ``max=`` argument says as limits.

    Args:
        max: One limit for all rows, a mapping from glob to limit in which later entries win, or None for no limit.

    Raises:
        UsageError: If it is something else, or a limit is no positive number.
    """
    if max is None:
        return Bounds()
    if isinstance(max, Bounds):
        return max
    if isinstance(max, Mapping):
        return _bounds([(str(pattern), _number(limit)) for pattern, limit in max.items()])
    return Bounds(_number(max))


def _bounds(pairs: Sequence[tuple[str, float]]) -> Bounds:
    defaults = [limit for pattern, limit in pairs if pattern == _ALL]
    patterns = tuple((pattern, limit) for pattern, limit in pairs if pattern != _ALL)
    return Bounds(defaults[-1] if defaults else None, patterns)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(
            f"the limit {value!r} is no number", hint="use max=1.0 or max={'layer4.*': 0.8, 'fc.*': 1.0}"
        )
    return float(value)


def _positive(limit: float, text: str) -> None:
    if not (math.isfinite(limit) and limit > 0):
        raise UsageError(f"the limit {text!r} is no positive finite number", hint=_HINT)


def _matches(pattern: str, key: str, weights: Sequence[str]) -> bool:
    # A key may itself hold brackets (`weight_ih_l0[0:64]`), which a glob would read as a set.
    return any(name == pattern or fnmatchcase(name, pattern) for name in (key, *weights))


def parse_fraction(text: str, name: str) -> float:
    """Return a relative amount: 0.01 for ``1%`` and for ``0.01``.

    Args:
        text: What was given.
        name: Of the option, for the error.

    Raises:
        UsageError: If it is no finite number ≥ 0.

    Example:
        >>> parse_fraction("1%", "--slack"), parse_fraction("0.05", "--slack")
        (0.01, 0.05)
    """
    bare = text.strip()
    try:
        value = float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{name} {text!r} is no relative amount", hint="write 1% or 0.01")
    return value
