"""What a command works on: the operators of a source that are wanted, and their weights."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectool import __version__
from spectool.api.rows import Options
from spectool.api.selecting import select
from spectool.api.sources import Found, InputShapes, Ways, find, named_shapes
from spectool.checkpoint import sha256_of
from spectool.errors import NothingToAnalyse
from spectool.graph import Region, Skipped, Survey
from spectool.progress import Progress, Step
from spectool.report.row import Report, Row

_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Selection:
    """Which operators are wanted; the fields are those of ``select``."""

    level: str = "both"
    layers: Sequence[str] = ()
    exclude: Sequence[str] = ()
    kinds: Sequence[str] = ()
    shard: tuple[int, int] | None = None


@dataclass(frozen=True)
class Job:
    """The operators to work on.

    Attributes:
        found: Where they are from, and everything else that is there.
        wanted: Those selected, whatever the shard.
        items: Those of this shard.
        load: Reads a constant by name; the small ones it gave last are remembered.
    """

    found: Found
    wanted: tuple[Region | Skipped, ...]
    items: tuple[Region | Skipped, ...]
    load: Callable[[str], torch.Tensor]


def open_job(
    source: str | Path | torch.nn.Module, ways: Ways, selection: Selection, input_shape: InputShapes | None
) -> Job:
    """Find the operators of a file or a module and select among them.

    Raises:
        UsageError: If an argument cannot be used.
        CheckpointError: If the file cannot be read.
        NothingToAnalyse: If there is no operator, or the filters leave none.
    """
    found = find(source, ways, input_shape)
    items = found.survey.items
    name = found.path or type(source).__name__
    if not any(isinstance(item, Region) or item.operators for item in items):
        raise NothingToAnalyse(
            f"{name} holds no linear operator",
            hint=f"`spectool ls {name}` lists what it holds" if found.path else "",
        )
    filters: dict[str, Any] = {
        field.name: getattr(selection, field.name) for field in dataclasses.fields(selection)
    }
    chosen = select(items, **filters)
    wanted = chosen if selection.shard is None else select(items, **{**filters, "shard": None})
    if not wanted:
        raise NothingToAnalyse(
            f"the filters leave none of the {len(items)} rows of {name}",
            hint=f"`spectool inspect {name} --list` shows the keys, levels and kinds",
        )
    return Job(found, tuple(wanted), tuple(chosen), _cached(found.survey))


def settings_of(
    options: Options, ways: Ways, selection: Selection, input_shape: InputShapes | None
) -> dict[str, Any]:
    """Return every option that shapes the numbers, as plain data."""
    return {
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)},
        "device": str(options.device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "input_shape": {
            name: list(shape) if isinstance(shape, tuple) else shape
            for name, shape in (named_shapes(input_shape) or {}).items()
        }
        or None,
        "level": selection.level,
        "layers": list(selection.layers),
        "exclude": list(selection.exclude),
        "kinds": list(selection.kinds),
        "assume_bn": ways.assume_bn,
        "key": ways.key,
        "arch": ways.arch,
        "arch_args": dict(ways.arch_args) if ways.arch_args else None,
        "recognise": ways.recognise,
        "trust": ways.trust,
        "shard": list(selection.shard) if selection.shard else None,
    }


def report_of(
    found: Found, rows: Sequence[Row], settings: Mapping[str, Any], *, hash: bool = False
) -> Report:
    """Return the report of these rows.

    Args:
        found: Where they are from.
        rows: In display order.
        settings: Every option that shapes the numbers.
        hash: Whether to hash the file.
    """
    # Of the bytes that were analysed: a file that was replaced meanwhile is an error.
    sha256 = sha256_of(found.checkpoint) if hash and found.checkpoint is not None else None
    return Report(tuple(rows), found.path, found.format, sha256, settings, __version__, found.notes)


def numbered(progress: Progress, key: str, index: int, total: int) -> Progress:
    """Return a progress callback that says which row of how many it is about."""

    def report(step: Step) -> None:
        progress(dataclasses.replace(step, task=key, index=index, total=total))

    return report


def _cached(found: Survey) -> Callable[[str], torch.Tensor]:
    kept: OrderedDict[str, torch.Tensor] = OrderedDict()
    held = 0

    def load(name: str) -> torch.Tensor:
        nonlocal held
        if name in kept:
            kept.move_to_end(name)
            return kept[name]
        tensor = found.load(name)
        if tensor.nbytes <= _CACHE_BYTES // 4:
            kept[name] = tensor
            held += tensor.nbytes
            while held > _CACHE_BYTES:
                held -= kept.popitem(last=False)[1].nbytes
        return tensor

    return load
