"""The second route for an ONNX operation that our own table cannot run: onnx2torch, for that one node.

What onnx2torch makes is believed only after it was compared with onnx's reference implementation, found affine, and
found to have a derivative and an adjoint that fit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from spectool.errors import OperatorError
from spectool.graph.types import Call, Node
from spectool.linear import FunctionMap, dot_test

if TYPE_CHECKING:
    import onnx

Tensor = torch.Tensor
Route = Callable[[Sequence["Tensor | None"]], tuple[Tensor, ...]]

_OLDER = (16, 13, 11)  # opsets that onnx2torch knows well, tried where it lacks the file's own
_TOLERANCE = 1e-5


def convert_node(node: Node, arguments: Sequence[Tensor | None], flowing: Sequence[bool]) -> Route:
    """Return a function of the node's arguments that onnx2torch made, after checking it.

    It is called with all the arguments again, of which those that flow may differ; it works under ``torch.vmap`` and
    has two derivatives. Call this outside of every transform.

    Args:
        node: One operation of ONNX's own domain.
        arguments: Example arguments with their batch axis; None where absent.
        flowing: Which of them flow; the others are constant.

    Raises:
        OperatorError: If onnx2torch lacks the operation or what it makes is wrong; the message says what it said.
    """
    if not isinstance(node.op, Call) or not node.op.name.startswith("onnx."):
        raise OperatorError("onnx2torch converts operations of ONNX's own domain only")
    said = ""
    constants = [
        place
        for place, value in enumerate(arguments)
        if value is not None and not flowing[place] and value.is_floating_point()
    ]
    for opset in dict.fromkeys((node.op.opset, *(older for older in _OLDER if older < node.op.opset))):
        # A constant that the operation writes into has to flow, too, or a batch would not fit into it.
        for fed in ([], constants) if constants else ([],):
            inputs = [place for place in range(len(arguments)) if flowing[place] or place in fed]
            try:
                route = _converted(node, arguments, inputs, flowing, opset)
                _check(route, node, arguments, flowing)
            except OperatorError as error:
                said = said or str(error)
            else:
                return route
    raise OperatorError(f"onnx2torch: {said}")


def _converted(
    node: Node, arguments: Sequence[Tensor | None], inputs: Sequence[int], flowing: Sequence[bool], opset: int
) -> Route:
    """Return what onnx2torch makes of a node, with the arguments at ``inputs`` fed and the others built in."""
    model = one_node_model(node, arguments, inputs, opset)
    convert = _import_convert()
    try:
        _check_node(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = convert(model)
    except Exception as error:  # whatever a converter raises
        raise OperatorError(_first_line(error)) from error
    sample = next(
        value for value, flows in zip(arguments, flowing, strict=True) if flows and value is not None
    )
    module = module.eval().to(device=sample.device, dtype=sample.dtype)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    leader = next(place for place in inputs if flowing[place])

    def route(given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        first = given[leader]
        if first is None:
            raise OperatorError("its first input is absent")
        nothing = 0 * first.reshape(-1)[:1].sum()
        fed = []
        for place in inputs:
            value = given[place]
            fed.append(value + nothing if value is not None and not flowing[place] else value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the ways of onnx2torch
            result = module(*fed)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    return route


def one_node_model(
    node: Node, arguments: Sequence[Tensor | None], inputs: Sequence[int], opset: int
) -> onnx.ModelProto:
    """Return an ONNX model of one node: the arguments at ``inputs`` are its inputs, the others initializers."""
    from onnx import helper, numpy_helper

    if not isinstance(node.op, Call):
        raise OperatorError(f"{node.name} is no call")
    names = ["" if value is None else f"x{place}" for place, value in enumerate(arguments)]
    outputs = [f"y{place}" if name else "" for place, name in enumerate(node.outputs)]
    attributes = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in node.op.attributes.items()
        if value != () and not (name == "num_outputs" and (opset < 18 or len(node.inputs) > 1))
    }
    declared, stored = [], []
    for place, value in enumerate(arguments):
        if value is None:
            continue
        array = value.detach().cpu().numpy()
        if place in inputs:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            declared.append(helper.make_tensor_value_info(names[place], kind, array.shape))
        else:
            stored.append(numpy_helper.from_array(array, names[place]))
    kind = next(value.type.tensor_type.elem_type for value in declared)
    graph = helper.make_graph(
        [helper.make_node(node.op.name.partition(".")[2], names, outputs, **attributes)],
        "one",
        declared,
        [helper.make_tensor_value_info(name, kind, None) for name in outputs if name],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _check_node(model: onnx.ModelProto) -> None:
    """Refuse a node that its opset does not define: an older one may lack an attribute."""
    from onnx import checker

    context = checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {"": model.opset_import[0].version}
    checker.check_node(model.graph.node[0], context)


def _check(route: Route, node: Node, arguments: Sequence[Tensor | None], flowing: Sequence[bool]) -> None:
    """Refuse a route that is wrong, not affine, or without derivatives."""
    import numpy as np

    fed = {place: value for place, value in enumerate(arguments) if flowing[place] and value is not None}
    places, shapes = list(fed), [tuple(value.shape) for value in fed.values()]
    sample = fed[places[0]]
    points = np.random.default_rng(0).standard_normal(sum(map(prod, shapes)))

    def one(flat: Tensor) -> Tensor:
        given = list(arguments)
        for place, piece, shape in zip(
            places, torch.split(flat, [prod(shape) for shape in shapes]), shapes, strict=True
        ):
            given[place] = piece.reshape(shape)
        return torch.cat([output.reshape(-1) for output in route(given)])

    try:
        point = torch.from_numpy(points).to(sample.dtype).to(sample.device)
        got = one(point)
        operator = FunctionMap(torch.func.vmap(one), (len(points),), dtype=sample.dtype, device=sample.device)
        affine, adjoint = operator.affine_defect(), dot_test(operator)
    except Exception as problem:  # whatever a stranger's module raises
        raise OperatorError(f"what it made fails: {_first_line(problem)}") from problem
    if max(affine, adjoint) > _TOLERANCE:
        raise OperatorError("what it made is not affine")
    expected = _reference(node, arguments, places, point, shapes)
    error = (
        float((got.double().cpu() - expected).abs().max())
        if got.numel() == expected.numel()
        else float("inf")
    )
    if error > _TOLERANCE * (1 + float(expected.abs().max())):
        raise OperatorError("what it made differs from onnx's reference")


def _reference(
    node: Node,
    arguments: Sequence[Tensor | None],
    places: Sequence[int],
    point: Tensor,
    shapes: Sequence[tuple[int, ...]],
) -> Tensor:
    """Return what onnx's own reference implementation makes of the flowing arguments in ``point``."""
    from onnx.reference import ReferenceEvaluator

    if not isinstance(node.op, Call):
        raise OperatorError(f"{node.name} is no call")
    pieces = torch.split(point, [prod(shape) for shape in shapes])
    feeds = {
        f"x{place}": piece.reshape(shape).cpu().numpy()
        for place, piece, shape in zip(places, pieces, shapes, strict=True)
    }
    try:
        evaluator = ReferenceEvaluator(one_node_model(node, arguments, places, node.op.opset))
        outputs = evaluator.run(None, feeds)
    except Exception as error:  # the reference lacks it or refuses its attributes
        raise OperatorError(f"onnx's reference cannot confirm it: {_first_line(error)}") from error
    return torch.cat([torch.from_numpy(output.copy()).double().reshape(-1) for output in outputs])


@functools.cache
def _import_convert() -> Callable[[Any], torch.nn.Module]:
    """Return ``onnx2torch.convert``, imported without torchvision where there is none that works.

    Raises:
        OperatorError: If onnx2torch is not installed or cannot be imported.
    """
    with _torchvision_or_stub():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found: Callable[[Any], torch.nn.Module] = importlib.import_module("onnx2torch").convert
        except Exception as error:  # an import can fail in any way
            raise OperatorError(f"it cannot be imported ({_first_line(error)})") from error
    return found


@contextlib.contextmanager
def _torchvision_or_stub() -> Iterator[None]:
    """Let imports inside see torchvision: the real one if it works, else a stub that is gone afterwards.

    onnx2torch names three of its functions when it is imported, none of which a linear operation needs. What was
    imported beside a stub is forgotten too, so that a later import of onnx2torch gets the real thing.
    """
    if "onnx2torch" in sys.modules:
        yield
        return
    try:
        importlib.import_module("torchvision")
    except Exception:  # absent, or built for another torch
        _forget("torchvision")
    else:
        yield
        return
    stubs = {name: _stub(name) for name in ("torchvision", "torchvision.ops")}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        _forget("torchvision")
        _forget("onnx2torch")


def _stub(name: str) -> types.ModuleType:
    def absent(*_: Any, **__: Any) -> Any:
        raise OperatorError("it needs torchvision")

    def attribute(wanted: str) -> Any:
        if wanted.startswith("_"):
            raise AttributeError(wanted)
        return absent

    module = types.ModuleType(name)
    module.__file__ = "<stub>"
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__["__getattr__"] = attribute
    return module


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:200] if text else type(error).__name__


def prepare(
    nodes: Sequence[Node],
    values: dict[str, Tensor],
    constants: Mapping[str, Tensor],
    execute: Callable[[Any, Sequence[Tensor | None]], Tensor | tuple[Tensor, ...]],
) -> dict[str, Route]:
    """Return, for the nodes that ``execute`` refuses, what onnx2torch makes of them, by the node's first output.

    Args:
        nodes: Nodes in order.
        values: What flows into them, with example data; grows.
        constants: Everything else they read.
        execute: The first route.

    Raises:
        OperatorError: If a node can be run neither way; the message names it and gives both reasons.
    """
    routes: dict[str, Route] = {}
    for node in nodes:
        flowing = [name in values for name in node.inputs]
        arguments = [
            None if not name else values[name] if name in values else constants[name] for name in node.inputs
        ]
        try:
            result = execute(node.op, arguments)
        except OperatorError as refusal:
            try:
                route = convert_node(node, arguments, flowing)
            except OperatorError as error:
                raise OperatorError(f"{node.name or node.outputs[0]}: {refusal}; {error}") from error
            routes[node.outputs[0]] = route
            result = route(arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        values.update({name: tensor for name, tensor in zip(node.outputs, outputs, strict=False) if name})
    return routes
