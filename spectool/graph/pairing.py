"""Guess which batch norm stands behind which operator, where a file has no program.

A guess, made only when asked for and marked as one. Registration order is the first rule: a norm belongs to the
operator registered right before it in the same module. Files whose names are sorted have lost that order; there,
and for norms that the first rule leaves, names decide: ``conv1``–``bn1``, ``conv``–``norm``, ``0``–``1``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from spectool.graph.rows import PAIRING
from spectool.graph.types import BatchNorm, Conv, Linear, Node, Region, Skipped

_NORM = re.compile(r"batch_?norm|norm|bn", re.IGNORECASE)
_OPERATOR = re.compile(r"conv(?:olution)?|linear|fc|dense", re.IGNORECASE)

Item = Region | Skipped


def pair(items: Sequence[Item], *, ordered: bool, certain: Collection[str] = ()) -> list[Item]:
    """Add a composed row behind each batch norm that is taken to follow an operator.

    Args:
        items: Rows in file order.
        ordered: Whether file order is the order of registration.
        certain: Tensors of modules whose order is known, where there is nothing to guess.
    """
    partner: dict[int, int] = {}
    taken: set[int] = set()
    norms = [index for index, item in enumerate(items) if _is_norm(item) and item.weights[0] not in certain]
    rules = (_registered_before, _named_alike) if ordered else (_named_alike,)
    for rule in rules:
        for index in norms:
            if index in partner:
                continue
            found = rule(items, index)
            if found is not None and found not in taken and items[found].weights[-1] not in certain:
                partner[index] = found
                taken.add(found)
    result: list[Item] = []
    for index, item in enumerate(items):
        if isinstance(item, Region) and (index in taken or index in partner):
            item = replace(item, maximal=False)
        result.append(item)
        if index in partner:
            result.append(_join(items[partner[index]], items[index]))
    return result


def _registered_before(items: Sequence[Item], norm: int) -> int | None:
    """Return the operator right before the norm, if it could feed it and is of the same module."""
    if norm == 0 or not _fits(items[norm - 1], items[norm]):
        return None
    near, far = _path(items[norm])[:-1], _path(items[norm - 1])[:-1]
    # A norm behind a block of convolutions (conv.depthwise, conv.pointwise, bn) is one level up.
    return norm - 1 if far[: len(near)] == near and len(far) - len(near) <= 1 else None


def _named_alike(items: Sequence[Item], norm: int) -> int | None:
    """Return the one operator beside the norm whose name is the norm's with another word or the number before."""
    path = _path(items[norm])
    parent, own = path[:-1], path[-1] if path else ""
    matches = []
    for index, item in enumerate(items):
        other = _path(item)
        if not other or other[:-1] != parent or not _fits(item, items[norm]):
            continue
        if own.isdecimal() and other[-1].isdecimal():
            alike = int(other[-1]) + 1 == int(own)
        else:
            alike = _NORM.sub("*", own) == _OPERATOR.sub("*", other[-1]) and "*" in _NORM.sub("*", own)
        if alike:
            matches.append(index)
    return matches[0] if len(matches) == 1 else None


def _is_norm(item: Item) -> bool:
    return isinstance(item, Region) and len(item.nodes) == 1 and isinstance(item.nodes[0].op, BatchNorm)


def _path(item: Item) -> list[str]:
    return item.key.split(".")[:-1]


def _fits(item: Item, norm: Item) -> bool:
    """Return whether an operator has as many output channels as the norm."""
    if not isinstance(item, Region) or len(item.nodes) != 1 or item.level != "layer" or "[" in item.key:
        return False
    op = item.nodes[0].op
    shape = item.weight_shapes[0]
    if isinstance(op, Conv) and item.kind.startswith("conv"):
        g = op.geometry
        outputs = shape[1] * g.groups if g.transposed else shape[0]
    elif isinstance(op, Linear) and item.out_shape is not None and item.kind == "linear":
        outputs = item.out_shape[-1]
    else:
        return False
    return norm.weight_shapes[0] == (outputs,)


def _join(operator: Item, norm: Item) -> Region:
    """Return the composition of two rows of one node each."""
    if not isinstance(operator, Region) or not isinstance(norm, Region):
        raise TypeError("only regions compose")
    first, second = operator.nodes[0], norm.nodes[0]
    middle = "<1>"
    nodes = (
        Node(first.name, first.op, first.inputs, (middle,)),
        Node(second.name, second.op, (middle, *second.inputs[1:]), (norm.exit,)),
    )
    return Region(
        key=f"{operator.key} + {norm.key}",
        level="composed",
        kind=f"{operator.kind}+{norm.kind}",
        root=operator.root,
        exit=norm.exit,
        nodes=nodes,
        weights=operator.weights + norm.weights,
        weight_shapes=operator.weight_shapes + norm.weight_shapes,
        in_shape=operator.in_shape,
        out_shape=operator.out_shape,
        assumed=tuple(dict.fromkeys((*operator.assumed, *norm.assumed, PAIRING))),
        operators=operator.operators,
        note="; ".join(text for text in (operator.note, norm.note) if text),
    )
