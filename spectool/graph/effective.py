"""Weights as operators see them: stored tensors, and tensors made from stored ones.

A weight-normalised layer stores a direction and a length, a quantised one packed integers and scales, an
adapter two thin factors. Spectra are those of the *effective* weight. This module holds the table of both kinds
and reads them when asked; the finders in ``reparametrised``, ``quantised`` and ``lora`` say how one follows from
the other. Nothing here imports torch before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spectool.errors import OperatorError
from spectool.graph.types import Region, Shape, Skipped

if TYPE_CHECKING:
    from torch import Tensor

    from spectool.checkpoint.types import Checkpoint, TensorRef

Read = Callable[[str], "Tensor"]
"""Reads one tensor by name, on the CPU."""


@dataclass(frozen=True)
class Effective:
    """A weight that is not stored but follows from stored tensors.

    Attributes:
        name: The parameter's would-be checkpoint key, e.g. ``conv.weight``.
        shape: Shape of the weight.
        sources: Stored tensors of the linear part, in the order of use.
        build: Makes the weight from a function that reads stored tensors, in a type that rounds nothing beyond
            float64: an interval of width 1e-11 around σ must hold the true one.
        how: How it is made, in words; becomes the row's note.
        assumed: What had to be assumed, in words.
        invert: Gives new values of stored tensors that make the weight a wanted one; None where there are
            none or where that is not supported.
        build_one: Makes one matrix of a stack without making the others; None takes it from the whole.
        compute: Makes the weight in the stored type, as torch's own module does; None where ``build`` is exact.
        training: What a forward in training mode makes of an edit, in words; empty where the edit stays.
    """

    name: str
    shape: Shape
    sources: tuple[str, ...]
    build: Callable[[Read], Tensor]
    how: str
    assumed: tuple[str, ...] = ()
    invert: Callable[[Tensor, Read], dict[str, Tensor]] | None = None
    build_one: Callable[[Read, int], Tensor] | None = None
    compute: Callable[[Read], Tensor] | None = None
    training: str = ""


@dataclass(frozen=True)
class Found:
    """What a finder recognised in a file.

    Attributes:
        used: Stored tensors that are thereby explained and need no rule of their own.
        weight: An effective weight, to be classified by its name and shape as if it were stored.
        item: A finished row, where name and shape would not tell.
        constants: Derived constants that ``item`` reads.
    """

    used: tuple[str, ...]
    weight: Effective | None = None
    item: Region | Skipped | None = None
    constants: tuple[Effective, ...] = ()


@dataclass(frozen=True)
class Part:
    """A slice of a weight along one axis; ``drop`` removes that axis (one matrix of a stack)."""

    name: str
    parent: str
    axis: int
    start: int
    stop: int
    drop: bool = False


class Weights:
    """The weights of a file by name, stored or derived; calling it reads one.

    Args:
        checkpoint: Where stored tensors are.
        found: What the finders recognised.
    """

    def __init__(self, checkpoint: Checkpoint, found: Iterable[Found] = ()) -> None:
        self._checkpoint = checkpoint
        self._derived: dict[str, Effective] = {}
        self._parts: dict[str, Part] = {}
        # Gates and experts are read one by one from the same tensors: keep the last two, and only those.
        self._kept: dict[str, Tensor] = {}
        for entry in found:
            for weight in (entry.weight, *entry.constants):
                if weight is not None:
                    self._derived[weight.name] = weight

    def __contains__(self, name: str) -> bool:
        return name in self._derived or name in self._parts or name in self._checkpoint.tensors

    def __call__(self, name: str) -> Tensor:
        """Read a weight on the CPU: stored ones in their stored type, derived ones exactly or in float64.

        Raises:
            KeyError: If there is no such weight.
            CorruptFile: If the bytes of a stored tensor are not all there.
        """
        if name in self._parts:
            return self._cut(self._parts[name])
        if name in self._derived:
            return self._derived[name].build(self._checkpoint.read)
        return self._checkpoint.read(name)

    def _cut(self, part: Part) -> Tensor:
        derived = self._derived.get(part.parent)
        if part.drop and derived is not None and derived.build_one is not None:
            return derived.build_one(self._keep, part.start)
        whole = self._keep(part.parent)
        if part.drop:
            return whole.select(part.axis, part.start).clone()
        return whole.narrow(part.axis, part.start, part.stop - part.start).clone()

    def _keep(self, name: str) -> Tensor:
        if name not in self._kept:
            if len(self._kept) >= 2:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = self(name)
        return self._kept[name]

    def shape(self, name: str) -> Shape:
        """Return the shape of a stored weight, a derived one, or a part."""
        if name in self._parts:
            part = self._parts[name]
            whole = self.shape(part.parent)
            cut = () if part.drop else (part.stop - part.start,)
            return (*whole[: part.axis], *cut, *whole[part.axis + 1 :])
        derived = self._derived.get(name)
        return derived.shape if derived else self._checkpoint.tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return the short name of the element type; derived weights are ``float64``."""
        return "float64" if name in self._derived else self._checkpoint.tensors[name].dtype

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors that a weight is made of (itself, if stored)."""
        if name in self._parts:
            return self.sources(self._parts[name].parent)
        return self._derived[name].sources if name in self._derived else (name,)

    def source_shapes(self, name: str) -> tuple[Shape, ...]:
        """Return shapes parallel to ``sources``: as stored, but a part of one stored tensor has its own."""
        if name not in self._derived and not (
            name in self._parts and self._parts[name].parent in self._derived
        ):
            return (self.shape(name),)
        return tuple(self._checkpoint.tensors[source].shape for source in self.sources(name))

    def derived(self, name: str) -> Effective | None:
        """Return how a weight (or the whole that it is a part of) is made, or None if it is stored."""
        return self._derived.get(self._parts[name].parent if name in self._parts else name)

    def part(self, parent: str, start: int, stop: int | None = None, *, axis: int = 0) -> str:
        """Name a part of a weight and make it readable.

        Args:
            parent: The whole weight.
            start: First index along ``axis``.
            stop: End of the range; None takes index ``start`` alone and drops the axis.
            axis: Axis that is cut: 0 or 1.

        Returns:
            ``parent[start:stop]``, ``parent[:,start:stop]`` or ``parent[start]``.
        """
        index = str(start) if stop is None else f"{start}:{stop}"
        name = f"{parent}[{','.join([':'] * axis + [index])}]"
        self._parts[name] = Part(name, parent, axis, start, start + 1 if stop is None else stop, stop is None)
        return name

    def add(self, weight: Effective) -> str:
        """Make a derived weight readable and return its name."""
        self._derived[weight.name] = weight
        return weight.name

    def move_channels_first(self, name: str) -> None:
        """Read a kernel stored (*k, in, out) as (out, in, *k) from now on, under its own name."""
        stored = self.shape(name)
        rank = len(stored)
        order = (rank - 1, rank - 2, *range(rank - 2))
        back = (*range(2, rank), 1, 0)

        def build(read: Read) -> Tensor:
            return read(name).permute(order).contiguous()

        def invert(wanted: Tensor, read: Read) -> dict[str, Tensor]:
            return {name: wanted.permute(back).contiguous()}

        if name not in self._derived:
            shape = tuple(stored[axis] for axis in order)
            self.add(Effective(name, shape, (name,), build, "axes moved to (out, in, …)", invert=invert))

    def homes(self, name: str) -> tuple[str, ...] | None:
        """Return the stored tensors that change when a weight does; None if it cannot be written back."""
        derived = self.derived(name)
        if derived is not None and derived.invert is None:
            return None
        return self.sources(name)

    def reload(self, stored: Mapping[str, Tensor]) -> Weights:
        """Return the same weights, made from ``stored`` values where those are given."""

        def read(ref: TensorRef) -> Tensor:
            name = self._checkpoint.aliases.get(ref.name, ref.name)
            for known in (ref.name, name):
                if known in stored:
                    return stored[known]
            return self._checkpoint.read(ref.name)

        other = Weights(replace(self._checkpoint, reader=read))
        other._derived, other._parts = self._derived, self._parts
        return other

    def readings(self, stored: Mapping[str, Tensor]) -> tuple[Weights, ...]:
        """Return ``reload``, and where ``stored`` makes derived weights, also those in torch's own arithmetic."""
        exact = self.reload(stored)
        made = self._derived.values()
        if not any(weight.compute and not stored.keys().isdisjoint(weight.sources) for weight in made):
            return (exact,)
        rounded = self.reload(stored)
        rounded._derived = {
            name: replace(weight, build=weight.compute or weight.build)
            for name, weight in self._derived.items()
        }
        return exact, rounded

    def edits(self, updates: Mapping[str, Tensor], read: Read | None = None) -> dict[str, Tensor]:
        """Return new values of stored tensors that make weights the wanted ones.

        Parts of one tensor are gathered into one edit. Values are not cast: the writer knows the stored type.

        Args:
            updates: Name of a weight, as regions read it → its wanted value.
            read: Reads a stored tensor by its key, where not all of it is new; by default from the file.

        Returns:
            Stored tensor name → new value.

        Raises:
            OperatorError: If a weight cannot be written back (quantised, adapters).
        """
        read = read or self._checkpoint.read
        whole: dict[str, Tensor] = {}
        for name, value in updates.items():
            part = self._parts.get(name)
            if part is None:
                whole[name] = value
                continue
            if part.parent not in whole:
                parent = self._derived.get(part.parent)
                present = read(part.parent) if parent is None else parent.build(read)
                whole[part.parent] = present.to(value.dtype).clone()
            target = whole[part.parent].narrow(part.axis, part.start, part.stop - part.start)
            target.copy_(value.unsqueeze(part.axis) if part.drop else value)
        result: dict[str, Tensor] = {}
        for name, value in whole.items():
            derived = self._derived.get(name)
            if derived is None:
                result[name] = value
            elif derived.invert is None:
                raise OperatorError(
                    f"{name} cannot be written back: {derived.how}", hint="merge it into plain weights first"
                )
            else:
                result.update(derived.invert(value, read))
        return result


def is_floating(dtype: str) -> bool:
    """Return whether a short type name is one of real numbers, one to an element."""
    return dtype.startswith(("float", "bfloat")) and not dtype.startswith("float4")


def is_complex(dtype: str) -> bool:
    """Return whether a short type name is complex."""
    return dtype.startswith("complex")
