"""Graphs made by hand, node by node, and their rows: no front-end, no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from spectool.graph.affine import flow
from spectool.graph.regions import survey_graph
from spectool.graph.roles import Known
from spectool.graph.rules import ONNX_RULES
from spectool.graph.types import (
    BatchNorm,
    Call,
    Conv,
    Graph,
    Linear,
    Node,
    Op,
    Opaque,
    Region,
    Survey,
    Value,
)
from spectool.linear.geometry import ConvGeometry

RELU = Opaque("onnx.Relu")
Shape = tuple[int | None, ...]


def call(name: str, **attributes: Any) -> Call:
    return Call(f"onnx.{name}", attributes, 13)


class Net:
    """A graph under construction; ``net(op, inputs, shape)`` appends a node and returns its output's name."""

    def __init__(self, **inputs: Shape) -> None:
        self.nodes: list[Node] = []
        self.values = {name: Value(name, shape) for name, shape in inputs.items()}
        self.inputs = tuple(inputs)
        self.tensors: dict[str, torch.Tensor] = {}

    def weight(self, name: str, *shape: int, value: torch.Tensor | None = None) -> str:
        seed = torch.Generator().manual_seed(len(self.tensors))
        self.tensors[name] = torch.randn(*shape, generator=seed) if value is None else value
        return name

    def __call__(
        self, op: Op, inputs: Sequence[str], shape: Shape, name: str = "", dtype: str = "float32"
    ) -> str:
        name = name or f"v{len(self.nodes)}"
        return self.many(op, inputs, {name: shape}, dtype)[0]

    def many(
        self, op: Op, inputs: Sequence[str], outputs: Mapping[str, Shape], dtype: str = "float32"
    ) -> tuple[str, ...]:
        self.nodes.append(Node(next(iter(outputs)), op, tuple(inputs), tuple(outputs)))
        self.values |= {name: Value(name, shape, dtype) for name, shape in outputs.items()}
        return tuple(outputs)

    def linear(self, x: str, name: str, rows: int, columns: int) -> str:
        shape = self.values[x].shape
        assert shape is not None
        return self(Linear(), (x, self.weight(name, rows, columns)), (*shape[:-1], rows))

    def conv(self, x: str, name: str, out: int, **geometry: Any) -> str:
        shape = self.values[x].shape
        assert shape is not None
        assert shape[1] is not None
        self.weight(name, out, shape[1] // geometry.get("groups", 1), 1, 1)
        return self(Conv(ConvGeometry.plain(2, **geometry)), (x, name), (1, out, *shape[2:]))

    def norm(self, x: str, name: str) -> str:
        shape = self.values[x].shape
        assert shape is not None
        assert shape[1] is not None
        names = [self.weight(f"{name}.{part}", shape[1]) for part in ("gamma", "beta", "mean", "var")]
        return self(BatchNorm(1e-5), (x, *names), shape)

    def graph(self, *outputs: str) -> Graph:
        constants = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return Graph(tuple(self.nodes), self.values, self.inputs, outputs, constants)

    def survey(self, *outputs: str, **known: Any) -> Survey:
        load = self.tensors.__getitem__
        return survey_graph(
            self.graph(*outputs), Known(load=load, rules=ONNX_RULES, move=move(self), **known), source="test"
        )


def move(net: Net) -> Any:
    """The operations on index arrays that these graphs use, in numpy."""

    def run(node: Node, arrays: Sequence[np.ndarray | None]) -> Sequence[np.ndarray]:
        x = next(array for array in arrays if array is not None)
        assert isinstance(node.op, Call)
        values = node.op.attributes
        match node.op.name.removeprefix("onnx."):
            case "Split":
                return np.split(x, len(node.outputs), values["axis"])
            case "Reshape":
                return [x.reshape([size or 0 for size in net.values[node.outputs[0]].shape or ()])]
            case "Transpose":
                return [x.transpose(values["perm"])]
            case "Gather":
                return [np.take(x, values["index"], values["axis"])]
            case "Concat":
                return [np.concatenate([array for array in arrays if array is not None], values["axis"])]
        raise ValueError(node.op.name)

    return run


def rows(survey: Survey) -> list[tuple[str, str, bool]]:
    return [(item.key, item.kind, item.maximal) for item in survey.items if isinstance(item, Region)]


def exits(graph: Graph) -> list[tuple[str, str]]:
    found = flow(graph, ONNX_RULES)
    return [(found.root[name], name) for name in found.exits(graph)]


def region(survey: Survey, key: str) -> Region:
    (item,) = [item for item in survey.items if item.key == key]
    assert isinstance(item, Region)
    return item


def region_of(survey: Survey, index: int) -> Region:
    item = survey.items[index]
    assert isinstance(item, Region)
    return item
