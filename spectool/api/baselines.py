"""An earlier result that a check compares with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectool.errors import UsageError

_SCHEMA = 1
_HINT = "make one with `spectool check FILE --max C --format json -o old.json`, or `inspect --certify`"
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Earlier:
    """One row of an earlier result.

    Attributes:
        lower: Lower end of σ₁; None if unknown.
        upper: Upper end of σ₁; None if unknown.
        assumed: What was assumed.
        input_shape: Without the batch axis; None for any.
        counted: Whether the row had an operator that a check would miss.
    """

    lower: float | None
    upper: float | None
    assumed: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    counted: bool = True


Rows = Mapping[tuple[str, str], Earlier]


def read_baseline(path: str | Path) -> Rows:
    """Return (key, level) → row of a result that ``inspect`` or ``check`` wrote with ``--format json``.

    Raises:
        UsageError: If the file is missing or is no such result.
    """
    place = Path(path)
    try:
        if place.stat().st_size > _MOST_BYTES:
            raise UsageError(f"the baseline {path} has more than {_MOST_BYTES} bytes", hint=_HINT)
        document = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"the baseline {path} cannot be read: {error.strerror or error}", hint=_HINT
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the baseline {path} is no JSON document ({error})", hint=_HINT) from error
    if not isinstance(document, dict) or "schema" not in document:
        raise UsageError(f"the baseline {path} is no result of spectool", hint=_HINT)
    if document["schema"] != _SCHEMA:
        raise UsageError(
            f"the baseline {path} has schema {document['schema']!r}; this version reads {_SCHEMA}", hint=_HINT
        )
    if not isinstance(document.get("rows"), list):
        raise UsageError(f"the baseline {path} has no rows: it is no result of inspect or check", hint=_HINT)
    rows: dict[tuple[str, str], Earlier] = {}
    for place_of, entry in enumerate(document["rows"]):
        if not isinstance(entry, dict):
            raise UsageError(f"row {place_of} of the baseline {path} is no object", hint=_HINT)
        key, row = _row(entry, f"row {place_of} of the baseline {path}")
        rows.setdefault(key, row)
    return rows


def _row(entry: Mapping[str, Any], name: str) -> tuple[tuple[str, str], Earlier]:
    missing = [member for member in ("layer", "level", "lower", "upper", "status") if member not in entry]
    if missing:
        raise UsageError(f"{name} has no {missing[0]!r}", hint=_HINT)
    lower, upper = (_bound(entry[end], f"{end!r} of {name}") for end in ("lower", "upper"))
    assumed, shape = entry.get("assumed") or (), entry.get("input_shape")
    return (str(entry["layer"]), str(entry["level"])), Earlier(
        lower,
        upper,
        tuple(map(str, assumed)) if isinstance(assumed, list) else (),
        tuple(size for size in shape if isinstance(size, int)) if isinstance(shape, list) else None,
        entry["status"] != "nonlinear",
    )


def _bound(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}, no number", hint=_HINT)
    return float(value)
