"""Compose the links of an ``nn.Sequential``, whose order of execution is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spectool.graph.rows import Step, region
from spectool.graph.types import BatchNorm, Conv, Linear, Region, Shape


@dataclass(frozen=True)
class Link:
    """One affine module of a chain.

    Attributes:
        step: What it does.
        in_shape: What flows in, without the batch axis; None if unknown.
        out_shape: What flows out.
        place: Where its row stands among the others.
    """

    step: Step
    in_shape: Shape | None
    out_shape: Shape | None
    place: int


def compose(run: Sequence[Link]) -> list[tuple[int, Region]]:
    """Make the rows of a maximal affine run: its operators, the conv–BN pairs in it, and the whole.

    Without sizes only what no padding separates is composed: batch norms onto the operator before them, and
    matrices onto matrices. A row follows the last of its layers; steps without parameters have a row of their own
    only where they are all there is.

    Args:
        run: Modules in order of execution with nothing but neutral ones between them.

    Returns:
        Rows with their places, in order.
    """
    if all(link.in_shape is not None and link.out_shape is not None for link in run):
        return _rows(list(run))
    rows = []
    for group in _unsized_groups(run):
        rows += _rows(group)
    return rows


def _unsized_groups(run: Sequence[Link]) -> list[list[Link]]:
    """Cut a run of unknown sizes where a composition would not be exact."""
    groups: list[list[Link]] = []
    for link in run:
        op = _op(link)
        if not link.step.key:
            groups.append([])  # a pool or a pad has no row without a size, and nothing composes across it
            continue
        last = groups[-1] if groups else []
        head = _op(last[0]) if last else None
        if isinstance(op, BatchNorm):
            joins = isinstance(head, (Conv, Linear))
        else:
            joins = isinstance(op, Linear) and isinstance(head, Linear)
        if joins:
            last.append(link)
        else:
            groups.append([link])
    return [group for group in groups if group]


def _rows(run: list[Link]) -> list[tuple[int, Region]]:
    while run and not run[0].step.kind:
        run = run[1:]
    while run and not run[-1].step.kind:
        run = run[:-1]
    if not run:
        return []
    counted = [link for link in run if link.step.kind]
    if len(counted) == 1:
        return [(run[0].place, region([run[0].step]))]
    rows: list[tuple[int, Region]] = []
    previous: Link | None = None
    pair: Region | None = None
    for link in run:
        if link.step.key:
            rows.append((link.place, region([link.step], maximal=False)))
        if previous is not None and isinstance(_op(link), BatchNorm) and previous.step.operators:
            pair = _composed([previous, link], maximal=len(counted) == 2)
            rows.append((link.place, pair))
        previous = link
    if len(counted) > 2 or pair is None:
        rows.append((run[-1].place, _composed(run, maximal=True)))
    return rows


def _composed(run: Sequence[Link], *, maximal: bool) -> Region:
    """Wire links into one region at their full sizes; matrices alone act on the last axis."""
    steps = [link.step for link in run]
    if run[0].in_shape is None:
        known = [step.out_shape for step in steps if step.out_shape is not None]
        steps[-1] = replace(steps[-1], out_shape=known[-1] if known else None)
    elif not all(isinstance(_op(link), Linear) for link in run):
        steps = [replace(link.step, in_shape=link.in_shape, out_shape=link.out_shape) for link in run]
    return region(steps, level="composed", maximal=maximal)


def _op(link: Link) -> object:
    return link.step.ops[0][0]
