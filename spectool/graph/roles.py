"""What one node of an affine region is: its role, its kind, its weights, its name in a row key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from spectool.graph.affine import Flow
from spectool.graph.parts import Derived
from spectool.graph.rules import Role, Rule
from spectool.graph.types import (
    BatchNorm,
    Call,
    Conv,
    Embedding,
    Graph,
    Linear,
    Node,
    Region,
    Shape,
    Skipped,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from spectool.graph.computed import Computed

    Mover = Callable[[Node, Sequence[np.ndarray | None]], Sequence[np.ndarray]]
    Provenance = Callable[[str], tuple[str, Shape, np.ndarray] | None]

Word = Role | str
OPERATOR = "operator"
BATCHNORM = "batchnorm"
FREE = ("neutral", "move")
"""Roles that change no singular value."""


@dataclass(frozen=True)
class Known:
    """What a front-end knows beyond its graph.

    Attributes:
        load: Reads a constant by name.
        rules: Operation name → rule.
        labels: Constant name → row key, where it is not the first of the constant's origins.
        assumed: Constant name → what had to be assumed to have it.
        extras: Node name → rows that the front-end made itself (gates of recurrent layers, explained skips).
        move: Runs a ``select`` or ``move`` node on an integer array; None for its constant inputs.
        provenance: For a constant made from one stored tensor by moving entries: that tensor's name and shape, and
            the flat index of each entry; None for any other.
        parts: Constants that the front-end itself cut out of others; ``load`` knows them.
        plain: For a constant that is a stored tensor as it is: that tensor's name; None for any other.
        computed: Weights that the program makes of several stored tensors; None where none are looked for.
    """

    load: Callable[[str], torch.Tensor]
    rules: Mapping[str, Rule]
    labels: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extras: Mapping[str, tuple[Region | Skipped, ...]] = field(default_factory=dict)
    move: Mover | None = None
    provenance: Provenance | None = None
    parts: Mapping[str, Derived] = field(default_factory=dict)
    plain: Callable[[str], str | None] | None = None
    computed: Computed | None = None


@dataclass(frozen=True)
class Context:
    """One graph under analysis.

    Attributes:
        graph: The graph.
        flow: Its dataflow.
        known: What the front-end knows.
        parts: Constants cut out of others, by name; grows while rows are made.
        roles: Roles found so far, with the nodes they are of.
    """

    graph: Graph
    flow: Flow
    known: Known
    parts: dict[str, Derived] = field(default_factory=dict)
    roles: dict[int, tuple[Node, Word]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return the shape of a value, None where nothing is known."""
        value = self.graph.values.get(name)
        return None if value is None else value.shape

    def constant_shape(self, name: str) -> Shape:
        """Return the shape of a constant, stored or cut out."""
        return self.parts[name].shape if name in self.parts else self.graph.constants[name]

    def flowing(self, node: Node) -> list[str]:
        """Return the values that a node reads, constants left out."""
        return [name for name in node.inputs if name and not self.is_constant(name)]

    def is_constant(self, name: str) -> bool:
        """Return whether ``name`` is a constant."""
        return name in self.graph.constants or name in self.parts

    def role(self, node: Node) -> Word:
        """Return the role of an affine node: ``operator``, ``batchnorm`` or a ``Role``."""
        found = self.roles.get(id(node))
        if found is None:
            # The node is kept with its role, so that its id stays its own.
            found = self.roles[id(node)] = (node, self._role(node))
        return found[1]

    def _role(self, node: Node) -> Word:
        if isinstance(node.op, (Conv, Linear, Embedding)):
            return OPERATOR
        if isinstance(node.op, BatchNorm):
            return BATCHNORM
        if not isinstance(node.op, Call) or node.op.name not in self.known.rules:
            return "mix"
        rule = self.known.rules[node.op.name]
        if rule.operator and self.matrix(node):
            return OPERATOR
        flowing = self.flowing(node)
        if len(flowing) == 1:
            if rule.alone is not None:
                return rule.alone
            if rule.same is not None and self._keeps_shape(node, flowing[0]):
                return rule.same
        return "mix" if rule.spatial and not self._pools_positions(node, flowing) else rule.role

    def _keeps_shape(self, node: Node, name: str) -> bool:
        """Return whether the output has the shape of the one value that flows, open sizes included."""
        before, after = self.shape(name), self.shape(node.outputs[0])
        if before is None or before != after:
            return False
        if None not in before:
            return True
        # An open size stays what it is if no constant has one of its own there.
        for other in node.inputs:
            if other and self.is_constant(other):
                sizes = self.constant_shape(other)
                pairs = zip(reversed(sizes), reversed(before), strict=False)
                if any(size not in (1, own) for size, own in pairs):
                    return False
        return True

    def _pools_positions(self, node: Node, flowing: Sequence[str]) -> bool:
        """Return whether a mean is taken over spatial axes and no others (a mean over channels is no pool)."""
        before, after = self.shape(next(iter(flowing), "")), self.shape(node.outputs[0])
        if before is None or after is None or len(before) < 4 or before[:2] != after[:2]:
            return False
        return all(size == 1 for size in after[2:]) and len(after) in (2, len(before))

    def matrix(self, node: Node) -> str:
        """Return the name of a node's matrix weight or kernel; empty if it has none."""
        if isinstance(node.op, (Conv, Linear, Embedding)):
            return node.inputs[1]
        if isinstance(node.op, Call) and node.op.name in self.known.rules:
            if not self.known.rules[node.op.name].operator:
                return ""
            for name in node.inputs:
                if name and self.is_constant(name) and len(self.constant_shape(name)) >= 2:
                    return name
        return ""

    def kind(self, node: Node) -> str:
        """Return the kind of row a node makes on its own; empty if it names none."""
        match node.op:
            case Conv(geometry=geometry):
                return f"{'conv_transpose' if geometry.transposed else 'conv'}{geometry.dims}d"
            case Linear():
                return "linear"
            case Embedding():
                return "embedding"
            case BatchNorm():
                return BATCHNORM
        role = self.role(node)
        if role == OPERATOR and isinstance(node.op, Call):
            return self.known.rules[node.op.name].operator
        return role if role in ("avgpool", "upsample", "pad", "scale") else ""

    def parameters(self, node: Node) -> tuple[str, ...]:
        """Return the constants of the linear part of a node, its matrix or scale first."""
        if isinstance(node.op, BatchNorm):
            return tuple(name for name in (node.inputs[1], node.inputs[4]) if name)
        matrix = self.matrix(node)
        if matrix:
            return (matrix,)
        if self.role(node) == "scale":
            # A single number is an attribute of the operation rather than a parameter of the network.
            return tuple(
                name
                for name in node.inputs
                if name and self.is_constant(name) and prod(self.constant_shape(name)) > 1
            )
        return ()

    def name(self, constant: str) -> str:
        """Return what a constant is called in a row key: its label, or, for some of its channels, the part's."""
        part = self.parts.get(constant)
        return constant if part is not None and part.blocks else self.label(constant)

    def label(self, constant: str) -> str:
        """Return what a constant is called in a row key."""
        if constant in self.known.labels:
            return self.known.labels[constant]
        if constant in self.parts:
            return self.label(self.parts[constant].source)
        return next(iter(self.origins(constant)), constant)

    def origins(self, constant: str) -> tuple[str, ...]:
        """Return the stored tensors that a constant was made from."""
        if constant in self.parts:
            return self.origins(self.parts[constant].source)
        return self.graph.origins.get(constant, (constant,))

    def stored(self, constants: Sequence[str]) -> tuple[tuple[str, ...], tuple[Shape, ...]]:
        """Return the names and shapes of the stored tensors behind some constants, each once."""
        names = dict.fromkeys(origin for constant in constants for origin in self.origins(constant))
        return tuple(names), tuple(self.graph.constants.get(name, ()) for name in names)

    def assumptions(self, constants: Sequence[str]) -> tuple[str, ...]:
        """Return what had to be assumed to have some constants, each once."""
        found: dict[str, None] = {}
        for name in constants:
            source = name
            while source in self.parts:
                source = self.parts[source].source
            found.update(dict.fromkeys(self.known.assumed.get(source, ())))
        return tuple(found)
