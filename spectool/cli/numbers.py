"""Numbers as the terminal shows them: five significant digits, intervals rounded outward."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

DIGITS = 5
_SLACK = 1e-12
_BARS = "▁▂▃▄▅▆▇█"


def significant(value: float, rounding: str = ROUND_HALF_EVEN) -> str:
    """Return a number to five significant digits, trailing zeros kept so that columns align.

    Args:
        value: A finite number.
        rounding: A rounding mode of ``decimal``.

    Example:
        >>> significant(15.91640231), significant(2.0), significant(1.5e-9)
        ('15.916', '2.0000', '1.5000e-9')
    """
    if value == 0:
        return "0"
    rounded = Context(prec=DIGITS, rounding=rounding).create_decimal(Decimal(value))
    exponent = rounded.adjusted()
    if -4 <= exponent <= DIGITS:
        return f"{rounded:.{max(DIGITS - 1 - exponent, 0)}f}"
    return f"{rounded:.{DIGITS - 1}e}".replace("e+", "e")


def rounded_down(value: float) -> str:
    """Return the largest five-digit number that is no larger.

    A value within 1e-12 of a five-digit number is that number: the last bits of a float, which no five digits can
    show, would otherwise widen an exact 3.5 to [3.4999, 3.5001].
    """
    return significant(value * (1 + _SLACK), ROUND_FLOOR)


def rounded_up(value: float) -> str:
    """Return the smallest five-digit number that is no smaller, up to 1e-12 as for ``rounded_down``."""
    return significant(value * (1 - _SLACK), ROUND_CEILING)


def interval(lower: float | None, upper: float | None) -> str:
    """Return an interval with its ends rounded outward; ``∞`` where nothing is proven.

    Example:
        >>> interval(2.04126, 2.04131), interval(2.04126, None), interval(3.4999999999999996, 3.5)
        ('[2.0412, 2.0414]', '[2.0412, ∞)', '[3.5000, 3.5000]')
    """
    low = "0" if lower is None else rounded_down(lower)
    return f"[{low}, ∞)" if upper is None else f"[{low}, {rounded_up(upper)}]"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """Return one bar per value, from zero to the largest; more than ``width`` values are thinned out evenly.

    Example:
        >>> sparkline([4.0, 2.0, 0.0])
        '█▅▁'
    """
    top = max(values, default=0.0)
    if len(values) > width:
        values = [values[place * (len(values) - 1) // (width - 1)] for place in range(width)]
    if top <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[round(max(value, 0.0) / top * (len(_BARS) - 1))] for value in values)


def readable_bytes(count: int) -> str:
    """Return a size in bytes with a decimal unit, e.g. ``13.5 GB``."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
