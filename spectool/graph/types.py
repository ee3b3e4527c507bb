"""Graphs, regions and what was left out: data only, no tensors inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from spectool.linear.geometry import ConvGeometry

if TYPE_CHECKING:
    import torch

    from spectool.graph.writing import Writer

Level = Literal["layer", "composed"]
Shape = tuple[int, ...]


# --- operator records: what a node does -------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """Convolution or transposed convolution; inputs (x, weight[, bias]), weight in torch's layout."""

    geometry: ConvGeometry


@dataclass(frozen=True)
class Linear:
    """Product with a constant matrix; inputs (x, weight[, bias]).

    Attributes:
        transposed: False: the weight is (out, in) as in ``nn.Linear``; True: (in, out) as in ONNX MatMul.
        alpha: Factor on the product (ONNX Gemm).
        axis: Axis of x that is contracted: -1, or -2 where the constant stands on the left.
    """

    transposed: bool = False
    alpha: float = 1.0
    axis: int = -1


@dataclass(frozen=True)
class BatchNorm:
    """Batch norm in evaluation mode; inputs (x, gamma, beta, mean, var), ``""`` where one is absent."""

    eps: float
    axis: int = 1


@dataclass(frozen=True)
class Embedding:
    """Table look-up; inputs (indices, weight); linear in the one-hot input, matrix = weightᵀ."""


@dataclass(frozen=True)
class Call:
    """Any other operation, replayed by name.

    Attributes:
        name: Domain and name, e.g. ``onnx.Transpose`` or ``aten.view.default``.
        attributes: Its non-tensor arguments.
        opset: Version of the operator set, where there is one.
    """

    name: str
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    opset: int = 0


@dataclass(frozen=True)
class Opaque:
    """An operation that is a boundary: not affine in one input, or not understood.

    Attributes:
        name: Name of the operation, e.g. ``onnx.Relu``.
        reason: Why it is not analysed; empty for a plain nonlinearity without weights.
    """

    name: str
    reason: str = ""


Op = Conv | Linear | BatchNorm | Embedding | Call | Opaque


# --- the graph --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One operation: names of what it reads (values or constants) and writes."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """A tensor that flows: full shape with the batch axis (None where unknown), and element type."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str = "float32"


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order.

    Attributes:
        nodes: All nodes, subgraph bodies inlined with prefixed names.
        values: Value name → Value.
        inputs: Names of the graph's inputs.
        outputs: Names of the graph's outputs.
        constants: Constant name → shape. Weights go by checkpoint key; a folded constant by its output's name.
        origins: Constant name → checkpoint keys it was made from (itself, if stored).
    """

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Shape]
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# --- what a survey of a file yields -----------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """A part of the graph that is affine in its one root; becomes one row.

    Attributes:
        key: Row key: checkpoint key of the matrix weight, keys joined by `` + `` for compositions.
        level: ``layer`` for one stored operator, ``composed`` for more.
        kind: Word of the documented vocabulary, joined by ``+``.
        root: Name of the value it reads (a batch of ``in_shape``).
        exit: Name of the value it writes.
        nodes: Nodes in execution order. What a node reads that is neither ``root`` nor an output of ``nodes``
            is a constant.
        weights: Names of the tensors of the linear part in graph order (no bias, no running mean).
        weight_shapes: Their shapes, parallel to ``weights``.
        in_shape: Shape of the root without the batch axis; None where any size is meant.
        out_shape: Shape of the exit without the batch axis; None where any size is meant.
        batched: Whether root and exit have a leading batch axis of 1 that ``in_shape`` leaves out.
        assumed: What had to be assumed, in words.
        maximal: Whether no larger region contains it (``clip`` and ``check`` act on those).
        operators: How many operators with a weight matrix or kernel it holds (0 for a lone batch norm).
        note: Anything worth saying in words.
    """

    key: str
    level: Level
    kind: str
    root: str
    exit: str
    nodes: tuple[Node, ...]
    weights: tuple[str, ...]
    weight_shapes: tuple[Shape, ...]
    in_shape: Shape | None
    out_shape: Shape | None
    batched: bool = True
    assumed: tuple[str, ...] = ()
    maximal: bool = True
    operators: int = 1
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """What cannot be analysed, and why.

    Attributes:
        key: Row key, as for a region.
        kind: Word of the documented vocabulary.
        weights: Names of its tensors.
        weight_shapes: Their shapes.
        reason: One line.
        status: ``skipped`` for a linear operator that was not analysed, ``nonlinear`` for one that is not linear.
        operators: How many linear operators the coverage line counts as skipped (0 for ``nonlinear``).
    """

    key: str
    kind: str
    weights: tuple[str, ...]
    weight_shapes: tuple[Shape, ...]
    reason: str
    status: Literal["skipped", "nonlinear"] = "skipped"
    operators: int = 1


@dataclass(frozen=True)
class Survey:
    """Everything found in one file, in display order.

    Attributes:
        items: Regions and skips in the order of the graph, else of the file; a composed region follows the last
            of its layers.
        load: Reads a constant by name (stored or derived: effective weights, folded constants), CPU, stored type.
        source: Which front-end spoke: ``onnx``, ``modules``, ``tensors``, ``tape``.
        notes: What a user should know, in words.
        writer: The way back from constants to stored tensors; None where nothing can be written.
        graph: The program that was cut into regions; None where there is none.
        live: (a module that may run, name of its parameter or buffer → checkpoint key, empty where they are the
            same); None where no code may run. Its parameters may hold no values.
    """

    items: tuple[Region | Skipped, ...]
    load: Callable[[str], torch.Tensor]
    source: str
    notes: tuple[str, ...] = ()
    writer: Writer | None = None
    graph: Graph | None = None
    live: tuple[torch.nn.Module, Mapping[str, str]] | None = None
