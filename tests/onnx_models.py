"""ONNX models made by hand, and ONNX Runtime as the other side of every comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from spectool.checkpoint import open_checkpoint
from spectool.graph.onnx import survey_onnx
from spectool.graph.types import Region, Skipped, Survey
from spectool.lower import lower, remake_region

Array = np.ndarray
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def weights(*shape: int, seed: int = 0) -> Array:
    """Random float32 weights."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """One node; names are separated by blanks, ``-`` is an absent input."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), domain=domain, **attributes)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str | None] | None],
    outputs: str,
    tensors: Mapping[str, Array] | None = None,
    types: Mapping[str, int] | None = None,
) -> onnx.GraphProto:
    """A graph; values are float32 unless ``types`` says otherwise."""
    kinds = types or {}

    def info(name: str, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kinds.get(name, FLOAT), shape)

    return helper.make_graph(
        list(nodes),
        "net",
        [info(name, shape) for name, shape in inputs.items()],
        [info(name, None) for name in outputs.split()],
        [numpy_helper.from_array(value, name) for name, value in (tensors or {}).items()],
    )


def model(body: onnx.GraphProto, opset: int = 17, **options: Any) -> onnx.ModelProto:
    """A model; contributed operations of ONNX Runtime are always allowed."""
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    imports += [helper.make_opsetid(domain, 1) for domain in options.pop("domains", ())]
    return helper.make_model(body, opset_imports=imports, ir_version=10 if opset > 20 else 8, **options)


def survey_of(
    proto: onnx.ModelProto,
    folder: Path,
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    computed: Sequence[str] = (),
) -> Survey:
    """Write a model, open it as a user would and survey it.

    Every weight that a row names has to be in the checkpoint, but for those that are ``computed`` from nothing.
    """
    path = folder / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    checkpoint = open_checkpoint(path)
    survey = survey_onnx(checkpoint, inputs=inputs)
    for item in survey.items:
        for name, shape in zip(item.weights, item.weight_shapes, strict=True):
            assert name in computed or checkpoint.tensors[name].shape == shape
    return survey


def keys(survey: Survey) -> list[str]:
    return [item.key for item in survey.items]


def summary(survey: Survey) -> list[tuple[str, str, bool]]:
    """Key, kind and whether it is a maximal region of every row that is analysed."""
    return [(item.key, item.kind, item.maximal) for item in survey.items if isinstance(item, Region)]


def skips(survey: Survey) -> dict[str, Skipped]:
    return {item.key: item for item in survey.items if isinstance(item, Skipped)}


def region(survey: Survey, key: str, level: str = "") -> Region:
    (found,) = [
        item
        for item in survey.items
        if isinstance(item, Region) and item.key == key and level in ("", item.level)
    ]
    return found


def run(
    proto: onnx.ModelProto, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> list[Array]:
    """Run a model with ONNX Runtime."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(outputs, dict(feeds))]


def dense(item: Region, survey: Survey) -> Array:
    """The matrix of a region as it is lowered."""
    operator = lower(item, survey.load, dtype=torch.float64)
    basis = torch.eye(int(np.prod(operator.in_shape)), dtype=torch.float64).reshape(-1, *operator.in_shape)
    return operator.matvec(basis).reshape(len(basis), -1).T.numpy()


def jacobian(function: Callable[[Array], Array], shape: Sequence[int]) -> Array:
    """The matrix of an affine function of float32 arrays, column by column; exact to float32."""
    size = int(np.prod(shape))
    zero = function(np.zeros(shape, np.float32)).astype(np.float64).reshape(-1)
    columns = [
        function(row.reshape(shape)).astype(np.float64).reshape(-1) - zero
        for row in np.eye(size, dtype=np.float32)
    ]
    return np.stack(columns, axis=1)


def jacobian_of(proto: onnx.ModelProto, output: str | None = None) -> Array:
    """The matrix of a whole model with one input of fixed shape, by ONNX Runtime."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    (value,) = [value for value in proto.graph.input if value.name not in stored]
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    names = None if output is None else [output]
    return jacobian(lambda x: run(proto, {value.name: x}, names)[0], shape)


def replayed(item: Region, survey: Survey, x: Array, y: Array) -> Array:
    """f(x) − f(y) of a region run node by node in float64."""
    function = remake_region(item, survey.load)(torch.float64, "cpu")
    both = function(torch.from_numpy(np.stack([x, y])).double())
    return (both[0] - both[1]).numpy()


def spectrum(matrix: Array) -> Array:
    return np.linalg.svd(matrix, compute_uv=False)
