"""Which of the operators found are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from spectool.errors import UsageError
from spectool.graph.types import Region, Skipped

LEVELS = ("layer", "composed", "both")


def select(
    items: Iterable[Region | Skipped],
    *,
    level: str = "both",
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[str] = (),
    shard: tuple[int, int] | None = None,
) -> list[Region | Skipped]:
    """Return the wanted items in order.

    Args:
        items: Regions and skips.
        level: ``layer``, ``composed`` (maximal regions, a lone operator being its own) or ``both``.
        layers: Globs; an item is kept if its key, or the name of one of its weights, matches any.
        exclude: Globs; an item is dropped if its key matches any.
        kinds: Kinds, or globs of kinds; a composed kind matches as a whole or by a part.
        shard: (i, n): keep every n-th item, starting from the i-th; i counts from 1.

    Raises:
        UsageError: If the level or the shard makes no sense.
    """
    if level not in LEVELS:
        raise UsageError(f"no level is called {level!r}", hint="use layer, composed or both")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise UsageError(f"shard {shard[0]}/{shard[1]} makes no sense", hint="use i/n with 1 <= i <= n")
    chosen = []
    for item in items:
        if isinstance(item, Region):
            if level == "layer" and item.level != "layer":
                continue
            if level == "composed" and not item.maximal:
                continue
        names = (item.key, *item.weights)
        if layers and not any(_match(name, layers) for name in names):
            continue
        if exclude and _match(item.key, exclude):
            continue
        if kinds and not any(_match(kind, kinds) for kind in (item.kind, *item.kind.split("+"))):
            continue
        chosen.append(item)
    return chosen if shard is None else chosen[shard[0] - 1 :: shard[1]]


def _match(name: str, globs: Sequence[str]) -> bool:
    # A key may itself hold brackets (`weight_ih_l0[0:64]`), which a glob would read as a set.
    return any(name == glob or fnmatchcase(name, glob) for glob in globs)
