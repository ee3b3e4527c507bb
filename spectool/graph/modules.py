"""The front-end for pickled modules read inertly: exact geometry, and exact order inside ``nn.Sequential``.

Stride, padding, dilation, groups and padding mode come from the attributes that the pickle keeps. Which module
runs after which is known only inside a ``Sequential``; sizes follow from ``--input`` through the root if it is one,
and layers compose there. Everywhere else an operator stands alone on an infinite grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from spectool.checkpoint.types import InertModule
from spectool.errors import UsageError
from spectool.graph.chain import Link, compose
from spectool.graph.effective import Weights
from spectool.graph.layers import layer
from spectool.graph.module import Layer, Module
from spectool.graph.names import Item, recognise, rows_of, settle, unreadable
from spectool.graph.pairing import pair
from spectool.graph.types import Region, Shape, Survey

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

# Subclasses of Sequential in common packages that leave its forward as it is.
_SEQUENTIAL = frozenset(
    {
        "torch.nn.modules.container.Sequential",
        "torchvision.ops.misc.Conv2dNormActivation",
        "torchvision.ops.misc.Conv3dNormActivation",
        "torchvision.ops.misc.ConvNormActivation",
        "torchvision.ops.misc.MLP",
        "torchvision.models.mobilenet.ConvBNReLU",
        "torchvision.models.mobilenetv2.ConvBNReLU",
        "torchvision.models.mobilenetv2.ConvBNActivation",
    }
)
# Wrappers whose forward is their one child's.
_WRAPPERS = frozenset(
    {
        "torch.nn.parallel.data_parallel.DataParallel",
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch._dynamo.eval_frame.OptimizedModule",
    }
)


def survey_modules(
    checkpoint: Checkpoint,
    *,
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    assume_bn: bool = False,
) -> Survey:
    """Find operators in a pickled module whose code is not run.

    Args:
        checkpoint: An open checkpoint whose ``program`` is an ``InertModule``.
        inputs: Shapes with the batch axis. A name that is the path of a ``Sequential`` sizes that one; any other
            name, ``""`` included, sizes the root, which must then be a ``Sequential``.
        assume_bn: Whether to guess which batch norm follows which operator outside ``Sequential``; such rows say
            so.

    Raises:
        UsageError: If an input does not fit the modules, or names a module whose order is not known.
    """
    root = checkpoint.program
    if not isinstance(root, InertModule):
        raise UsageError(f"{checkpoint.path} holds no pickled module", hint="give no --input")
    found = recognise(checkpoint)
    walk = _Walk(
        Weights(checkpoint, found),
        {name: index for index, name in enumerate(checkpoint.tensors)},
        {name: tuple(shape) for name, shape in (inputs or {}).items()},
    )
    walk.visit(root, "", wrapped=True)
    walk.finish()
    rest = [name for name in checkpoint.tensors if name not in walk.claimed]
    plain = rows_of(checkpoint, walk.weights, found, only=rest)
    placed = [
        *walk.placed,
        *((walk.position[name], walk.explain(item)) for name, item in plain.placed),
    ]
    placed.sort(key=lambda entry: entry[0])
    placed += [(len(walk.position), item) for _, item in unreadable(checkpoint)]
    items = settle(checkpoint, [item for _, item in placed])
    if assume_bn:
        items = pair(items, ordered=True, certain=walk.ordered)
    return Survey(tuple(items), walk.weights, "modules", (*walk.notes, *plain.notes), walk.weights)


@dataclass
class _Walk:
    """One pass over a module tree."""

    weights: Weights
    position: Mapping[str, int]
    inputs: dict[str, tuple[int, ...]]
    placed: list[tuple[int, Item]] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)
    unknown: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sized: set[str] = field(default_factory=set)
    ordered: set[str] = field(default_factory=set)
    last: int = 0

    def visit(self, tree: InertModule, path: str, *, wrapped: bool = False) -> None:
        """Make the rows of a module and all below it; ``wrapped`` if it is the root or stands for it."""
        if tree.cls in _SEQUENTIAL:
            self._sequential(tree, path, self._input_of(path, root=wrapped))
            return
        only = wrapped and len(tree.children) == 1 and (tree.cls in _WRAPPERS or tree.cls == "builtins.dict")
        found = layer(Module(tree, path, self.weights))
        self._take(found, tree)
        if found.step is not None:
            self._place(compose([Link(found.step, None, None, self._where(found))]))
        for name, child in tree.children.items():
            self.visit(child, f"{path}.{name}" if path else name, wrapped=only)

    def finish(self) -> None:
        """Check that every input that was given has found its module.

        Raises:
            UsageError: If one has not.
        """
        for name in sorted(self.inputs.keys() - self.sized):
            if name:
                raise UsageError(
                    f"the input {name!r} is no nn.Sequential of the file",
                    hint="sizes follow through nn.Sequential only; give --arch, or leave --input out",
                )
            self.notes.append(
                "the input size has no effect: the root is no nn.Sequential, so no order is known"
            )

    def explain(self, item: Item) -> Item:
        """Add to a row made by name that the module's class is unknown."""
        cls = next((self.unknown[name] for name in item.weights if name in self.unknown), "")
        if not cls or not isinstance(item, Region):
            return item
        note = f"class {cls} is not known, judged by names and shapes"
        return replace(item, note=f"{item.note}; {note}" if item.note else note)

    def _input_of(self, path: str, *, root: bool) -> Shape | None:
        """Return what flows into a ``Sequential``, without the batch axis, if the user said so."""
        if path and path in self.inputs:
            name = path
        elif root and len(self.inputs) == 1:
            name = next(iter(self.inputs))
        else:
            return None
        self.sized.add(name)
        return self.inputs[name][1:]

    def _sequential(self, tree: InertModule, path: str, shape: Shape | None) -> None:
        run: list[Link] = []
        for child, where in _flattened(tree, path):
            found = layer(Module(child, where, self.weights, shape))
            self._take(found, child)
            self.ordered.update(found.claimed)
            before, after = _hooked(child)
            if before or (found.step is None and not found.neutral):
                self._place(compose(run))
                run = []
            if found.step is not None:
                run.append(Link(found.step, shape, found.out_shape, self._where(found)))
            if after:
                self._place(compose(run))
                run = []
            if not found.known:
                for name, below in child.children.items():
                    self.visit(below, f"{where}.{name}" if where else name)
            shape = found.out_shape
        self._place(compose(run))

    def _take(self, found: Layer, tree: InertModule) -> None:
        self.claimed.update(found.claimed)
        for row in found.rows:
            self.placed.append((self._where(found), row))
        if not found.known and not tree.cls.startswith("torch.nn."):
            self.unknown.update(dict.fromkeys(tree.parameters.values(), tree.cls))

    def _where(self, found: Layer) -> int:
        """Return the place of a module's rows: that of its first tensor, else that of the module before."""
        self.last = min((self.position[name] for name in found.claimed), default=self.last)
        return self.last

    def _place(self, rows: list[tuple[int, Region]]) -> None:
        self.placed += rows


def _hooked(tree: InertModule) -> tuple[bool, bool]:
    """Return whether hooks may change a module's input and its output; those of torch only remake weights."""
    before = tree.attributes.get("_forward_pre_hooks")
    entries = before.values() if isinstance(before, Mapping) else ()
    foreign = any(not str(getattr(entry, "cls", "")).startswith("torch.nn.utils.") for entry in entries)
    return foreign, bool(tree.attributes.get("_forward_hooks"))


def _flattened(tree: InertModule, path: str) -> list[tuple[InertModule, str]]:
    """Return the modules of a ``Sequential`` in order of execution, nested ones opened."""
    result = []
    for name, child in tree.children.items():
        where = f"{path}.{name}" if path else name
        result += _flattened(child, where) if child.cls in _SEQUENTIAL else [(child, where)]
    return result
