"""What a pickle turns into when nothing in it is imported or called: plain values and these placeholders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
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


@dataclass(eq=False)
class Foreign:
    """An object that the pickle would have built by running foreign code.

    Attributes:
        cls: Dotted name of its class, or of the function that would have made it.
        args: What that would have been called with.
        state: What ``__setstate__`` would have got.
        entries: Items that would have been set (subclasses of dict).
        elements: Items that would have been appended or added (subclasses of list, sets).
    """

    cls: str
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def attributes(self) -> dict[str, Any]:
        """Return its state as attribute name → value, slots included; empty if the state is no dict."""
        if self.cls in _GRAPH_MODULES and self.args and isinstance(self.args[0], dict):
            return self.args[0]
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            return {}
        return {str(name): value for part in parts if part for name, value in part.items()}


@dataclass(frozen=True)
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


@dataclass(eq=False)
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


class BadCall(Exception):
    """A known function has arguments or a state it cannot have; the reader turns it into ``CorruptFile``."""


def integers(values: Any) -> tuple[int, ...]:
    """Return a pickled shape or stride.

    Raises:
        ValueError: If it is not made of small non-negative integers.
    """
    if not isinstance(values, tuple | list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise ValueError("a shape, stride or offset is not made of small non-negative integers")
    return tuple(values)


def set_items(target: Any, items: list[Any]) -> None:
    """Set ``[key, value, key, value…]`` in a dict or in a placeholder.

    Raises:
        TypeError: If the target or a key cannot be used so.
        ValueError: If a key is too costly to hash.
    """
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
