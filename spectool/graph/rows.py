"""Builders of the rows that the tensor and module front-ends share: chains of operations on one value.

Nodes read constants by the names that ``Weights`` knows. A stored weight's name is its key; a derived one goes by
the parameter's would-be key, a part by ``key[0:64]``. ``Region.weights`` lists the stored tensors behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectool.graph.types import BatchNorm, Conv, Embedding, Level, Linear, Node, Op, Region, Shape
from spectool.linear.geometry import ConvGeometry

if TYPE_CHECKING:
    from spectool.graph.effective import Weights

INFINITE = "infinite grid"
INFINITE_PLAIN = "infinite grid, stride 1, zero padding"
UNGROUPED = "groups=1"
EPSILON = "eps=1e-5"
BY_SHAPE = "a matrix by its shape"
PAIRING = "batch norm pairing"

# Values of a chain; the brackets keep them apart from checkpoint keys.
_ROOT = "<x>"
_EXIT = "<y>"


@dataclass(frozen=True)
class Step:
    """One operation of a chain, before it is wired.

    Attributes:
        ops: What it does: operator records with the constants they read besides the flowing value.
        key: Checkpoint key of its matrix weight; empty for one without parameters.
        label: Key of its row if it is alone and has no parameters.
        kind: Word of the vocabulary; empty for a purely structural step.
        weights: Stored tensors of its linear part.
        weight_shapes: Their shapes.
        in_shape: Input without the batch axis; None for any size.
        out_shape: Output without the batch axis; None for any size.
        operators: 1 if it has a weight matrix or kernel, else 0.
        assumed: What had to be assumed.
        note: Anything worth saying.
    """

    ops: tuple[tuple[Op, tuple[str, ...]], ...]
    key: str = ""
    label: str = ""
    kind: str = ""
    weights: tuple[str, ...] = ()
    weight_shapes: tuple[Shape, ...] = ()
    in_shape: Shape | None = None
    out_shape: Shape | None = None
    operators: int = 0
    assumed: tuple[str, ...] = ()
    note: str = ""


def linear_step(
    weights: Weights,
    name: str,
    *,
    kind: str = "linear",
    transposed: bool = False,
    assumed: Sequence[str] = (),
    note: str = "",
) -> Step:
    """Return the product with matrix ``name``, stored (in, out) if ``transposed``."""
    rows, columns = weights.shape(name)
    n, m = (rows, columns) if transposed else (columns, rows)
    return _stored(weights, name, Linear(transposed=transposed), kind, (n,), (m,), assumed, note)


def conv_step(
    weights: Weights,
    name: str,
    geometry: ConvGeometry | None = None,
    *,
    kind: str = "",
    in_shape: Shape | None = None,
    out_shape: Shape | None = None,
    assumed: Sequence[str] = (),
    note: str = "",
) -> Step:
    """Return the convolution with kernel ``name``; without a geometry it is the assumed one of any size."""
    dims = len(weights.shape(name)) - 2
    said = list(assumed)
    if geometry is None:
        geometry = ConvGeometry.plain(dims)
        said += [INFINITE_PLAIN, UNGROUPED]
    elif in_shape is None:
        said.append(INFINITE)
    word = kind or (f"conv_transpose{dims}d" if geometry.transposed else f"conv{dims}d")
    return _stored(weights, name, Conv(geometry), word, in_shape, out_shape, said, note)


def embedding_step(weights: Weights, name: str, *, note: str = "") -> Step:
    """Return the table look-up in ``name``, linear in the one-hot index."""
    size, width = weights.shape(name)
    return _stored(weights, name, Embedding(), "embedding", (size,), (width,), (), note)


def batchnorm_step(
    weights: Weights,
    *,
    gamma: str,
    beta: str,
    mean: str,
    var: str,
    eps: float | None = None,
    shape: Shape | None = None,
    note: str = "",
) -> Step:
    """Return a batch norm in evaluation mode; without ``eps`` it is the assumed one."""
    stored = tuple(name for name in (gamma, var) if name)
    return Step(
        ops=((BatchNorm(1e-5 if eps is None else eps), (gamma, beta, mean, var)),),
        key=gamma or var,
        kind="batchnorm",
        weights=stored,
        weight_shapes=tuple(weights.shape(name) for name in stored),
        in_shape=shape,
        out_shape=shape,
        assumed=(EPSILON,) if eps is None else (),
        note=note,
    )


def region(
    steps: Sequence[Step],
    *,
    level: Level = "layer",
    maximal: bool = True,
    assumed: Sequence[str] = (),
) -> Region:
    """Wire steps into a region, each reading what the one before it writes.

    Args:
        steps: In order of application, at least one.
        level: Level of the row.
        maximal: Whether no larger region contains it.
        assumed: Said besides what the steps assume.
    """
    flat = [(step.key, op, constants) for step in steps for op, constants in step.ops]
    nodes = []
    value = _ROOT
    for index, (key, op, constants) in enumerate(flat):
        target = _EXIT if index == len(flat) - 1 else f"<{index + 1}>"
        nodes.append(Node(key or target, op, (value, *constants), (target,)))
        value = target
    rows = [step for step in steps if step.kind]
    keys = [step.key for step in rows if step.key] or [step.label for step in rows]
    return Region(
        key=" + ".join(keys),
        level=level,
        kind="+".join(step.kind for step in rows),
        root=_ROOT,
        exit=_EXIT,
        nodes=tuple(nodes),
        weights=tuple(name for step in steps for name in step.weights),
        weight_shapes=tuple(shape for step in steps for shape in step.weight_shapes),
        in_shape=steps[0].in_shape,
        out_shape=steps[-1].out_shape,
        assumed=tuple(dict.fromkeys([*(text for step in steps for text in step.assumed), *assumed])),
        maximal=maximal,
        operators=sum(step.operators for step in steps),
        note="; ".join(dict.fromkeys(step.note for step in steps if step.note)),
    )


def _stored(
    weights: Weights,
    name: str,
    op: Op,
    kind: str,
    in_shape: Shape | None,
    out_shape: Shape | None,
    assumed: Sequence[str],
    note: str,
) -> Step:
    derived = weights.derived(name)
    notes = [derived.how if derived else "", note]
    return Step(
        ops=((op, (name,)),),
        key=name,
        kind=kind,
        weights=weights.sources(name),
        weight_shapes=weights.source_shapes(name),
        in_shape=in_shape,
        out_shape=out_shape,
        operators=1,
        assumed=(*assumed, *(derived.assumed if derived else ())),
        note="; ".join(text for text in notes if text),
    )
