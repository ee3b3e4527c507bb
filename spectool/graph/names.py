"""The front-end for files that hold tensors and nothing else.

A matrix is exact. A convolution is reported as the operator on an infinite grid with stride 1, one group: its
bound holds for every input size, stride, dilation, grouping and zero padding. Nothing is composed, since a chain
of layers in a file looks the same with and without activations between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spectool.graph.classify import Rows, classify
from spectool.graph.effective import Found, Weights, is_floating
from spectool.graph.lora import find_adapters
from spectool.graph.pairing import pair
from spectool.graph.quantised import find_quantised
from spectool.graph.reparametrised import find_reparametrised
from spectool.graph.types import Embedding, Linear, Region, Skipped, Survey

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

Item = Region | Skipped


def survey_names(checkpoint: Checkpoint, *, assume_bn: bool = False) -> Survey:
    """Find operators by the names and shapes of tensors.

    Args:
        checkpoint: An open checkpoint. Only headers are read, but for the few bytes that say how a quantised
            weight is packed.
        assume_bn: Whether to guess which batch norm follows which operator; such rows say so.

    Returns:
        Rows in file order. ``load`` is a ``Weights``: it reads stored and effective weights alike, and its
        ``edits`` turns wanted values of those into values of stored tensors.
    """
    found = recognise(checkpoint)
    weights = Weights(checkpoint, found)
    rows = rows_of(checkpoint, weights, found)
    items = settle(checkpoint, [item for _, item in rows.placed])
    if assume_bn:
        items = pair(items, ordered=not _alphabetical(checkpoint))
    return Survey(tuple(items), weights, "tensors", tuple(rows.notes), weights)


def recognise(checkpoint: Checkpoint) -> list[Found]:
    """Return everything in a file that is no plain weight: adapters, quantised and reparametrised weights."""
    free = set(checkpoint.tensors)
    result: list[Found] = []

    def keep(entries: Iterable[Found]) -> None:
        for entry in list(entries):
            result.append(entry)
            free.difference_update(entry.used)

    keep(find_adapters(checkpoint, free))
    keep(find_quantised(checkpoint, free))
    keep(find_reparametrised(checkpoint.tensors, free))
    return result


def rows_of(
    checkpoint: Checkpoint, weights: Weights, found: Iterable[Found], only: Iterable[str] | None = None
) -> Rows:
    """Make the rows of a file's tensors, in file order.

    Args:
        checkpoint: The file.
        weights: Its weights.
        found: What ``recognise`` returned.
        only: Stored tensors to make rows of; by default all.
    """
    position = {name: index for index, name in enumerate(checkpoint.tensors)}
    wanted = set(position if only is None else only)
    used: set[str] = set()
    names: dict[str, int] = {}
    placed: list[tuple[int, Item]] = []
    for entry in found:
        if not wanted.intersection(entry.used):
            continue
        used.update(entry.used)
        at = min(position[name] for name in entry.used)
        if entry.weight is not None:
            names[entry.weight.name] = at
        if entry.item is not None:
            placed.append((at, entry.item))
    names.update({name: position[name] for name in position if name in wanted and name not in used})
    plain = classify(weights, sorted(names, key=names.__getitem__))
    placed += [(names[name], item) for name, item in plain.placed]
    placed.sort(key=lambda pair: pair[0])
    order = list(checkpoint.tensors)
    result = Rows([(order[at], item) for at, item in placed], plain.notes)
    result.notes += _left_over(checkpoint, used, result)
    if only is None:
        result.placed += unreadable(checkpoint)
    return result


def unreadable(checkpoint: Checkpoint) -> list[tuple[str, Item]]:
    """Return rows of weights whose values the container does not give, with the reason."""
    return [
        (name, Skipped(name, "region", (name,), ((),), f"cannot be read: {why}"))
        for name, why in checkpoint.unread.items()
        if "weight" in name.rpartition(".")[2]
    ]


def settle(checkpoint: Checkpoint, items: Sequence[Item]) -> list[Item]:
    """Fold rows of tied tensors into the first and make keys unique.

    A tensor stored once under several names has one row, under its first name; the others stand in its note. The
    same tensor in another operator (a shared kernel at another size, a shared gain with other statistics) has a row
    of its own, ``key#2``.

    Args:
        checkpoint: The file.
        items: Rows in display order.
    """
    aliases = checkpoint.aliases
    others: dict[str, list[str]] = {}
    for name, first in aliases.items():
        if name != first:
            others.setdefault(first, []).append(name)
    seen: set[object] = set()
    keys: set[tuple[str, str]] = set()
    result: list[Item] = []
    for item in items:
        canonical = tuple(aliases.get(name, name) for name in item.weights)
        level = item.level if isinstance(item, Region) else "layer"
        part = re.search(r"\[[^\]]*\]$", item.key)
        identity = (level, canonical, part[0] if part else "", _operation(item))
        if canonical != item.weights:
            if identity in seen:
                continue
            key = _renamed(item.key, dict(zip(item.weights, canonical, strict=True)))
            item = replace(item, key=key, weights=canonical)
        seen.add(identity)
        if isinstance(item, Region):
            tied = [name for weight in item.weights for name in others.get(weight, ())]
            if tied and level == "layer":
                note = f"tied with {', '.join(tied)}"
                item = replace(item, note=f"{item.note}; {note}" if item.note else note)
        key, number = item.key, 1
        while (level, key) in keys:
            number += 1
            key = f"{item.key}#{number}"
        keys.add((level, key))
        result.append(replace(item, key=key) if number > 1 else item)
    return result


def _operation(item: Item) -> object:
    """Return what, beside its weights, makes an operator another one; a matrix is a matrix wherever it stands."""
    if not isinstance(item, Region) or all(isinstance(node.op, (Linear, Embedding)) for node in item.nodes):
        return ()
    return item.in_shape, tuple(node.op for node in item.nodes)


def _renamed(key: str, names: dict[str, str]) -> str:
    """Return a row key with the names of tied tensors replaced by their first ones."""
    pieces = []
    for piece in key.split(" + "):
        stem = re.sub(r"\[[^\]]*\]$", "", piece)
        pieces.append(names.get(stem, stem) + piece[len(stem) :])
    return " + ".join(pieces)


def _alphabetical(checkpoint: Checkpoint) -> bool:
    """Return whether the order of registration is lost: safetensors sorts names within each type."""
    if checkpoint.format.startswith(("safetensors", "huggingface")):
        return True
    groups: dict[str, list[str]] = {}
    for name, ref in checkpoint.tensors.items():
        groups.setdefault(ref.dtype, []).append(name)
    return all(names == sorted(names) for names in groups.values())


def _left_over(checkpoint: Checkpoint, used: set[str], rows: Rows) -> list[str]:
    """Explain tensors of rank 2 or more that belong to a recognised weight without being part of its row."""
    beside = used - {name for _, item in rows.placed for name in item.weights}
    return [
        f"{name}: belongs to a recognised weight, no operator of its own"
        for name in checkpoint.tensors
        if name in beside
        and len(checkpoint.tensors[name].shape) > 1
        and is_floating(checkpoint.tensors[name].dtype)
    ]
