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

    Load = Callable[[str], Tensor]
    Trace = Callable[[str], tuple[str, Shape, np.ndarray] | None]


class Writer(Protocol):
    """Turns wanted values of constants into values of stored tensors, and back."""

    def homes(self, name: str) -> tuple[str, ...] | None:
        """Return the stored tensors that change when the constant does; None if it cannot be changed."""
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


@dataclass(frozen=True)
class TracedWriter:
    """The writer of a front-end that knows where the entries of a constant come from.

    Attributes:
        load: Reads a constant by name.
        plain: The key of the stored tensor that a constant is, as it is; else None.
        trace: For a constant made by moving the entries of one stored tensor: its key, shape, and flat indices.
        parts: Constants cut out of others.
    """

    load: Load
    plain: Callable[[str], str | None]
    trace: Trace
    parts: Mapping[str, Derived]

    def homes(self, name: str) -> tuple[str, ...] | None:
        """Return the stored tensor behind a constant, if there is exactly one."""
        name = self._whole(name)
        key = self.plain(name)
        if key is not None:
            return (key,)
        found = self.trace(name)
        return None if found is None else (found[0],)

    def edits(self, updates: Mapping[str, Tensor], read: Load | None = None) -> dict[str, Tensor]:
        """Return stored tensors with the wanted entries; constants that share one are merged."""
        made: dict[str, Tensor] = {}
        for name, value in updates.items():
            home = self._entries(name)
            if home is None:
                raise OperatorError(
                    f"{name} is computed from stored tensors in a way that cannot be undone",
                    hint="fold it into a plain weight first",
                )
            key, shape, indices = home
            if indices is None:
                made[key] = value.reshape(shape).clone()
                continue
            if key not in made:
                made[key] = (read or self.load)(key).to(value.dtype).clone().contiguous()
            made[key].view(-1)[indices.reshape(-1)] = value.reshape(-1)
        return made

    def reload(self, stored: Mapping[str, Tensor]) -> Load:
        """Return the loader in which constants that live in ``stored`` tensors have the new values."""

        def read(name: str) -> Tensor:
            home = self._entries(name)
            if home is None or home[0] not in stored:
                return self.load(name)
            key, shape, indices = home
            return stored[key].reshape(shape) if indices is None else stored[key].reshape(-1)[indices]

        return read

    def _whole(self, name: str) -> str:
        while name in self.parts:
            name = self.parts[name].source
        return name

    def _entries(self, name: str) -> tuple[str, Shape, Tensor | None] | None:
        """Return (key, shape of the constant, flat indices into the stored tensor, None for all in order)."""
        import torch

        part = self.parts.get(name)
        if part is None:
            plain = self.plain(name)
            if plain is not None:
                return plain, tuple(self.load(name).shape), None
            found = self.trace(name)
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
