"""The front-end for live programs: a module, its tape, and rows for everything on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from spectool.errors import GraphError
from spectool.graph.aten import call
from spectool.graph.aten_rules import ATEN_RULES, packet, rules_for
from spectool.graph.aten_translate import Constants, translate
from spectool.graph.inputs import example_inputs
from spectool.graph.parts import Derived, with_parts
from spectool.graph.recurrent import expert_regions, gate_regions
from spectool.graph.regions import survey_graph
from spectool.graph.roles import Known
from spectool.graph.tape import is_norm, record
from spectool.graph.types import Call, Graph, Node, Opaque, Region, Shape, Skipped, Survey

if TYPE_CHECKING:
    import numpy as np

Load = Callable[[str], torch.Tensor]


def survey_module(
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    named_inputs: Mapping[str, torch.Tensor] | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    load: Load | None = None,
    notes: Sequence[str] = (),
) -> Survey:
    """Find every operator of a live module by one forward under fake tensors.

    Args:
        module: The program, run in evaluation mode; its weights may be on the meta device if ``load`` is given.
        inputs: Example inputs with their batch axis; only shapes and types count.
        named_inputs: The same, by keyword.
        keys: Parameter or buffer name → checkpoint key; by default the names themselves.
        load: Reads a tensor by checkpoint key; by default from the module.
        notes: What to say besides.

    Raises:
        GraphError: If the module cannot be run on such inputs.
    """
    recorded, captured = record(module, inputs, named_inputs)
    graph, constants = translate(recorded, captured)
    names = dict(keys or {})
    state = dict(
        (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    )

    def stored(name: str) -> torch.Tensor:
        if load is not None and (not names or name in names):
            return load(names.get(name, name))
        return state[name].detach().cpu()

    def read(name: str) -> torch.Tensor:
        return constants.load(name, stored)

    renamed = {key: graph.constants[name] for name, key in names.items() if name in graph.constants}
    graph = replace(
        graph,
        origins={
            name: tuple(names.get(origin, origin) for origin in found) for name, found in graph.origins.items()
        },
        constants={**graph.constants, **renamed},
    )
    parts: dict[str, Derived] = {}
    known = Known(
        load=with_parts(read, parts),
        rules=rules_for(node.op.name for node in graph.nodes if isinstance(node.op, Call)),
        labels=_labels(graph),
        extras=_extras(graph, module, names, parts),
        move=_move,
        provenance=_provenance(graph, constants),
    )
    return survey_graph(graph, known, source="tape", notes=notes)


def survey_live(
    module: torch.nn.Module,
    shapes: Mapping[str, Sequence[int]] | None,
    *,
    keys: Mapping[str, str] | None = None,
    load: Load | None = None,
    notes: Sequence[str] = (),
) -> Survey:
    """Find every operator of a live module from the shapes of its inputs; types are found by trying.

    Args:
        module: As for ``survey_module``.
        shapes: Input name → shape with the batch axis; ``""`` is the only input; None asks the module.
        keys: As for ``survey_module``.
        load: As for ``survey_module``.
        notes: As for ``survey_module``.

    Raises:
        UsageError: If shapes are needed and missing.
        GraphError: If the module cannot be run on inputs of these shapes.
    """
    problem: GraphError | None = None
    for positional, named in example_inputs(module, shapes):
        try:
            return survey_module(module, positional, named, keys=keys, load=load, notes=notes)
        except GraphError as error:
            problem = problem or error
    raise problem or GraphError(f"{type(module).__name__} cannot be followed")


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
    graph: Graph, module: torch.nn.Module, names: Mapping[str, str], parts: dict[str, Derived]
) -> dict[str, tuple[Region | Skipped, ...]]:
    """Return rows for what the dataflow stops at: norms, recurrent layers, operations with unread weights."""
    modules = dict(module.named_modules())
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
            extras[node.name] = _module_rows(inside, modules[inside], names, parts)
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


def _module_rows(
    path: str, module: torch.nn.Module, names: Mapping[str, str], parts: dict[str, Derived]
) -> tuple[Region | Skipped, ...]:
    """Return the rows of a module that is one boundary."""
    prefix = f"{path}." if path else ""
    found = {prefix + name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
    if is_norm(module):
        if not found:
            return ()
        key = next(iter(found))
        kind = _norm_kind(type(module).__name__)
        return (_nonlinear(names.get(key, key), kind, found[key]),)
    rows: list[Region | Skipped] = []
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
    family = next(word for word in gates if type(module).__name__.startswith(word))
    for name, shape in found.items():
        if len(shape) == 2:
            count = 1 if name.rsplit(".", 1)[-1].startswith("weight_hr") else gates[family]
            rows.extend(gate_regions(name, names.get(name, name), shape, count, family.lower(), parts))
    return tuple(rows)


def _norm_kind(name: str) -> str:
    lowered = name.lower()
    for word, kind in (("rms", "rmsnorm"), ("group", "groupnorm"), ("instance", "instancenorm")):
        if word in lowered:
            return kind
    return "rmsnorm" if name == "T5LayerNorm" else "layernorm"


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
    floating = [name for name in weights if len(shapes[name]) >= 2 and _real(graph, name)]
    if not floating:
        return ()
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


def _provenance(graph: Graph, constants: Constants) -> Callable[[str], tuple[str, Shape, np.ndarray] | None]:
    """Return the function that says which entries of which stored tensor a constant consists of."""

    def trace(name: str) -> tuple[str, Shape, np.ndarray] | None:
        import numpy as np

        if name not in constants.nodes:
            origin = graph.origins.get(name, ())
            shape = graph.constants.get(name)
            if len(origin) != 1 or shape is None or name in constants.leaves:
                return None
            return origin[0], shape, np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        node, position = constants.nodes[name]
        rule = ATEN_RULES.get(packet(node.op.name)) if isinstance(node.op, Call) else None
        if rule is None or rule.how != "first" or rule.role not in ("neutral", "move", "select"):
            return None
        before = trace(node.inputs[0])
        if before is None or len(node.inputs) != 1 or "_to_copy" in node.name:
            return None
        key, shape, indices = before
        try:
            return key, shape, np.ascontiguousarray(_move(node, [indices])[position])
        except (RuntimeError, ValueError, TypeError):
            return None

    return trace
