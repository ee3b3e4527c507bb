"""What a pickle turns into when nothing in it is imported or called: plain values and these placeholders."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

#: Texts of values for messages: data from a file can be shared so often that ``repr`` would never end.
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxother = 60


def brief(value: Any) -> str:
    """Return a short text for any value out of a pickle."""
    return _BRIEF.repr(value)


@dataclass(frozen=True, slots=True)
class Reference:
    """A class, function or constant that the pickle names; never looked up.

    Attributes:
        name: Dotted name, e.g. ``torch.nn.modules.conv.Conv2d``.
    """

    name: str


#: Builders of ``torch.fx`` modules; they get the module's ``__dict__`` as first argument.
_GRAPH_MODULES = (
    "torch.fx.graph_module.reduce_graph_module",
    "torch.fx.graph_module.reduce_deploy_graph_module",
)


_NO_ATTRIBUTES: dict[str, Any] = {}


@dataclass(eq=False, repr=False, slots=True)
class Foreign:
    """An object that the pickle would have built by running foreign code.

    Attributes:
        cls: Dotted name of its class, or of the function that would have made it.
        args: What that would have been called with.
        state: What ``__setstate__`` would have got.
        entries: Items that would have been set (subclasses of dict); None if there were none.
        elements: Items that would have been appended or added (subclasses of list, sets); None if there were none.
    """

    cls: str
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] | None = None
    elements: list[Any] | None = None
    _attributes: dict[str, Any] | None = None

    def __repr__(self) -> str:
        # What it holds may hold itself, or more than could ever be written.
        return f"<{self.cls[:60]}>"

    def attributes(self) -> dict[str, Any]:
        """Return its state as attribute name → value, slots included; empty if the state is no dict.

        To be called when the pickle has been read: the answer is kept, because one object may stand in many places.
        """
        if self._attributes is None:
            self._attributes = self._named_state()
        return self._attributes

    def _named_state(self) -> dict[str, Any]:
        if self.cls in _GRAPH_MODULES and self.args and isinstance(self.args[0], dict):
            return self.args[0]
        if self.state is None:
            return _NO_ATTRIBUTES
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            return {}
        return {str(name): value for part in parts if part for name, value in part.items()}


@dataclass(frozen=True, slots=True)
class Storage:
    """Where a run of elements lies.

    Attributes:
        dtype: Element type it was pickled with.
        key: Its name in the container.
        numel: Number of elements.
        first: Elements of the named storage before it (legacy storage views).
    """

    dtype: str
    key: str
    numel: int
    first: int = 0


#: Entries of a tuple that is used as a dict key, all levels together.
_LARGEST_KEY = 256
#: More axes than torch itself can save.
MOST_AXES = 64


@dataclass(eq=False, slots=True)
class Tensor:
    """A tensor that the pickle would have built.

    Attributes:
        dtype: Element type; empty if unknown.
        shape: Shape.
        stride: Stride in elements.
        storage: Storage it views; bytes if they stand in the pickle itself; None if it has no values to read.
        offset: Elements of the storage before its first one.
        problem: Why its values cannot be read; empty if they can.
        shell: Whether its contents are still to come by a BUILD opcode (numpy arrays, very old parameters).
        quantization: Scheme, scale, zero point and axis of a quantised tensor.
        byteorder: Of bytes in the pickle itself.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    storage: Storage | bytes | None = None
    offset: int = 0
    problem: str = ""
    shell: bool = False
    quantization: dict[str, Any] | None = None
    byteorder: str = "little"

    def fill(self, other: Tensor) -> None:
        """Become what ``other`` is."""
        for name in self.__slots__:
            setattr(self, name, getattr(other, name))


class BadCall(Exception):
    """A known function has arguments or a state it cannot have; the reader turns it into ``CorruptFile``."""


def integers(values: Any) -> tuple[int, ...]:
    """Return a pickled shape or stride.

    Raises:
        ValueError: If it is not made of small non-negative integers.
    """
    if not isinstance(values, tuple | list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise ValueError("a shape, stride or offset is not made of small non-negative integers")
    if len(values) > MOST_AXES:
        # Their product alone would be a number of megabytes.
        raise ValueError(f"an impossible shape of {len(values)} axes")
    return tuple(values)


def set_items(target: Any, items: list[Any]) -> None:
    """Set ``[key, value, key, value…]`` in a dict or in a placeholder.

    Raises:
        TypeError: If the target or a key cannot be used so.
        ValueError: If a key is too costly to hash.
    """
    if isinstance(target, Foreign) and target.entries is None:
        target.entries = {}
    entries = target.entries if isinstance(target, Foreign) else target
    if not isinstance(entries, dict) or len(items) % 2:
        raise TypeError(f"items are set in a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            _check_key(key)
        entries[key] = value


def append_items(target: Any, items: list[Any]) -> None:
    """Append ``items`` to a list or to a placeholder.

    Raises:
        TypeError: If the target cannot be appended to.
    """
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Foreign):
        if target.elements is None:
            target.elements = []
        target.elements.extend(items)
    else:
        raise TypeError(f"items are appended to a {type(target).__name__}")


def _check_key(key: Any) -> None:
    """Refuse keys that are costly to hash: deep or shared tuples, and integers that collide on purpose."""
    pending = [key]
    seen = 0
    while pending:
        item = pending.pop()
        seen += 1
        if isinstance(item, tuple):
            pending.extend(item)
        elif isinstance(item, int):
            if not -(2**63) <= item < 2**63:
                raise ValueError("a key is an integer of more than 64 bits")
        elif not (item is None or isinstance(item, float | str | bytes | Reference | Foreign)):
            raise TypeError(f"a key is a {type(item).__name__}")
        if seen > _LARGEST_KEY:
            raise ValueError("a key is a very large tuple")


def is_module(value: object) -> bool:
    """Tell whether a placeholder is a pickled ``nn.Module``: it has dicts of parameters and submodules."""
    if not isinstance(value, Foreign):
        return False
    state = value.attributes()
    return isinstance(state.get("_parameters"), dict) and isinstance(state.get("_modules"), dict)
