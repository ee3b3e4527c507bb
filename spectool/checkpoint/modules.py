"""From inert objects to named tensors and to a tree of modules whose classes were never imported."""

from __future__ import annotations

from typing import Any

from spectool.checkpoint.inert import Foreign, Reference, Tensor, is_module
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.nest import Choice, Nest, is_training
from spectool.checkpoint.types import InertModule, InertObject

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, complex, str, bytes)

#: An attribute that is a longer list or dict is data that somebody hung on the module, not geometry.
_LONGEST = 256
_DEEPEST = 8
_MOST_NOTES = 50


class Collector:
    """Names the tensors of one chosen part of a pickle and builds its module tree.

    Args:
        what: File, for messages.
        nest: The pickle.
        limits: ``names`` and ``depth`` apply.

    Attributes:
        tensors: Checkpoint key → placeholder, in file order.
        notes: What was left out on the way, in words.
    """

    def __init__(self, what: str, nest: Nest, limits: Limits) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self._what = what
        self._nest = nest
        self._limits = limits
        self._visited = 0
        self._characters = 0
        self._repeated: dict[str, int] = {}

    def collect(self, choice: Choice) -> InertModule | None:
        """Name every tensor of a choice; return its module tree if it has one."""
        node = choice.node
        if isinstance(node, Tensor):
            self._add("tensor", node)
            self.notes.append("a lone tensor: called 'tensor'")
            return None
        if is_module(node):
            return self._module(node, "", 0)
        modules: dict[str, InertModule] = {}
        for name, value in self._nest.parts(node):
            if name not in choice.kept:
                continue
            if isinstance(value, Tensor):
                self._add(name, value)
            elif is_module(value):
                modules[name] = self._module(value, name, 1)
            else:
                self.flatten(value, name, 1)
        return InertModule("builtins.dict", {}, {}, modules) if modules else None

    def flatten(self, node: Any, prefix: str, depth: int, *, training: bool = False) -> None:
        """Name every tensor below a node by its dotted path.

        Args:
            node: A container or placeholder.
            prefix: Path to it; empty at the root.
            depth: Length of that path.
            training: Whether to keep parts that look like training state.
        """
        self._count(prefix, depth)
        for name, value in self._nest.parts(node):
            key = f"{prefix}.{name}" if prefix else name
            if isinstance(value, Tensor):
                self._add(key, value)
            elif is_module(value):
                self._module(value, key, depth + 1)
            elif not training and is_training(name, value):
                self._note(f"ignored {key!r} (training state)")
            else:
                self.flatten(value, key, depth + 1, training=training)

    def _module(self, module: Foreign, prefix: str, depth: int) -> InertModule:
        self._count(prefix, depth)
        state = module.attributes()
        self._spend(len(state) + sum(len(state[name]) for name in _REGISTRIES if _is_dict(state.get(name))))
        parameters: dict[str, str] = {}
        for registry in ("_parameters", "_buffers"):
            entries = state.get(registry)
            for name, value in entries.items() if isinstance(entries, dict) else ():
                if isinstance(value, Tensor):
                    parameters[str(name)] = self._add(f"{prefix}.{name}" if prefix else str(name), value)
        children = {}
        for name, child in state["_modules"].items():
            key = f"{prefix}.{name}" if prefix else str(name)
            if is_module(child):
                children[str(name)] = self._module(child, key, depth + 1)
            elif isinstance(child, Foreign):
                # A module with its own way of pickling: its tensors are named, its geometry is not known.
                self.flatten(child, key, depth + 1)
                children[str(name)] = InertModule(child.cls, {}, {}, {})
        attributes = {
            name: self._plain(value, 0)
            for name, value in state.items()
            if name not in _REGISTRIES
            and not (name.startswith("_") and isinstance(value, dict) and not value)
        }
        return InertModule(module.cls, attributes, parameters, children)

    def _plain(self, value: Any, depth: int) -> Any:
        """Return an attribute as plain data: placeholders become ``InertObject``, what is endless is cut."""
        self._count("an attribute", 0)
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, Reference):
            return InertObject(value.name)
        if isinstance(value, Tensor):
            return InertObject("torch.Tensor", {"dtype": value.dtype, "shape": value.shape})
        if isinstance(value, Foreign):
            if value.cls in ("builtins.set", "builtins.frozenset"):
                elements = value.elements or []
                return self._plain(tuple(elements) if len(elements) <= _LONGEST else elements, depth + 1)
            if depth >= _DEEPEST or is_module(value):
                return InertObject(value.cls)
            state = value.attributes() or ({"args": value.args} if value.args else {})
            return InertObject(
                value.cls, {name: self._plain(item, depth + 1) for name, item in state.items()}
            )
        if isinstance(value, dict | list | tuple):
            if depth >= _DEEPEST or len(value) > _LONGEST:
                return InertObject(f"builtins.{type(value).__name__}", {"length": len(value)})
            if isinstance(value, dict):
                items = ((name, item) for name, item in value.items() if isinstance(name, str | int))
                return {name: self._plain(item, depth + 1) for name, item in items}
            return type(value)(self._plain(item, depth + 1) for item in value)
        return InertObject(f"{type(value).__module__}.{type(value).__qualname__}")

    def _add(self, name: str, tensor: Tensor) -> str:
        key, number = name, self._repeated.get(name, 1)
        while key in self.tensors:
            number += 1
            key = f"{name}#{number}"
        if number > 1:
            self._repeated[name] = number
            self._note(f"{name!r} stands for several tensors; this one is {key!r}")
        self.tensors[key] = tensor
        self._count(key, 0)
        return key

    def _note(self, text: str) -> None:
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(text)
        elif len(self.notes) == _MOST_NOTES:
            self.notes.append("and more of that kind")

    def _count(self, where: str, depth: int) -> None:
        self._spend(1)
        # Every key repeats the names of the parts around it.
        self._characters += len(where)
        self._limits.check("name_bytes", self._characters, f"{self._what}: its names together")
        self._limits.check("depth", depth, f"{self._what}: the depth of {where[:60]!r}")

    def _spend(self, steps: int) -> None:
        self._visited += steps
        self._limits.check("names", self._visited, f"{self._what}: the number of parts")


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def scalars(node: Any) -> dict[str, Any]:
    """Return the plain values directly in a dict (epoch, accuracy, architecture's name); bounded."""
    if not isinstance(node, dict):
        return {}
    plain = ((name, value) for name, value in node.items() if isinstance(name, str))
    return {name: value for name, value in plain if isinstance(value, bool | int | float | str)}
