"""The way back: from wanted values of what regions read to values of stored tensors.

A region reads constants: stored tensors as they are, rearranged or in part, or weights made from several stored
ones. Whoever changes a weight needs two things: what to store so that the region reads the wanted weight, and what
the region then reads once the stored values have been rounded to their own type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from spectool.errors import OperatorError
from spectool.graph.parts import Derived
from spectool.graph.types import Shape

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from spectool.graph.computed import Computed
    from spectool.graph.effective import Effective

    Load = Callable[[str], Tensor]
    Trace = Callable[[str], tuple[str, Shape, np.ndarray] | None]


class Writer(Protocol):
    """Turns wanted values of constants into values of stored tensors, and back."""

    def homes(self, name: str) -> tuple[str, ...] | None:
        """Return the stored tensors that change when the constant does; None if it cannot be changed."""
        ...

    def derived(self, name: str) -> Effective | None:
        """Return how the weight that a constant is, or is part of, is made; None if it is stored or not known."""
        ...

    def edits(self, updates: Mapping[str, Tensor], read: Load | None = None) -> dict[str, Tensor]:
        """Return new values of stored tensors that make constants the wanted ones; not yet in the stored type.

        Args:
            updates: Constant as regions read it → wanted value.
            read: Reads a stored tensor by its key, where parts of one are written.

        Raises:
            OperatorError: If a constant cannot be written back.
        """
        ...

    def reload(self, stored: Mapping[str, Tensor]) -> Load:
        """Return the loader of constants as they are once ``stored`` tensors have these values."""
        ...

    def readings(self, stored: Mapping[str, Tensor]) -> tuple[Load, ...]:
        """Return ``reload``, and loaders of what else ``stored`` values may come to in another arithmetic.

        A weight made of several tensors is rounded on its way; what is to hold of it has to hold of all of these.
        """
        ...


@dataclass(frozen=True)
class TracedWriter:
    """The writer of a front-end that knows where the entries of a constant come from.

    Attributes:
        load: Reads a constant by name.
        plain: The key of the stored tensor that a constant is, as it is; else None.
        trace: For a constant made by moving the entries of one stored tensor: its key, shape, and flat indices.
        parts: Constants cut out of others.
        computed: Weights that the program makes of several stored tensors; None where none are recognised.
    """

    load: Load
    plain: Callable[[str], str | None]
    trace: Trace
    parts: Mapping[str, Derived]
    computed: Computed | None = None

    def homes(self, name: str) -> tuple[str, ...] | None:
        """Return the stored tensors behind a constant: one, or those of a known parametrisation."""
        derived = self.derived(name)
        if derived is not None:
            return derived.sources
        name = self._whole(name)
        key = self.plain(name)
        if key is not None:
            return (key,)
        found = self.trace(name)
        return None if found is None else (found[0],)

    def derived(self, name: str) -> Effective | None:
        """Return the parametrisation behind a constant."""
        if self.computed is None:
            return None
        found = self.computed.entries(self._whole(name))
        return None if found is None else self.computed.weight(found[0])

    def edits(self, updates: Mapping[str, Tensor], read: Load | None = None) -> dict[str, Tensor]:
        """Return stored tensors with the wanted entries; constants that share one are merged."""
        read = read or self.load
        made: dict[str, Tensor] = {}
        for name, value in updates.items():
            home = self._entries(name)
            if home is None:
                raise OperatorError(
                    f"{name} is computed from stored tensors in a way that cannot be undone",
                    hint="fold it into a plain weight first",
                )
            base, shape, indices = home
            if indices is None:
                made[base] = value.reshape(shape).clone()
                continue
            if base not in made:
                weight = self._weight(base)
                present = read(base) if weight is None else weight.build(read)
                made[base] = present.to(value.dtype).clone().contiguous()
            made[base].view(-1)[indices.reshape(-1)] = value.reshape(-1)
        stored: dict[str, Tensor] = {}
        for base, value in made.items():
            weight = self._weight(base)
            if weight is None or weight.invert is None:
                stored[base] = value
            else:
                stored.update(weight.invert(value, read))
        return stored

    def reload(self, stored: Mapping[str, Tensor]) -> Load:
        """Return the loader in which constants that live in ``stored`` tensors have the new values."""
        return self._loader(stored, exact=False)

    def readings(self, stored: Mapping[str, Tensor]) -> tuple[Load, ...]:
        """Return ``reload`` and, where ``stored`` tensors are those of a parametrisation, its formula in float64."""
        found = self.computed.found.values() if self.computed is not None else ()
        if not any(weight is not None and not stored.keys().isdisjoint(weight.sources) for weight in found):
            return (self.reload(stored),)
        return self.reload(stored), self._loader(stored, exact=True)

    def _loader(self, stored: Mapping[str, Tensor], *, exact: bool) -> Load:
        def tensor(key: str) -> Tensor:
            return stored[key] if key in stored else self.load(key)

        def read(name: str) -> Tensor:
            home = self._entries(name)
            if home is None:
                return self.load(name)
            base, shape, indices = home
            weight = self._weight(base)
            if not any(key in stored for key in ((base,) if weight is None else weight.sources)):
                return self.load(name)
            if weight is None or self.computed is None:
                value = stored[base]
            else:
                value = weight.build(tensor) if exact else self.computed.make(base, tensor)
            return value.reshape(shape) if indices is None else value.reshape(-1)[indices]

        return read

    def _weight(self, base: str) -> Effective | None:
        """Return how a base is made; None for a stored tensor."""
        return None if self.computed is None else self.computed.found.get(base)

    def _whole(self, name: str) -> str:
        while name in self.parts:
            name = self.parts[name].source
        return name

    def _entries(self, name: str) -> tuple[str, Shape, Tensor | None] | None:
        """Return (base, shape of the constant, flat indices into the base, None for all in order).

        The base is a stored tensor, by its key, or a constant that a known parametrisation makes.
        """
        import torch

        part = self.parts.get(name)
        if part is None:
            plain = self.plain(name)
            if plain is not None:
                return plain, tuple(self.load(name).shape), None
            found = self.trace(name)
            if found is None and self.computed is not None:
                found = self.computed.entries(name)
            if found is None:
                return None
            places = torch.from_numpy(found[2])
            return found[0], tuple(places.shape), places
        whole = self._entries(part.source)
        if whole is None:
            return None
        key, shape, indices = whole
        if indices is None:
            count = 1
            for side in shape:
                count *= side
            indices = torch.arange(count).reshape(shape)
        taken = part.cut(indices)
        return key, tuple(taken.shape), taken
