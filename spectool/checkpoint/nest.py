"""Find the state dict in whatever a training script saved around it."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spectool.checkpoint.inert import Foreign, Tensor, is_module
from spectool.checkpoint.limits import Limits
from spectool.errors import NothingToAnalyse, UsageError

#: Names under which scripts save the network, best first.
PREFERRED = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("weights", "params", "parameters"),
)

#: Branches that belong to the training, not to the network.
_TRAINING = re.compile(
    r"(?i:optim|exp_avg|momentum_buffer|(^|_)rng(_|$)|random_?state|lr_?sched|(^|_)schedulers?(_|$)|scaler"
    r"|^callbacks$|^loops$)|^amp(_|$)|(^|_)opt(_|$)|^opt[A-Z0-9]|^(adam|sgd)(_|$)"
)
_AVERAGED = re.compile(r"(^|[_.])(ema|swa|avg|averaged?|shadow)([_.]|$)|ema$", re.IGNORECASE)

#: Paths listed for ``key``, at most.
_MOST_CANDIDATES = 200
_LONGEST_CANDIDATE = 1000
_MOST_LISTED = 20


@dataclass(frozen=True)
class Choice:
    """Which part of a pickled nest is the network.

    Attributes:
        path: Names from the root to it.
        node: The part: a dict, list, placeholder or tensor.
        kept: Names directly below ``node`` that belong to it.
        notes: What was taken and what left out, in words.
    """

    path: tuple[str, ...]
    node: Any
    kept: tuple[str, ...]
    notes: tuple[str, ...]


class Nest:
    """A pickled object seen as a tree of named parts, with what bears tensors marked.

    Args:
        root: Result of the inert reader.
        limits: ``depth`` bounds the way down to a state dict.
    """

    def __init__(self, root: Any, limits: Limits) -> None:
        self.root = root
        self._limits = limits
        self._bearing = _bearing(root)
        self._parts: dict[int, list[tuple[str, Any]]] = {}

    def bears(self, value: Any) -> bool:
        """Tell whether a value is a tensor or holds one at any depth."""
        return isinstance(value, Tensor) or id(value) in self._bearing

    def parts(self, node: Any) -> list[tuple[str, Any]]:
        """Return the tensor-bearing parts directly below a node, by name.

        The answer is kept: a large part may stand in a million places.
        """
        found = self._parts.get(id(node))
        if found is None:
            found = self._parts[id(node)] = [
                (name, value) for name, value in parts(node) if self.bears(value)
            ]
        return found

    def candidates(self) -> list[tuple[tuple[str, ...], Any]]:
        """Return the parts that ``key`` can choose: every path to a dict, list or module with tensors in it."""
        found: list[tuple[tuple[str, ...], Any]] = []
        level: list[tuple[tuple[str, ...], Any]] = [((), self.root)]
        while level and len(found) < _MOST_CANDIDATES:
            below = []
            for path, node in level:
                if is_module(node):
                    continue
                for name, value in self.parts(node):
                    if len(name) > _LONGEST_CANDIDATE:
                        continue
                    if not isinstance(value, Tensor) and len(found) < _MOST_CANDIDATES:
                        found.append(((*path, name), value))
                        below.append(((*path, name), value))
            level = below if len(level[0][0]) < 8 else []
        return found

    def choose(self, key: str | None) -> Choice:
        """Return the network's part of the nest.

        Args:
            key: Dotted path or last name of the wanted part; None for the usual rules.

        Raises:
            UsageError: If ``key`` names nothing, or several parts.
            NothingToAnalyse: If there are no tensors, or only those of an optimizer.
        """
        if not self.bears(self.root):
            raise NothingToAnalyse("it holds no tensors", hint="name a file that holds weights")
        path, node = ((), self.root) if key is None else self._by_key(key)
        notes: list[str] = []
        while not isinstance(node, Tensor) and not is_module(node):
            self._limits.check("depth", len(path), "the nest of dicts around the tensors")
            kept, left = self._select(node)
            for name, why in left[:_MOST_LISTED]:
                notes.append(f"ignored {_dotted(path, name)!r} ({why})")
            if len(left) > _MOST_LISTED:
                notes.append(f"ignored {len(left) - _MOST_LISTED} more")
            if len(kept) != 1 or isinstance(kept[0][1], Tensor):
                if not kept:
                    others = ", ".join(_dotted(path, name) for name, _ in left[:_MOST_LISTED])
                    raise NothingToAnalyse(
                        f"it holds only {others}", hint="name a file that holds weights, or a --key"
                    )
                names = tuple(name for name, _ in kept)
                return Choice(path, node, names, _describe(path, notes))
            path, node = (*path, kept[0][0]), kept[0][1]
        return Choice(path, node, (), _describe(path, notes))

    def _by_key(self, key: str) -> tuple[tuple[str, ...], Any]:
        found = self.candidates()
        exact = [item for item in found if ".".join(item[0]) == key]
        matches = exact or [item for item in found if item[0][-1] == key]
        if len(matches) == 1:
            return matches[0]
        names = (
            ", ".join(".".join(path) for path, _ in matches or found) or "none: all tensors are in one dict"
        )
        fault = "names several parts" if matches else "names no part of it that holds tensors"
        raise UsageError(f"key {key!r} {fault}", hint=f"keys: {names or 'none, all tensors are in one dict'}")

    def _select(self, node: Any) -> tuple[list[tuple[str, Any]], list[tuple[str, str]]]:
        """Return the parts of a node that are the network, and the others with the reason."""
        below = self.parts(node)
        left = [(name, "training state") for name, value in below if is_training(name, value)]
        skipped = {name for name, _ in left}
        below = [item for item in below if item[0] not in skipped]
        branches = [(name, value) for name, value in below if not isinstance(value, Tensor)]
        if not branches:
            return below, left
        ranked = [(PREFERRED.index(name), name, value) for name, value in branches if name in PREFERRED]
        if ranked:
            # A module knows its geometry, so it goes before a bare dict of the same weights.
            _, chosen, value = min(ranked, key=lambda item: (not is_module(item[2]), item[0]))
            rest = [(name, "choose it by --key") for name, other in branches if name != chosen]
            loose = [(name, "a lone tensor beside it") for name, other in below if isinstance(other, Tensor)]
            return [(chosen, value)], left + rest + loose
        kept = below
        if all(_is_scalar(value) for _, value in below if isinstance(value, Tensor)):
            left += [(name, "a lone number") for name, value in below if isinstance(value, Tensor)]
            kept = branches
            raw = [item for item in branches if not _AVERAGED.search(item[0])]
            if raw and len(raw) < len(branches):
                left += [
                    (name, "averaged weights: choose it by --key")
                    for name, _ in branches
                    if _AVERAGED.search(name)
                ]
                kept = raw
        return kept, left


def parts(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the named parts of a container or placeholder; nothing for plain values."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key if type(key) is str else str(key), value
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield str(index), value
    elif isinstance(node, Foreign):
        state = node.attributes()
        yield from state.items()
        yield from parts(node.entries or {})
        yield from parts(node.elements or ())
        if isinstance(node.state, Foreign):
            # Not its parts: objects can be each other's state without end.
            yield "state", node.state
        elif not state and node.state is not None and not isinstance(node.state, dict):
            yield from parts(node.state)
        elif node.state is None:
            yield from parts(node.args)


def _has_parts(value: Any) -> bool:
    if isinstance(value, Foreign):
        return bool(value.args or value.entries or value.elements or value.state is not None)
    return isinstance(value, dict | list | tuple) and len(value) > 0


def _bearing(root: Any) -> set[int]:
    """Return the identities of the containers that hold a tensor at any depth, whatever is shared or cyclic.

    Linear in time. In memory some 150 bytes a container, because a few megabytes of pickle can make millions of them:
    who holds whom stands in arrays.
    """
    numbers = {id(root): 0}
    nodes = [root]
    inner, outer = array("i"), array("i")
    bearing = array("i")
    for number, node in enumerate(nodes):  # grows while it is walked
        for _, value in parts(node):
            if isinstance(value, Tensor):
                if not bearing or bearing[-1] != number:
                    bearing.append(number)
            elif _has_parts(value):
                place = numbers.setdefault(id(value), len(nodes))
                if place == len(nodes):
                    nodes.append(value)
                inner.append(place)
                outer.append(number)
    del numbers
    # Sort the pairs by the inner container: those around container i stand from starts[i] to starts[i + 1].
    starts = array("i", bytes(4 * (len(nodes) + 1)))
    for place in inner:
        starts[place + 1] += 1
    for place in range(len(nodes)):
        starts[place + 1] += starts[place]
    around, free = array("i", bytes(4 * len(outer))), starts[:]
    for place, number in zip(inner, outer, strict=True):
        around[free[place]] = number
        free[place] += 1
    found: set[int] = set()
    pending = list(bearing)
    while pending:
        number = pending.pop()
        if id(nodes[number]) not in found:
            found.add(id(nodes[number]))
            pending.extend(around[starts[number] : starts[number + 1]])
    return found


def is_training(name: str, value: Any) -> bool:
    """Tell whether a part is state of the training (optimizer, scheduler, random states), not of the network."""
    if isinstance(value, dict) and "state" in value and "param_groups" in value:
        return True
    if isinstance(value, Tensor):
        # Inside a flat state dict any word may be a layer's name; only random states are told apart.
        return value.dtype == "uint8" and len(value.shape) == 1 and "rng" in name.lower()
    return name not in PREFERRED and bool(_TRAINING.search(name))


def _is_scalar(value: Tensor) -> bool:
    return all(size == 1 for size in value.shape)


def _dotted(path: tuple[str, ...], name: str) -> str:
    """Return a dotted path for a message; a name in a file may be as long as the file."""
    return ".".join(part if len(part) <= _LONGEST_CANDIDATE else f"{part[:60]}…" for part in (*path, name))


def _describe(path: tuple[str, ...], notes: list[str]) -> tuple[str, ...]:
    return (*((f"took {'.'.join(path)!r}",) if path else ()), *notes)
