"""A pickled module at its place in the tree, and what it turns out to be in a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectool.checkpoint.types import InertModule
from spectool.errors import UsageError
from spectool.graph.aten import Slot
from spectool.graph.effective import Weights
from spectool.graph.rows import Step
from spectool.graph.types import Call, Region, Shape, Skipped


@dataclass(frozen=True)
class Layer:
    """One module as a link of a chain.

    Attributes:
        known: Whether its class is one that this module knows.
        step: What it does if it is affine in its input; None for a neutral link (dropout) or a boundary.
        neutral: Whether it passes its input on unchanged in evaluation mode.
        out_shape: Output without the batch axis; None if unknown.
        rows: Rows that are no step: gates, norms, what cannot be analysed.
        claimed: Stored tensors that are thereby explained.
    """

    known: bool = True
    step: Step | None = None
    neutral: bool = False
    out_shape: Shape | None = None
    rows: tuple[Region | Skipped, ...] = ()
    claimed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Module:
    """A module at its place.

    Attributes:
        tree: Its class, attributes and parameters.
        path: Dotted path from the root; also the prefix of its checkpoint keys.
        weights: The weights of the file.
        shape: Its input without the batch axis; None if unknown.
    """

    tree: InertModule
    path: str
    weights: Weights
    shape: Shape | None = None

    @property
    def cls(self) -> str:
        """Name of its class if it is one of torch's own, else empty."""
        name = self.tree.cls.rpartition(".")[2] if self.tree.cls.startswith("torch.nn.") else ""
        return name.removeprefix("Parametrized")

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.tree.attributes.get(name, default)

    def name(self, local: str) -> str:
        """Return the name of a parameter, stored or effective; empty if there is none."""
        stored = self.tree.parameters.get(local)
        if stored is not None:
            return stored
        effective = f"{self.path}.{local}" if self.path else local
        return effective if self.weights.derived(effective) is not None else ""

    def sizes(self, name: str, dims: int, default: int = 0) -> tuple[int, ...]:
        """Return an attribute that is a number or one per axis."""
        return per_axis(self.get(name, default), dims)


def per_axis(value: Any, dims: int) -> tuple[int, ...]:
    """Return ``value`` as one integer per axis.

    Raises:
        ValueError: If it has another number of entries.
    """
    if isinstance(value, (int, float)):
        return (int(value),) * dims
    entries = tuple(int(entry) for entry in value)
    entries = entries * dims if len(entries) == 1 else entries
    if len(entries) != dims:
        raise ValueError(f"{len(entries)} sizes for {dims} axes")
    return entries


def call(module: Module, name: str, arguments: list[Any], out: Shape, kind: str) -> Layer:
    """Return an affine operation without parameters.

    Args:
        module: The module.
        name: Full name of the ATen operation that it runs.
        arguments: What the operation takes besides its input.
        out: Output without the batch axis.
        kind: Word of the vocabulary; empty for a rearrangement.
    """
    op = Call(name, {"args": (Slot(0), *arguments), "kwargs": {}})
    label = f"{kind}:{module.path}" if kind else ""
    step = Step(ops=((op, ()),), label=label, kind=kind, in_shape=module.shape, out_shape=out)
    return Layer(step=step, out_shape=out)


def claim(module: Module) -> tuple[str, ...]:
    """Return the stored tensors that belong to a module itself."""
    names = {name for name in module.tree.parameters.values() if name in module.weights}
    for local in ("weight", "bias"):
        name = module.name(local)
        if name:
            names.update(module.weights.sources(name))
    return tuple(names)


def expect(module: Module, fits: bool, wanted: str) -> None:
    """Raise if a module's input does not fit.

    Raises:
        UsageError: If ``fits`` is false.
    """
    if not fits:
        raise UsageError(
            f"{module.path or 'the first module'} ({module.cls}) takes {wanted}, its input has shape {module.shape}",
            hint="give --input as batch x channels x height x width, e.g. 1x3x224x224",
        )
