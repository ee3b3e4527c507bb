"""The front-end for exported programs (.pt2): their graph is read as the data it is; nothing is loaded or run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf, nan
from typing import TYPE_CHECKING, Any

import torch

from spectool.errors import GraphError, OperatorError
from spectool.graph.aten import Slot
from spectool.graph.boundaries import Wall, wall_kind
from spectool.graph.recorded import survey_recorded, unused
from spectool.graph.types import Call, Graph, Node, Op, Opaque, Survey, Value

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

_TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn",
    30: "float8_e5m2",
}  # fmt: skip
_PREFIX = "torch.ops."
#: What values of a wrong kind, missing names and sizes that make no sense turn into.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def survey_exported(checkpoint: Checkpoint, document: Mapping[str, Any]) -> Survey:
    """Find every operator of an exported program at the sizes it was exported with.

    Args:
        checkpoint: The open archive; tensors are read by the names of the program's own state.
        document: Its ``models/*.json``, schema 8 of ``torch.export`` or one like it.

    Raises:
        GraphError: If the document is not such a program.
    """
    try:
        graph, walls = _graph(document)
        missing = [name for name in graph.constants if name not in checkpoint.tensors]
        notes = [f"{len(missing)} constants of the program are not stored: {missing[0]}"] if missing else []
        # A call may have arguments that its operation cannot have: that shows where it is translated.
        found = survey_recorded(graph, {}, _reader(checkpoint), walls=walls, source="exported", notes=notes)
    except (*_MALFORMED, OperatorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise GraphError(
            f"{checkpoint.path}: its graph does not follow torch.export's schema ({reason})",
            hint="export it again with a newer torch",
        ) from error
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    return replace(found, notes=(*found.notes, *unused(found, shapes, {})))


def _reader(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        """Raises: OperatorError: If the program names a constant that the archive does not hold."""
        if name not in checkpoint.tensors and name not in checkpoint.unread:
            raise OperatorError(f"the program's constant {name[:80]!r} is not stored in the file")
        return checkpoint.read(name)

    return read


def _graph(document: Mapping[str, Any]) -> tuple[Graph, dict[str, Wall]]:
    program = document["graph_module"]
    graph, signature = program["graph"], program["signature"]
    values = {name: _value(name, meta) for name, meta in graph["tensor_values"].items()}
    stored, inputs = _signature(signature)
    renamed: dict[str, str] = {}
    constants = {}
    for label, name in stored.items():
        renamed[label] = name
        shape = values[label].shape or ()
        constants[name] = tuple(int(size or 0) for size in shape)
        values[name] = Value(name, values[label].shape, values[label].dtype)
    walls: dict[str, Wall] = {}
    nodes = [_node(entry, renamed, constants, walls, index) for index, entry in enumerate(graph["nodes"])]
    outputs = [name for entry in graph["outputs"] for name in _names(entry)]
    _check_order(nodes, [*inputs, *constants])
    return (
        Graph(
            nodes=tuple(nodes),
            values=values,
            inputs=tuple(inputs),
            outputs=tuple(renamed.get(name, name) for name in outputs),
            constants=constants,
            origins={name: (name,) for name in constants},
        ),
        walls,
    )


def _check_order(nodes: list[Node], given: list[str]) -> None:
    """Refuse a graph in which a value is read before it is written, or written twice.

    Raises:
        ValueError: Naming the value.
    """
    written = set(given)
    for node in nodes:
        for name in node.inputs:
            if name not in written:
                raise ValueError(f"{node.name[:80]!r} reads {name[:80]!r}, which nothing before it writes")
        for name in node.outputs:
            if name in written:
                raise ValueError(f"{name[:80]!r} is written twice")
            written.add(name)


def _signature(signature: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return graph label → checkpoint key for everything stored, and the labels of the user's inputs."""
    stored: dict[str, str] = {}
    inputs: list[str] = []
    keys = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
    for spec in signature["input_specs"]:
        ((kind, content),) = spec.items()
        if kind in keys:
            stored[content["arg"]["name"]] = content[keys[kind]]
        elif kind == "user_input":
            inputs.extend(_names(content["arg"]))
    return stored, inputs


def _names(argument: Mapping[str, Any]) -> list[str]:
    if "as_tensor" in argument:
        return [argument["as_tensor"]["name"]]
    if "as_tensors" in argument:
        return [entry["name"] for entry in argument["as_tensors"]]
    return []


def _value(name: str, meta: Mapping[str, Any]) -> Value:
    return Value(name, tuple(_size(size) for size in meta["sizes"]), _TYPES.get(meta["dtype"], ""))


def _size(size: Mapping[str, Any]) -> int:
    """Return a size; a symbolic one counts as the size the program was exported with."""
    if "as_int" in size:
        return int(size["as_int"])
    hint = size["as_expr"].get("hint") or {"as_int": 1}
    return int(hint["as_int"])


def _node(
    entry: Mapping[str, Any],
    renamed: Mapping[str, str],
    constants: Mapping[str, tuple[int, ...]],
    walls: dict[str, Wall],
    index: int,
) -> Node:
    target = str(entry["target"])
    inputs: list[str] = []

    def tensor(content: Mapping[str, Any]) -> Slot:
        inputs.append(renamed.get(content["name"], content["name"]))
        return Slot(len(inputs) - 1)

    positional: list[Any] = []
    named: dict[str, Any] = {}
    symbolic = False
    for argument in entry["inputs"]:
        value = _argument(argument["arg"], tensor)
        symbolic = symbolic or value is _UNKNOWN
        if argument.get("kind", 1) == 2:
            named[argument["name"]] = value
        else:
            positional.append(value)
    outputs = tuple(name for output in entry["outputs"] for name in _names(output))
    path, wall = _scope(entry.get("metadata", {}).get("nn_module_stack", ""))
    op: Op
    name = target.removeprefix(_PREFIX)
    if wall is not None:
        if path not in walls:
            prefix = f"{path}." if path else ""
            own = {key: shape for key, shape in constants.items() if key.rpartition(".")[0] == prefix[:-1]}
            walls[path] = Wall(wall, {key: shape for key, shape in own.items() if "running_" not in key})
        op = Opaque(name, f"inside:{path}")
    elif not target.startswith(_PREFIX) or symbolic:
        op = Opaque(name)
    else:
        op = Call(name, {"args": tuple(positional), "kwargs": named})
    return Node(f"{path}/{name}#{index}", op, tuple(inputs), outputs)


class _Unknown:
    """Marks an argument that is only known when the program runs."""


_UNKNOWN = _Unknown()
#: Kind of a plain argument → what it may be made of. JSON has no infinity: torch writes it as a text.
_PLAIN: dict[str, tuple[type, ...]] = {
    "as_int": (int,), "as_float": (float, int), "as_string": (str,), "as_bool": (bool,),
}  # fmt: skip
_INFINITE = {"Infinity": inf, "-Infinity": -inf, "NaN": nan}


def _argument(argument: Mapping[str, Any], tensor: Any) -> Any:
    ((kind, content),) = argument.items()
    stem, depth = _stem(kind)
    if stem in _PLAIN:
        return _plain(content, stem, depth)
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return tensor(content)
    if kind == "as_tensors":
        return [tensor(entry) for entry in content]
    if kind == "as_optional_tensor":
        return _argument(content, tensor)
    if kind == "as_optional_tensors":
        return [_argument(entry, tensor) for entry in content]
    if kind == "as_scalar_type":
        return getattr(torch, _TYPES[content])
    if kind == "as_device":
        return torch.device("cpu")
    if kind in ("as_memory_format", "as_layout"):
        # Where bytes lie changes no value; every operation has a default.
        return None
    if kind == "as_sym_int":
        return _sym_int(content)
    if kind == "as_sym_ints":
        sizes = [_sym_int(entry) for entry in content]
        return _UNKNOWN if _UNKNOWN in sizes else sizes
    return _UNKNOWN


def _stem(kind: str) -> tuple[str, int]:
    """Return what a kind of argument is a list of, and how many levels of lists: ``as_int_lists`` is two."""
    if kind.endswith("_lists"):
        return kind.removesuffix("_lists"), 2
    return (kind[:-1], 1) if kind.endswith("s") else (kind, 0)


def _plain(content: Any, stem: str, depth: int) -> Any:
    """Return a number, text or truth value, or a list of them, as it stands in the document.

    Raises:
        TypeError: If it is something else.
    """
    if depth:
        if not isinstance(content, list):
            raise TypeError(f"{stem}s is a {type(content).__name__}")
        return [_plain(entry, stem, depth - 1) for entry in content]
    if stem == "as_float" and isinstance(content, str):
        return _INFINITE[content]
    if type(content) not in _PLAIN[stem]:
        raise TypeError(f"{stem} is a {type(content).__name__}")
    return content


def _sym_int(content: Mapping[str, Any]) -> Any:
    return int(content["as_int"]) if "as_int" in content else _UNKNOWN


def _scope(stack: str) -> tuple[str, str | None]:
    """Return the path of the innermost submodule and the kind of boundary it is."""
    last = stack.split(";")[-1]
    parts = last.split(",")
    if len(parts) < 3:
        return "", None
    path, cls = parts[1], parts[2]
    return path, wall_kind(cls)
