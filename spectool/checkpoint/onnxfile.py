"""ONNX models: initializers and constants of every graph in them, and the data files beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.dtypes import ITEMSIZE, ONNX, ONNX_BITS, STORED_AS
from spectool.checkpoint.inert import MOST_AXES
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.neighbours import is_there, lies_in
from spectool.checkpoint.onnxsize import check_fields, check_nodes
from spectool.checkpoint.read import Reader, find_aliases, row_major
from spectool.checkpoint.source import Source
from spectool.checkpoint.types import Checkpoint, TensorRef
from spectool.errors import CheckpointError, CorruptFile, NothingToAnalyse

if TYPE_CHECKING:
    import onnx
    import torch

_EXTERNAL = 1
_TENSOR = 4
_GRAPH = 5
_GRAPHS = 10
_OPSETS_SINCE = 3
#: One step of a way through nested messages: name of the field, and which of several (None if there is only one).
Step = tuple[str, int | None]
Route = tuple[Step, ...]
_BRANCHES = {"then_branch": "then.", "else_branch": "else."}


def named_tensors(model: onnx.ModelProto) -> list[tuple[str, Any]]:
    """Return every initializer and constant of a model, in all its graphs, under unique checkpoint keys.

    A tensor goes by its own name: an initializer's, or the output of its Constant node. Names that occur more than
    once (SSA only makes them unique per graph) get the prefix of their graph: empty for the main graph,
    ``label.then.`` and ``label.else.`` in the branches of an If, ``label.`` in another body, ``domain.name.`` in a
    local function, after the prefix of the graph around it; the label is the node's name, or its first output. What
    still occurs again gets ``#2``, ``#3``….

    Args:
        model: A loaded model.

    Returns:
        (key, ``TensorProto``, ``SparseTensorProto`` or, for a Constant node that holds plain numbers,
        ``AttributeProto``), in the order of the graphs.
    """
    return [(key, tensor) for key, tensor, _ in placed_tensors(model)]


def placed_tensors(model: onnx.ModelProto) -> list[tuple[str, Any, Route]]:
    """Return what ``named_tensors`` does, each with the way to it from the model's outermost message."""
    found = [
        (prefix, name, tensor, (*route, *rest))
        for prefix, graph, route in _graphs(model)
        for name, tensor, rest in _stored(graph)
    ]
    uses = Counter(name for _, name, _, _ in found)
    taken: Counter[str] = Counter()
    named = []
    for prefix, name, tensor, route in found:
        key = name if uses[name] == 1 else prefix + name
        taken[key] += 1
        named.append((key if taken[key] == 1 else f"{key}#{taken[key]}", tensor, route))
    return named


def _graphs(model: onnx.ModelProto) -> Iterator[tuple[str, Any, Route]]:
    """Yield prefix and graph: the main one, then bodies where their nodes stand, then local functions."""
    pending: list[tuple[str, Any, Route]] = [
        (f"{function.domain}.{function.name}.", function, (("functions", index),))
        for index, function in reversed(list(enumerate(model.functions)))
    ]
    pending.append(("", model.graph, (("graph", None),)))
    while pending:
        prefix, graph, route = pending.pop()
        yield prefix, graph, route
        inner = []
        for place, node in enumerate(graph.node):
            label = node.name or next(iter(node.output), node.op_type)
            # Some exporters write the else branch first.
            attributes = sorted(enumerate(node.attribute), key=lambda item: item[1].name != "then_branch")
            for index, attribute in attributes:
                bodies: list[tuple[Any, Step]] = []
                if attribute.type == _GRAPH:
                    bodies = [(attribute.g, ("g", None))]
                elif attribute.type == _GRAPHS:
                    bodies = [(body, ("graphs", number)) for number, body in enumerate(attribute.graphs)]
                branch = _BRANCHES.get(attribute.name, "") if node.op_type == "If" else ""
                way = (*route, ("node", place), ("attribute", index))
                inner += [(f"{prefix}{label}.{branch}", body, (*way, step)) for body, step in bodies]
        pending += reversed(inner)


def _stored(graph: Any) -> Iterator[tuple[str, Any, Route]]:
    for index, tensor in enumerate(getattr(graph, "initializer", ())):
        yield tensor.name or f"initializer_{index}", tensor, (("initializer", index),)
    for index, sparse in enumerate(getattr(graph, "sparse_initializer", ())):
        yield sparse.values.name, sparse, (("sparse_initializer", index),)
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            name = next(iter(node.output), "") or f"constant_{index}"
            for number, attribute in enumerate(node.attribute):
                way: Route = (("node", index), ("attribute", number))
                if attribute.name == "value":
                    yield name, attribute.t, (*way, ("t", None))
                elif attribute.name == "sparse_value":
                    yield name, attribute.sparse_tensor, (*way, ("sparse_tensor", None))
                elif isinstance(attribute.name, str) and attribute.name.startswith("value_"):
                    yield name, attribute, way


@dataclass
class _Contents:
    """What was found so far in one model."""

    source: Source
    limits: Limits
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    inside: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    files: dict[Path, Source] = field(default_factory=dict)


def open_onnx(source: Source, limits: Limits) -> Checkpoint:
    """Read an ONNX model without its external data.

    Raises:
        CorruptFile: If it is no valid protobuf, or external data is missing, too short or outside the folder.
        LimitExceeded: If the model itself is too large.
        NothingToAnalyse: If it holds no tensor.
    """
    path = source.path
    limits.check("model_bytes", source.size, f"{path}: the ONNX model")
    model = _parse(source, limits)
    contents = _Contents(source, limits)
    check_nodes(model, path, limits)
    _check_names(model, path, limits)
    tensors = named_tensors(model)
    limits.check("names", len(tensors), f"{path}: the number of tensors")
    for key, proto in tensors:
        if hasattr(proto, "data_type"):
            _add_tensor(contents, key, proto)
        elif hasattr(proto, "indices"):
            contents.unread[key] = "a sparse tensor"
        else:
            _add_numbers(contents, key, proto)
    if not (contents.tensors or contents.unread):
        raise NothingToAnalyse(
            f"{path}: an ONNX model without a single tensor", hint="name a model with weights"
        )
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    facts = {"ir_version": model.ir_version, "producer": model.producer_name, "opsets": opsets}
    facts["metadata_props"] = {entry.key: entry.value for entry in model.metadata_props}
    return Checkpoint(
        path,
        "onnx",
        contents.tensors,
        find_aliases(contents.tensors.values()),
        {"onnx": facts},
        model,
        (),
        Reader({path: source, **contents.files}, contents.inside),
        contents.unread,
    )


def _check_names(model: onnx.ModelProto, path: Path, limits: Limits) -> None:
    """Refuse labels that would be repeated before every name of large bodies."""
    characters = 0
    for prefix, graph, _ in _graphs(model):
        names = 1 + len(graph.node) + len(getattr(graph, "initializer", ()))
        characters += len(prefix) * names
        limits.check("name_bytes", characters, f"{path}: its names together")


def _parse(source: Source, limits: Limits) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = onnx.ModelProto()
    data = source.read(0, source.size, "the ONNX model")
    check_fields(data, source.path, limits)
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError) as error:
        raise CorruptFile(
            f"{source.path} begins like an ONNX model but does not parse ({error})",
            hint="copy or download it again",
        ) from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.initializer):
        raise CorruptFile(f"{source.path} begins like an ONNX model but has no graph", hint="copy it again")
    if model.ir_version >= _OPSETS_SINCE and not model.opset_import:
        raise CorruptFile(
            f"{source.path}: the ONNX model does not say which operator set it uses",
            hint="the file was cut short: copy or download it again",
        )
    _check_texts(source.path, model)
    return model


def _check_texts(path: Path, model: Any) -> None:
    """Refuse texts that are no UTF-8: protobuf hands them out as bytes, which nothing that follows expects.

    Raises:
        CorruptFile: Naming the first of them.
    """
    for text in _texts(model):
        if isinstance(text, bytes):
            raise CorruptFile(
                f"{path}: the ONNX model has a name that is no UTF-8 text ({text[:40]!r})",
                hint="copy or download it again",
            )


def _texts(model: Any) -> Iterator[Any]:
    """Yield every text of a model that is more than a comment."""
    yield model.producer_name
    for entry in model.opset_import:
        yield entry.domain
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
    for _, graph, _ in _graphs(model):
        whole = hasattr(graph, "initializer")  # else a function's body
        tensors = (
            [*graph.initializer, *(tensor.values for tensor in graph.sparse_initializer)] if whole else []
        )
        for node in graph.node:
            yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
            for attribute in node.attribute:
                yield from (attribute.name, attribute.ref_attr_name)
                if attribute.type == _TENSOR:
                    tensors.append(attribute.t)
        for tensor in tensors:
            yield tensor.name
            for entry in tensor.external_data:
                yield from (entry.key, entry.value)
        for value in (*graph.input, *graph.output, *graph.value_info) if whole else ():
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)


def _add_tensor(contents: _Contents, key: str, proto: Any) -> None:
    path = contents.source.path
    dtype = ONNX.get(proto.data_type)
    shape = tuple(proto.dims)
    if len(shape) > MOST_AXES:
        raise CorruptFile(f"{path}: tensor {key!r} has the impossible number of {len(shape)} axes")
    if dtype is None or min(shape, default=0) < 0:
        contents.unread[key] = (
            "strings" if proto.data_type == 8 else f"of ONNX type {proto.data_type}, shape {shape}"
        )
        return
    count = 1
    for size in shape:
        count *= size
    bits = ONNX_BITS.get(dtype) or 8 * ITEMSIZE[dtype]
    nbytes = (count * bits + 7) // 8
    stride = row_major(shape)
    if proto.data_location != _EXTERNAL:
        contents.limits.check("model_bytes", nbytes, f"{path}: tensor {key!r}")
        contents.inside[key] = partial(_from_proto, path, key, proto, dtype)
        contents.tensors[key] = TensorRef(key, dtype, shape, stride, path, key, 0, key, nbytes, -1)
        return
    file, offset, length = _external(contents, key, proto)
    if length is not None and length != nbytes:
        raise CorruptFile(
            f"{path}: tensor {key!r} needs {nbytes} bytes of external data, {length} are declared"
        )
    data = contents.files.get(file)
    if data is None:
        data = contents.files[file] = Source(file)
    if offset + nbytes > data.size:
        raise CorruptFile(
            f"{file} ends after {data.size} bytes; tensor {key!r} needs {offset + nbytes}",
            hint="the data file was cut short or belongs to another model: copy it again",
        )
    if dtype in ONNX_BITS:
        contents.unread[key] = f"packed {dtype} in external data"
        return
    storage = f"{file.name}:{offset}"
    contents.tensors[key] = TensorRef(key, dtype, shape, stride, file, "", offset, storage, nbytes)


def _external(contents: _Contents, key: str, proto: Any) -> tuple[Path, int, int | None]:
    """Return file, offset and length of external data; refuse every path that could leave the model's folder."""
    path = contents.source.path
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError:
        offset, length = -1, None
    if offset < 0 or (length is not None and length < 0):
        raise CorruptFile(f"{path}: tensor {key!r} has external data at an impossible offset or length")
    windows = PureWindowsPath(location)
    parts = PurePosixPath(location.replace("\\", "/")).parts
    unsafe = (
        not parts or ".." in parts or location.startswith(("/", "\\")) or windows.drive or "\0" in location
    )
    file = path.parent.joinpath(*parts) if not unsafe else path
    if unsafe or not lies_in(file, path.parent):
        raise CorruptFile(
            f"{path}: external data of tensor {key!r} lies outside the model's folder ({location!r})",
            hint="put the data file beside the model and save the model again",
        )
    literal = path.parent / location
    if literal != file and "\\" in location and is_there(literal) and is_there(file):
        raise CorruptFile(
            f"{path}: external data of tensor {key!r} could lie in two files ({location!r})",
            hint="a backslash is part of a name on this system, a folder on Windows: rename the file",
        )
    if is_there(file) and file.samefile(path):
        raise CorruptFile(
            f"{path}: external data of tensor {key!r} lies in the model itself", hint="save it again"
        )
    if not is_there(file):
        raise CheckpointError(
            f"{path}: external data file {location!r} is missing", hint="copy it into the model's folder"
        )
    return file, offset, length


def _add_numbers(contents: _Contents, key: str, attribute: Any) -> None:
    """Add a Constant node that holds numbers instead of a tensor."""
    kinds = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    dtype = kinds.get(attribute.name)
    if dtype is None:
        contents.unread[key] = "strings"
        return
    many = attribute.name.endswith("s")
    if many:
        values = list(attribute.floats if dtype == "float32" else attribute.ints)
    else:
        values = [attribute.f if dtype == "float32" else attribute.i]
    shape = (len(values),) if many else ()
    path = contents.source.path
    contents.inside[key] = partial(_from_numbers, values, shape, dtype)
    nbytes = len(values) * ITEMSIZE[dtype]
    contents.tensors[key] = TensorRef(key, dtype, shape, row_major(shape), path, key, 0, key, nbytes, -1)


def _from_numbers(values: list[float] | list[int], shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=getattr(torch, dtype)).reshape(shape)


def _from_proto(path: Path, key: str, proto: Any, dtype: str) -> torch.Tensor:
    import numpy as np
    import torch
    from onnx import numpy_helper

    from spectool.checkpoint.dtypes import torch_dtype

    try:
        array = numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise CorruptFile(f"{path}: tensor {key!r} has other bytes than its shape says ({error})") from error
    target = torch_dtype(dtype)
    if dtype in STORED_AS:
        array = array.astype(STORED_AS[dtype])
    elif array.dtype.name not in _NUMPY_TYPES:
        # bfloat16 and float8 come as types that torch does not know; float32 holds all their values exactly.
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, order="C")).to(target).reshape(tuple(proto.dims))


_NUMPY_TYPES = {
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
}
