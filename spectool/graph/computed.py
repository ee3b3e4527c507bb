"""Weights that a program computes from stored tensors, recognised by what they are made of and by their values.

A program has no name for weight norm or spectral norm, only the arithmetic that they come to, and that differs from
one version of torch to the next. So a constant made of the right stored tensors is taken for one only if the program
gives the same weight as the formula, for the stored values and for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spectool.errors import SpectoolError
from spectool.graph.reparametrised import find_reparametrised
from spectool.graph.types import Shape

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from spectool.graph.effective import Effective, Read

    Entries = tuple[str, Shape, np.ndarray]

_EQUAL = {"float64": 1e-10, "float32": 1e-5}
"""Relative difference up to which two computations of a weight are one, by the type of the program's."""
_ROUGH = 0.03
_CANCELLED = 100.0
"""How much more may be lost with the stored values, whose sums cancel."""


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class _Stored:
    shape: Shape


@dataclass(frozen=True)
class Computed:
    """The constants of a program that known parametrisations make.

    Attributes:
        origins: Constant → checkpoint keys it is made of; single numbers may be left out.
        shapes: Constant or checkpoint key → shape.
        make: Computes a constant as the program does, from stored tensors that a function reads by key.
        read: Reads a stored tensor by key.
        move: For a constant made by moving the entries of another, the first of which a test holds: that one's
            name, shape and flat indices.
        numbers: Constant → keys of the stored single numbers it is made of: a length for a whole weight, or for its
            only row; and whatever else a program computes with.
        found: What was recognised so far.
    """

    origins: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, Shape]
    make: Callable[[str, Read], Tensor]
    read: Read
    move: Callable[[str, Callable[[str], bool]], Entries | None]
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    found: dict[str, Effective | None] = field(default_factory=dict)
    moved: dict[str, Entries | None] = field(default_factory=dict)

    def weight(self, name: str) -> Effective | None:
        """Return how a constant is made, if by a parametrisation that is known."""
        if name not in self.found:
            self.found[name] = next((made for made in self._candidates(name) if self._is(name, made)), None)
        return self.found[name]

    def entries(self, name: str) -> Entries | None:
        """Return the parametrised constant whose entries a constant consists of, its shape, and the indices."""
        if name not in self.moved:
            known = len(self._sources(name)) > 1
            self.moved[name] = self.move(name, lambda one: self.weight(one) is not None) if known else None
        return self.moved[name]

    def _sources(self, name: str) -> tuple[str, ...]:
        """Return all keys that a constant is made of."""
        return tuple(dict.fromkeys((*self.origins.get(name, ()), *self.numbers.get(name, ()))))

    def _candidates(self, name: str) -> Iterator[Effective]:
        sources = self._sources(name)
        needed = set(self.origins.get(name, ()))
        if len(sources) < 2 or not all(key in self.shapes for key in sources):
            return
        stored = {key: _Stored(self.shapes[key]) for key in sources}
        for axis in (0, 1):
            for entry in find_reparametrised(stored, stored, axis=axis):
                made = entry.weight
                if made is None or made.invert is None or not needed <= set(made.sources):
                    continue
                if made.shape == self.shapes.get(name):
                    yield made

    def _is(self, name: str, made: Effective) -> bool:
        """Whether the program computes what the formula says, for the stored values and for positive ones."""
        import torch

        source = torch.Generator().manual_seed(0)
        other = {
            key: torch.rand(self.shapes[key], generator=source, dtype=torch.float64) + 0.5
            for key in made.sources
        }
        for values, more in (({}, _CANCELLED), (other, 1.0)):

            def read(key: str, values: Mapping[str, Tensor] = values) -> Tensor:
                # In float64: in a half type the sums of stored values may cancel to nothing.
                return values[key] if key in values else _wide(self.read(key))

            try:
                program, formula = self.make(name, read), made.build(read)
            except (SpectoolError, RuntimeError, TypeError, ValueError, KeyError):
                return False
            allowed = min(_ROUGH, more * _EQUAL.get(str(program.dtype).removeprefix("torch."), _ROUGH))
            size = float(formula.abs().max())
            if not float((program.double() - formula).abs().max()) <= allowed * size:
                return False
        return True
