"""Find every operator of an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from spectool.checkpoint.onnxfile import named_tensors
from spectool.errors import GraphError
from spectool.graph.computed import Computed
from spectool.graph.onnx.constants import Constants, dtype_name
from spectool.graph.onnx.evaluate import Array, Evaluator
from spectool.graph.onnx.inputs import declared_shape, example_shapes, missing_size, ones, resolve_inputs
from spectool.graph.onnx.quantised import resolve_integer_products
from spectool.graph.onnx.state import Dims, State
from spectool.graph.onnx.walk import Walk
from spectool.graph.regions import survey_graph
from spectool.graph.roles import Known
from spectool.graph.rules import ONNX_RULES
from spectool.graph.types import BatchNorm, Call, Conv, Graph, Node, Region, Skipped, Survey

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

_SAMPLE = 4096


def survey_onnx(checkpoint: Checkpoint, *, inputs: Mapping[str, tuple[int, ...]] | None = None) -> Survey:
    """Find every operator of an ONNX model at its real input sizes.

    Functions are inlined, bodies of control flow are followed, and everything that does not depend on the inputs
    is folded; weights are not read until the survey's ``load`` asks for them. An open batch axis is 1.

    Args:
        checkpoint: An open ONNX file; its ``program`` is the ``ModelProto``.
        inputs: Input name → shape with the batch axis; the name ``""`` means the only input.

    Raises:
        UsageError: If the inputs do not fit, or an operator's size depends on one that is open.
        GraphError: If the model cannot be followed.
    """
    model = checkpoint.program
    if not isinstance(model, onnx.ModelProto):
        raise GraphError(f"{checkpoint.path} holds no ONNX graph")
    notes: list[str] = []
    graph_proto = _inlined(model, notes)
    stored = {tensor.name for tensor in model.graph.initializer}
    stored |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    declared = {
        value.name: (declared_shape(value), dtype_name(value.type.tensor_type.elem_type))
        for value in graph_proto.input
        if value.name not in stored
    }
    dims = {name: shape for name, (shape, _) in declared.items()}
    resolved, sizes = resolve_inputs(dims, inputs)

    def survey(shapes: Mapping[str, Dims | None]) -> tuple[Survey, list[str]]:
        typed = {name: (declared[name][1], shape) for name, shape in shapes.items()}
        return _survey(checkpoint, model, graph_proto, typed, sizes, notes)

    found, unsized = survey(resolved)
    tensors = {value.name for value in graph_proto.input if value.type.HasField("tensor_type")}
    still_open = [
        name for name, shape in resolved.items() if name in tensors and (shape is None or None in shape)
    ]
    # Whether the open sizes are to blame shows when they are filled in.
    if unsized and still_open and (not inputs or set(survey(example_shapes(resolved))[1]) != set(unsized)):
        if inputs:
            raise missing_size(unsized[0], dims, resolved)
        # Nothing was said about sizes: what does not depend on them is exact, convolutions hold for any size.
        missing = missing_size(unsized[0], dims, resolved)
        found = replace(found, notes=(*found.notes, f"{missing}: {missing.hint}"))
    elif still_open:
        # What is left does not change the size of any convolution: positions of a sequence, batches of states.
        found, _ = survey({name: ones(shape) for name, shape in resolved.items()})
        taken = f"open sizes of {', '.join(still_open)} are taken as 1: give --input for other ones"
        found = replace(found, notes=(*found.notes, taken))
    return replace(found, items=tuple(_tied(_explained(item), checkpoint) for item in found.items))


def _survey(
    checkpoint: Checkpoint,
    model: onnx.ModelProto,
    graph_proto: onnx.GraphProto,
    inputs: Mapping[str, tuple[str, Dims | None]],
    sizes: Mapping[str, int],
    notes: Sequence[str],
) -> tuple[Survey, list[str]]:
    """Return the survey for inputs of given types and shapes, and what has no size."""
    versions = {
        ("" if item.domain == "ai.onnx" else item.domain): item.version for item in model.opset_import
    }
    state = State(Constants(checkpoint, Evaluator(versions)), notes=list(notes))
    named = named_tensors(model)  # kept alive, so that every id below stays the tensor's own
    walk = Walk(state, versions, model.ir_version, sizes, keys={id(tensor): key for key, tensor in named})
    scope: dict[str, str] = {}
    walk.stored(model.graph, scope)
    for name, (dtype, shape) in inputs.items():
        scope[name] = walk.unique(name, "")
        walk.value(name, (dtype, shape))
        _sample_input(state, name, dtype, shape)
    outputs = walk.graph(graph_proto, scope, top=True)
    resolve_integer_products(state)
    graph = _graph(state, list(inputs), outputs)
    _note_unused(state, graph)
    known = Known(
        load=state.constants.load,
        rules=ONNX_RULES,
        labels={**{name: item.label for name, item in state.constants.table.items()}, **state.labels},
        assumed=state.assumed,
        extras={name: tuple(items) for name, items in state.extras.items()},
        move=_mover(state),
        provenance=state.constants.provenance,
        plain=state.constants.plain,
        computed=Computed(
            graph.origins,
            {**graph.constants, **state.constants.stored_shapes},
            state.constants.make,
            checkpoint.read,
            state.constants.provenance,
            _numbers(state.constants),
        ),
    )
    survey = survey_graph(graph, known, source="onnx", notes=state.notes)
    unsized = [
        item.key
        for item in survey.items
        if isinstance(item, Region) and item.in_shape is None and isinstance(item.nodes[0].op, Conv)
    ]
    return survey, unsized + state.unsized


def _inlined(model: onnx.ModelProto, notes: list[str]) -> onnx.GraphProto:
    """Return the graph with the model's own functions replaced by their bodies; weights are not copied."""
    if not model.functions:
        return model.graph
    from onnx import defs, inliner

    for function in model.functions:
        domain = "" if function.domain == "ai.onnx" else function.domain
        if defs.has(function.name, domain):
            # Runtimes take their own operation, the inliner takes the function.
            raise GraphError(
                f"a function of the model has the name of the standard operation {function.name}",
                hint="which of the two a program runs is not said: rename the function",
            )

    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.output.extend(model.graph.output)
    light.graph.value_info.extend(model.graph.value_info)
    named = {value.name for value in model.graph.input}
    light.graph.input.extend(model.graph.input)
    light.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.name not in named
    )
    try:
        inlined = inliner.inline_local_functions(light)
    except Exception as error:  # the inliner raises whatever its C++ side throws
        raise GraphError(f"the model's functions cannot be inlined: {error}") from error
    del inlined.graph.input[len(model.graph.input) :]
    notes.append(f"inlined {len(model.functions)} functions of the model")
    return inlined.graph


def _sample_input(state: State, name: str, dtype: str, shape: Dims | None) -> None:
    """Give an integer input zeros: exporters compute sizes from such inputs."""
    if shape is None or not dtype.startswith(("int", "uint", "bool")):
        return
    sizes = [size for size in shape if size is not None]
    if len(sizes) == len(shape) and np.prod(sizes, dtype=np.int64) <= _SAMPLE:
        state.samples[name] = np.zeros(sizes, np.dtype(dtype))


def _graph(state: State, inputs: Sequence[str], outputs: Sequence[str]) -> Graph:
    constants = {name: constant.shape for name, constant in state.constants.table.items()}
    return Graph(
        nodes=tuple(state.nodes),
        values=state.values,
        inputs=tuple(inputs),
        outputs=tuple(dict.fromkeys(outputs)),
        constants={**state.constants.stored_shapes, **constants},
        origins={
            name: constant.origins for name, constant in state.constants.table.items() if constant.origins
        },
    )


def _numbers(constants: Constants) -> dict[str, tuple[str, ...]]:
    """Return, for constants that nodes compute, the keys of the stored single numbers they are made of."""
    found: dict[str, tuple[str, ...]] = {}
    for name, entry in constants.table.items():  # sources come before what is made of them
        if entry.node is not None:
            keys = dict.fromkeys(key for source in entry.node[1] for key in found.get(source, ()))
            found[name] = tuple(keys)
        elif entry.numel == 1 and not entry.depth and entry.dtype.startswith(("float", "bfloat")):
            found[name] = entry.origins
    return {name: keys for name, keys in found.items() if keys}


def _mover(state: State) -> Any:
    def move(node: Node, arrays: Sequence[Array | None]) -> Sequence[Array]:
        if not isinstance(node.op, Call):
            raise ValueError(f"{node.name} moves nothing")
        attributes = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in node.op.attributes.items()
            if value != () and name != "num_outputs"
        }
        if "num_outputs" in node.op.attributes and node.op.opset >= 18 and len(node.inputs) < 2:
            attributes["num_outputs"] = node.op.attributes["num_outputs"]
        proto = helper.make_node(node.op.name.partition(".")[2], node.inputs, node.outputs, **attributes)
        full = [
            array if array is not None or not name else state.constants.value(name)
            for array, name in zip(arrays, node.inputs, strict=True)
        ]
        return state.constants.evaluator.run(proto, full, node.op.opset)

    return move


def _note_unused(state: State, graph: Graph) -> None:
    """Say which stored matrices no operation uses."""
    used = {origin for node in graph.nodes for name in node.inputs for origin in graph.origins.get(name, ())}
    used |= {origin for name in graph.outputs for origin in graph.origins.get(name, ())}
    unused = [
        name
        for name, constant in state.constants.table.items()
        if constant.node is None
        and not constant.depth
        and len(constant.shape) >= 2
        and constant.dtype.startswith(("float", "bfloat"))
        and not used.intersection(constant.origins)
    ]
    if unused:
        shown = ", ".join(unused[:5]) + (", …" if len(unused) > 5 else "")
        state.notes.append(
            f"{len(unused)} stored matrices are used by nothing that depends on the inputs: {shown}"
        )


def _explained(item: Region | Skipped) -> Region | Skipped:
    """Say what stands for an operator whose input size cannot be inferred."""
    if isinstance(item, Skipped) or (item.in_shape is not None and item.out_shape is not None):
        return item
    op = item.nodes[0].op
    if len(item.nodes) == 1 and isinstance(op, BatchNorm):
        return replace(item, in_shape=None, out_shape=None, assumed=(*item.assumed, "any input size"))
    if len(item.nodes) == 1 and isinstance(op, Conv):
        return replace(item, in_shape=None, out_shape=None, assumed=(*item.assumed, "infinite grid"))
    reason = "its input size cannot be inferred"
    return Skipped(item.key, item.kind, item.weights, item.weight_shapes, reason, operators=item.operators)


def _tied(item: Region | Skipped, checkpoint: Checkpoint) -> Region | Skipped:
    """Name the tensors that share their bytes with those of a stored operator."""
    if isinstance(item, Skipped) or item.level != "layer":
        return item
    others = [name for name, first in checkpoint.aliases.items() if first in item.weights and name != first]
    return replace(item, note=f"tied with {', '.join(others)}") if others else item
