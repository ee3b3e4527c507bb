"""From a recorded ATen program, wherever it was recorded, to rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from spectool.graph.aten import call
from spectool.graph.aten_rules import ATEN_RULES, packet, rules_for
from spectool.graph.aten_translate import TABLE, Constants, translate
from spectool.graph.boundaries import RECURRENT, Wall
from spectool.graph.computed import Computed
from spectool.graph.parts import Derived, with_parts
from spectool.graph.recurrent import expert_regions, gate_regions
from spectool.graph.regions import survey_graph
from spectool.graph.roles import Known
from spectool.graph.types import Call, Embedding, Graph, Node, Opaque, Region, Shape, Skipped, Survey

if TYPE_CHECKING:
    import numpy as np

Load = Callable[[str], torch.Tensor]


def survey_recorded(
    recorded: Graph,
    captured: Mapping[str, torch.Tensor],
    stored: Load,
    *,
    walls: Mapping[str, Wall],
    keys: Mapping[str, str] | None = None,
    source: str = "tape",
    notes: Sequence[str] = (),
) -> Survey:
    """Find every operator of a recorded program.

    Args:
        recorded: Nodes as recorded: calls with their arguments, and boundaries.
        captured: Tensors that the program made for itself.
        stored: Reads a parameter or buffer by its name in the program.
        walls: Path of a submodule that is one boundary → what it is.
        keys: Name in the program → checkpoint key; by default the names themselves.
        source: Name of the front-end.
        notes: What to say besides.
    """
    names = dict(keys or {})
    graph, constants = translate(recorded, captured)
    renamed = {key: graph.constants[name] for name, key in names.items() if name in graph.constants}
    graph = replace(
        graph,
        origins={
            name: tuple(names.get(origin, origin) for origin in found)
            for name, found in graph.origins.items()
        },
        constants={**graph.constants, **renamed},
    )
    back = {key: name for name, key in names.items()}

    def read(name: str) -> torch.Tensor:
        return constants.load(back.get(name, name), stored)

    def make(name: str, read: Load) -> torch.Tensor:
        def own(label: str) -> torch.Tensor:
            return read(names.get(label, label))

        return constants.load(back.get(name, name), own)

    parts: dict[str, Derived] = {}
    provenance = _Provenance(graph, constants)
    known = Known(
        load=with_parts(read, parts),
        rules=rules_for(node.op.name for node in graph.nodes if isinstance(node.op, Call)),
        labels=_labels(graph),
        extras=_extras(graph, walls, names, parts),
        move=_move,
        provenance=provenance.trace,
        parts=parts,
        plain=_plain(graph, constants),
        computed=Computed(graph.origins, graph.constants, make, read, provenance.trace),
    )
    return survey_graph(graph, known, source=source, notes=notes)


def unused(found: Survey, parameters: Mapping[str, Shape], names: Mapping[str, str]) -> list[str]:
    """Return a note on the parameters of rank two or more that no row speaks of."""
    spoken = {weight for item in found.items for weight in item.weights}
    silent = [
        names.get(name, name)
        for name, shape in parameters.items()
        if len(shape) >= 2 and names.get(name, name) not in spoken
    ]
    if not silent:
        return []
    shown = ", ".join(silent[:6]) + (", …" if len(silent) > 6 else "")
    return [f"{len(silent)} parameters are no operators on this path (added, or not reached): {shown}"]


def _labels(graph: Graph) -> dict[str, str]:
    """Return the would-be parameter name of every constant that is made of the parts of one."""
    endings = (
        (".parametrizations.", None),
        ("_g", "_v"),
        ("_v", "_g"),
        ("_orig", None),
    )
    labels = {}
    for name, origins in graph.origins.items():
        if name in origins or not origins:
            continue
        first = origins[0]
        if endings[0][0] in first:
            head, _, tail = first.partition(".parametrizations.")
            labels[name] = f"{head}.{tail.split('.')[0]}"
            continue
        for ending, other in endings[1:]:
            stem = first.removesuffix(ending)
            if stem != first and (other is None or stem + other in origins):
                labels[name] = stem
    return labels


def _extras(
    graph: Graph, walls: Mapping[str, Wall], names: Mapping[str, str], parts: dict[str, Derived]
) -> dict[str, tuple[Region | Skipped, ...]]:
    """Return rows for what the dataflow stops at: norms, recurrent layers, operations with unread weights."""
    extras: dict[str, tuple[Region | Skipped, ...]] = {}
    done: set[str] = set()
    for node in graph.nodes:
        if not isinstance(node.op, Opaque):
            continue
        inside = node.op.reason.removeprefix("inside:")
        if inside != node.op.reason:
            if inside in done:
                continue
            done.add(inside)
            extras[node.name] = _wall_rows(walls[inside], names, parts)
            continue
        matrices = [
            name
            for name in node.inputs
            if name in graph.constants and graph.origins.get(name) and len(graph.constants[name]) >= 1
        ]
        rows = _opaque_rows(node, matrices, graph, parts)
        if rows:
            extras[node.name] = rows
    return extras


_NONLINEAR = {
    "layernorm": "divides by statistics of its own input",
    "rmsnorm": "divides by statistics of its own input",
    "groupnorm": "divides by statistics of its own input",
    "instancenorm": "divides by statistics of its own input",
}


def _wall_rows(
    wall: Wall, names: Mapping[str, str], parts: dict[str, Derived]
) -> tuple[Region | Skipped, ...]:
    """Return the rows of a submodule that is one boundary."""
    if wall.kind not in RECURRENT:
        if not wall.parameters:
            return ()
        key, shape = next(iter(wall.parameters.items()))
        return (_nonlinear(names.get(key, key), wall.kind, shape),)
    rows: list[Region | Skipped] = []
    for name, shape in wall.parameters.items():
        if len(shape) == 2:
            projection = name.rsplit(".", 1)[-1].startswith("weight_hr")
            gates = 1 if projection else RECURRENT[wall.kind]
            rows.extend(gate_regions(name, names.get(name, name), shape, gates, wall.kind, parts))
    return tuple(rows)


def _nonlinear(key: str, kind: str, shape: Shape) -> Skipped:
    reason = f"{_NONLINEAR[kind]}; only its gain is a constant diagonal"
    return Skipped(key, kind, (key,), (shape,), reason, status="nonlinear", operators=0)


def _opaque_rows(
    node: Node, weights: Sequence[str], graph: Graph, parts: dict[str, Derived]
) -> tuple[Region | Skipped, ...]:
    if not isinstance(node.op, Opaque) or not weights:
        return ()
    shapes = {name: graph.constants[name] for name in weights}
    if node.op.reason in _NONLINEAR:
        key = graph.origins[weights[0]][0]
        return (_nonlinear(key, node.op.reason, shapes[weights[0]]),)
    if packet(node.op.name) in ("aten.prelu", "aten._prelu_kernel"):
        key = graph.origins[weights[0]][0]
        reason = "an activation with learned slopes"
        shape = graph.constants.get(key, shapes[weights[0]])
        return (Skipped(key, "prelu", (key,), (shape,), reason, status="nonlinear", operators=0),)
    floating = [name for name in weights if len(shapes[name]) >= 2 and _real(graph, name)]
    if not floating:
        return ()
    if node.op.reason == TABLE:
        rows, columns = shapes[floating[0]]
        key = graph.origins[floating[0]][0]
        step = Node(key, Embedding(), ("<x>", floating[0]), ("<y>",))
        return (
            Region(
                key,
                "layer",
                "embedding",
                "<x>",
                "<y>",
                (step,),
                (key,),
                ((rows, columns),),
                (rows,),
                (columns,),
            ),
        )
    if packet(node.op.name) == "aten._grouped_mm":
        key = graph.origins[floating[-1]][0]
        return tuple(expert_regions(key, key, graph.constants[key], "linear", parts))
    key = graph.origins[floating[0]][0]
    stored = tuple(dict.fromkeys(origin for name in floating for origin in graph.origins[name]))
    reason = f"{node.op.name} is not analysed"
    return (Skipped(key, "region", stored, tuple(graph.constants.get(name, ()) for name in stored), reason),)


def _real(graph: Graph, name: str) -> bool:
    value = graph.values.get(name)
    return value is None or value.dtype.startswith(("float", "bfloat"))


def _move(node: Node, arrays: Sequence[np.ndarray | None]) -> Sequence[np.ndarray]:
    """Run a rearrangement on an array of integers."""
    if not isinstance(node.op, Call):
        raise TypeError(f"{node.name} is no recorded call")
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    if any(tensor is None for tensor in tensors):
        raise ValueError(f"{node.name} reads constants")
    result = call(node.op, tensors)
    return [piece.numpy() for piece in (result if isinstance(result, tuple) else (result,))]


def _plain(graph: Graph, constants: Constants) -> Callable[[str], str | None]:
    """Return the function that says which stored tensor a constant is."""

    def plain(name: str) -> str | None:
        origin = graph.origins.get(name, ())
        if name in constants.nodes or name in constants.leaves or len(origin) != 1:
            return None
        return origin[0]

    return plain


@dataclass(frozen=True)
class _Provenance:
    """Where the entries of constants come from, through nodes that only move entries."""

    graph: Graph
    constants: Constants

    def trace(
        self, name: str, base: Callable[[str], bool] | None = None
    ) -> tuple[str, Shape, np.ndarray] | None:
        """Return the tensor that a constant's entries are those of, its shape, and the flat index of each.

        Args:
            name: The constant.
            base: Which constants to stop at; by default stored tensors.
        """
        import numpy as np

        def whole(source: str, shape: Shape) -> tuple[str, Shape, np.ndarray]:
            return source, shape, np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)

        if base is not None and name in self.constants.nodes and base(name):
            return whole(name, self.graph.constants[name])
        if name not in self.constants.nodes:
            origin = self.graph.origins.get(name, ())
            shape = self.graph.constants.get(name)
            if base is not None or len(origin) != 1 or shape is None or name in self.constants.leaves:
                return None
            return whole(origin[0], shape)
        node, position = self.constants.nodes[name]
        rule = ATEN_RULES.get(packet(node.op.name)) if isinstance(node.op, Call) else None
        if rule is None or rule.how != "first" or rule.role not in ("neutral", "move", "select"):
            return None
        if len(node.inputs) != 1 or "_to_copy" in node.name:
            return None
        before = self.trace(node.inputs[0], base)
        if before is None:
            return None
        key, shape, indices = before
        try:
            return key, shape, np.ascontiguousarray(_move(node, [indices])[position])
        except (RuntimeError, ValueError, TypeError):
            return None
