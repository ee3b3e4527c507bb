"""Torch implementations of ONNX operations against ONNX Runtime and onnx's own reference implementation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from spectool.errors import OperatorError
from spectool.graph.rules import ONNX_RULES
from spectool.lower.onnx_ops import OPS

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One operation: shape of the input that flows, and everything else constant."""

    op: str
    opset: int
    shape: tuple[int, ...]
    constants: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    truth: str | Callable[[Array], Array] = "ort"
    at: int = 0

    @property
    def name(self) -> str:
        settings = "-".join(f"{key}={value}" for key, value in self.attributes.items())
        return f"{self.op}-{self.opset}-{'x'.join(map(str, self.shape))}-{settings}"


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


EMPTY = floats()

LAYOUT = [
    Case("Identity", 13, (2, 3)),
    Case("Neg", 13, (2, 3)),
    Case("Cast", 13, (2, 3), attributes={"to": TensorProto.FLOAT}),
    Case("CastLike", 15, (2, 3), (floats(0.0),)),
    Case("Dropout", 13, (2, 3)),
    Case("Dropout", 7, (2, 3), attributes={"ratio": 0.4}),
    Case("Transpose", 13, (2, 3, 4)),
    Case("Transpose", 13, (2, 3, 4), attributes={"perm": [1, 2, 0]}),
    Case("Reshape", 13, (2, 3, 4), (ints(0, -1),)),
    Case("Reshape", 13, (2, 3, 4), (ints(4, 0, 2),)),
    Case("Reshape", 14, (2, 3, 4), (ints(2, 12),), {"allowzero": 1}),
    Case("Reshape", 1, (2, 3, 4), attributes={"shape": [4, 0, -1]}, truth=lambda x: x.reshape(4, 3, -1)),
    *(Case("Flatten", 13, (2, 3, 4), attributes={"axis": axis}) for axis in (0, 1, 2, 3, -1)),
    Case("Squeeze", 13, (1, 3, 1, 2), (ints(0, -2),)),
    Case("Squeeze", 13, (1, 3, 1, 2)),
    Case("Squeeze", 11, (1, 3, 1, 2), attributes={"axes": [2]}),
    Case("Unsqueeze", 13, (3, 2), (ints(0, -1, 2),)),
    Case("Unsqueeze", 11, (3, 2), attributes={"axes": [1, 3]}),
    Case("Concat", 13, (2, 3), (floats(1, 2).reshape(2, 1),), {"axis": -1}),
    Case("Split", 13, (2, 7), (ints(1, 4, 2),), {"axis": 1}, outputs=3),
    Case("Split", 11, (2, 6), attributes={"axis": -1, "split": [2, 4]}, outputs=2),
    Case("Split", 18, (2, 7), attributes={"axis": 1, "num_outputs": 3}, outputs=3),
    Case("Slice", 13, (5, 6), (ints(1, -3), ints(4, 2**62), ints(0, 1))),
    Case("Slice", 13, (5, 6), (ints(-1, 5), ints(-(2**62), 1), ints(0, 1), ints(-1, -2))),
    Case("Slice", 13, (5, 6), (ints(0, 1), ints(100, 100), ints(-2, -1), ints(2, 3))),
    Case("Slice", 13, (5, 6), (ints(-100), ints(3))),
    Case("Slice", 9, (5, 6), attributes={"starts": [1], "ends": [-1], "axes": [1]}),
    Case("Slice", 9, (5, 6), attributes={"starts": [1, 2], "ends": [3, 9]}),
    Case("Gather", 13, (4, 5), (ints(0, -1, 2).reshape(1, 3),), {"axis": 1}),
    Case("Gather", 13, (4, 5), (np.array(2, np.int64),)),
    Case("Gather", 13, (4, 5), (ints(0, 0, 3),), {"axis": -1}),
    Case("GatherElements", 13, (3, 4), (ints(0, 2, -1, 1, 0, 0).reshape(2, 3),), {"axis": 0}),
    Case("GatherElements", 13, (3, 4), (ints(3, -4, 1).reshape(3, 1),), {"axis": -1}),
    Case("GatherND", 13, (3, 4, 2), (ints(0, 1, 2, -1).reshape(2, 2),)),
    Case("GatherND", 13, (2, 3, 4), (ints(0, 2).reshape(2, 1),), {"batch_dims": 1}),
    Case("GatherND", 13, (2, 3, 4), (ints(0, 1, 2, -1, 0, 0, 1, 3).reshape(2, 2, 2),), {"batch_dims": 1}),
    Case("Pad", 13, (2, 5), (ints(0, 1, 1, 2),)),
    Case("Pad", 13, (2, 5), (ints(0, -1, 1, -2),)),
    Case("Pad", 13, (2, 5), (ints(0, 4, 0, 3),), {"mode": "reflect"}),
    Case("Pad", 13, (2, 3, 5), (ints(1, 2, 2, 0, 1, 4),), {"mode": "edge"}),
    Case("Pad", 19, (2, 5), (ints(1, 3, 1, 4),), {"mode": "wrap"}),
    Case("Pad", 18, (2, 3, 5), (ints(1, 2, 0, 1), None, ints(2, 0)), {"mode": "edge"}),
    Case("Pad", 18, (2, 3, 5), (ints(1, 2), floats(0.0).reshape(()), ints(-1))),
    Case("Pad", 2, (2, 5), attributes={"pads": [0, 1, 1, 2], "mode": "reflect"}),
    Case("CenterCropPad", 18, (5, 6), (ints(8, 3),), truth="reference"),
    Case("CenterCropPad", 18, (5, 6, 4), (ints(2, 7),), {"axes": [-1, 0]}, truth="reference"),
    Case("Expand", 13, (3, 1), (ints(2, 1, 4),)),
    Case("Expand", 13, (2, 3, 4), (ints(3, 1),)),
    Case("Tile", 13, (2, 3), (ints(2, 3),)),
    Case("Trilu", 14, (4, 5), (np.array(1, np.int64),)),
    Case("Trilu", 14, (2, 4, 5), (np.array(-1, np.int64),), {"upper": 0}),
    Case("Where", 16, (2, 3), (np.array([[True, False, True]]), floats(1, 2, 3)), at=1),
    Case("DepthToSpace", 13, (1, 12, 2, 3), attributes={"blocksize": 2}),
    Case("DepthToSpace", 13, (1, 12, 2, 3), attributes={"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", 13, (2, 3, 4, 6), attributes={"blocksize": 2}),
]

ARITHMETIC = [
    *(Case(op, 14, (2, 3), (floats(1.5, -2, 3),)) for op in ("Add", "Sub", "Mul", "Div")),
    *(Case(op, 14, (2, 1), (floats(1.5, -2, 3),), at=1) for op in ("Add", "Sub", "Mul")),
    # ONNX Runtime no longer has the explicit broadcasting of opset 6.
    Case(
        "Add", 6, (2, 3, 4), (floats(1, 2, 3),), {"broadcast": 1, "axis": 1},
        truth=lambda x: x + floats(1, 2, 3)[None, :, None],
    ),
    Case("Mul", 6, (2, 3, 4), (floats(1, 2, 3, 4),), {"broadcast": 1}, truth=lambda x: x * floats(1, 2, 3, 4)),
    Case("Sum", 13, (2, 3), (floats(1, 2, 3), floats(4, 5).reshape(2, 1))),
    Case("Mean", 13, (2, 3), (floats(1, 2, 3), floats(4, 5).reshape(2, 1))),
    Case("MatMul", 13, (2, 3, 4), (np.arange(20, dtype=np.float32).reshape(4, 5),)),
    Case("MatMul", 13, (4, 5), (np.arange(12, dtype=np.float32).reshape(3, 4),), at=1),
    Case("MatMul", 13, (2, 3, 4), (np.arange(40, dtype=np.float32).reshape(2, 4, 5),)),
    Case("Einsum", 12, (2, 3, 4), (np.arange(20, dtype=np.float32).reshape(4, 5),), {"equation": "bij, jk -> bki"}),
    Case("Einsum", 12, (2, 3, 4), (np.arange(24, dtype=np.float32).reshape(2, 3, 4),), {"equation": "...i,...i"}),
    *(
        Case(op, opset, (2, 3, 4), constants, attributes)
        for op in ("ReduceMean", "ReduceSum")
        for opset, constants, attributes in (
            (18, (ints(-1, 0),), {"keepdims": 1}),
            (18, (ints(1),), {"keepdims": 0}),
            (18, (), {"keepdims": 0}),
            (18, (), {"noop_with_empty_axes": 1}),
            (18, (ints(),), {"noop_with_empty_axes": 1}),
            (11, (), {"axes": [1, -1], "keepdims": 0}),
            (11, (), {}),
        )
    ),
    *(
        Case("CumSum", 14, (3, 4), (np.array(axis, np.int64),), {"exclusive": exclusive, "reverse": reverse})
        for axis, exclusive, reverse in ((0, 0, 0), (-1, 1, 0), (1, 0, 1), (0, 1, 1))
    ),
    Case("Col2Im", 18, (2, 12, 6), (ints(3, 4), ints(2, 2)), truth="reference"),
    Case("Col2Im", 18, (1, 9, 4), (ints(5, 5), ints(3, 3)), {"strides": [2, 2]}, truth="reference"),
    Case(
        "Col2Im", 18, (1, 4, 16), (ints(5, 5), ints(2, 2)), {"dilations": [2, 2], "pads": [1, 0, 0, 1]},
        truth="reference",
    ),
    Case("Col2Im", 18, (1, 6, 3), (ints(4), ints(2)), truth="reference"),
]  # fmt: skip

POOLS = [
    Case("GlobalAveragePool", 13, (2, 3, 4, 5)),
    Case("GlobalAveragePool", 13, (1, 3, 7)),
    Case("AveragePool", 11, (1, 2, 40), attributes={"kernel_shape": [39]}),
    *(
        Case(
            "AveragePool",
            opset,
            shape,
            attributes={"kernel_shape": kernel, **more, "count_include_pad": count},
        )
        for count in (0, 1)
        for opset, shape, kernel, more in (
            (11, (1, 2, 7), [3], {"strides": [2], "pads": [1, 1]}),
            (11, (2, 2, 6, 7), [3, 2], {"strides": [2, 1], "pads": [1, 0, 0, 1]}),
            (11, (1, 2, 6, 7), [3, 3], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
            (11, (1, 2, 6, 7), [2, 4], {"strides": [1, 3], "auto_pad": "SAME_LOWER"}),
            (11, (1, 2, 6, 7), [3, 3], {"auto_pad": "VALID"}),
            (19, (1, 2, 7, 8), [2, 3], {"dilations": [2, 2], "pads": [1, 1, 1, 1]}),
            (19, (1, 2, 7), [3], {"strides": [2], "ceil_mode": 1}),
            (19, (1, 2, 8), [3], {"strides": [2], "ceil_mode": 1}),
            (19, (1, 2, 5), [1], {"strides": [3], "ceil_mode": 1, "pads": [0, 0]}),
            (19, (1, 2, 4, 5, 3), [2, 2, 2], {"strides": [1, 2, 1], "pads": [0, 1, 1, 1, 0, 0]}),
        )
    ),
]

MODES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "asymmetric", "align_corners")
RESIZES = [
    *(
        Case(
            "Resize", 19, (1, 2, 5, 4), (EMPTY, EMPTY, ints(1, 2, 8, 3)),
            {"mode": mode, "coordinate_transformation_mode": transformation},
        )
        for mode in ("nearest", "linear", "cubic")
        for transformation in MODES
    ),
    *(
        Case(
            "Resize", 13, (1, 1, 6, 5), (EMPTY, floats(1, 1, 0.5, 1.7)),
            {"mode": "nearest", "nearest_mode": rounding, "coordinate_transformation_mode": transformation},
        )
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        for transformation in ("half_pixel", "asymmetric")
    ),
    Case("Resize", 13, (1, 1, 4, 5), (EMPTY, floats(1, 1, 2, 1.5)), {"mode": "linear"}),
    Case("Resize", 13, (1, 1, 4, 5), (EMPTY, EMPTY, ints(1, 1, 1, 9)), {
        "mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel",
    }),
    Case("Resize", 13, (1, 1, 4, 5), (EMPTY, floats(1, 1, 2, 0.8)), {"mode": "cubic", "exclude_outside": 1}),
    Case("Resize", 13, (1, 1, 4, 5), (EMPTY, floats(1, 1, 2, 1.6)), {"mode": "cubic", "cubic_coeff_a": -0.5}),
    Case("Resize", 13, (1, 1, 4, 5), (floats(0, 0, 0.2, -0.3, 1, 1, 0.9, 1.1), EMPTY, ints(1, 1, 5, 7)), {
        "mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize",
    }),
    # ONNX Runtime forgets the region along an axis that keeps its length.
    Case("Resize", 13, (1, 1, 4, 5), (floats(0, 0, 0.2, 0.3, 1, 1, 0.8, 0.6), EMPTY, ints(1, 1, 4, 1)), {
        "mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize",
    }, truth="reference"),
    Case("Resize", 18, (1, 2, 5, 4), (None, None, ints(7, 9)), {
        "mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": "not_larger",
    }),
    Case("Resize", 18, (1, 2, 5, 4), (None, None, ints(7, 9)), {
        "mode": "nearest", "axes": [2, 3], "keep_aspect_ratio_policy": "not_smaller",
    }),
    Case("Resize", 10, (1, 1, 4, 5), (floats(1, 1, 2, 1.5),), {"mode": "nearest"}),
    Case("Resize", 10, (1, 1, 4, 5), (floats(1, 1, 2, 3),), {"mode": "linear"}),
    Case("Resize", 10, (1, 1, 6, 5), (floats(1, 1, 0.5, 0.6),), {"mode": "nearest"}),
    Case("Upsample", 9, (1, 2, 3, 4), (floats(1, 1, 2, 3),), {"mode": "nearest"}),
    Case("Upsample", 9, (1, 2, 3, 4), (floats(1, 1, 2, 1.5),), {"mode": "linear"}),
    Case("Upsample", 7, (1, 2, 3, 4), attributes={"mode": "nearest", "scales": [1.0, 1.0, 2.0, 2.0]}),
    Case("Resize", 13, (1, 1, 10), (EMPTY, floats(1, 1, 2.3)), {"mode": "linear"}),
]  # fmt: skip

PLACES = ints(0, 2, 1, 3).reshape(2, 2)
SCATTERS = [
    Case("ScatterND", 13, (3, 4, 2), (PLACES, floats(1, 2, 3, 4).reshape(2, 2))),
    Case("ScatterND", 18, (3, 4, 2), (ints(2, -3).reshape(2, 1), np.ones((2, 4, 2), np.float32))),
    Case("ScatterND", 16, (2, 2), (np.zeros((3, 4, 2), np.float32), PLACES), at=2),
    Case("ScatterND", 16, (2, 2), (np.ones((3, 4, 2), np.float32), ints(1, 1, 1, 1).reshape(2, 2)),
         {"reduction": "add"}, at=2),
    Case("ScatterElements", 13, (3, 4), (ints(1, 3, 0, 2).reshape(2, 2), floats(1, 2, 3, 4).reshape(2, 2)),
         {"axis": 1}),
    Case("ScatterElements", 18, (2, 3), (np.ones((4, 3), np.float32), ints(0, 3, -1, 0, 1, 2).reshape(2, 3)),
         {"axis": -2, "reduction": "add"}, at=2),
    Case("Scatter", 9, (3, 4), (ints(1, 0, 2).reshape(1, 3), floats(1, 2, 3).reshape(1, 3)),
         truth=lambda x: _scattered(x)),
    Case("ReverseSequence", 10, (5, 3, 2), (ints(2, 5, 1),)),
    Case("ReverseSequence", 10, (3, 5, 2), (ints(4, 1, 5),), {"time_axis": 1, "batch_axis": 0}),
    Case("Compress", 11, (3, 4), (np.array([True, False, True]),), {"axis": -2}),
    Case("Compress", 9, (2, 3), (np.array([False, True, True, False, True]),)),
]  # fmt: skip


def _scattered(x: Array) -> Array:
    y = x.copy()
    y[[1, 0, 2], [0, 1, 2]] = [1, 2, 3]
    return y


CASES = [*LAYOUT, *ARITHMETIC, *POOLS, *RESIZES, *SCATTERS]


def model_of(case: Case) -> tuple[onnx.ModelProto, list[str]]:
    """Return a model of one node whose flowing input is a graph input and whose constants are initializers."""
    constants = list(case.constants)
    names = [f"c{index}" if value is not None else "" for index, value in enumerate(constants)]
    inputs = [*names[: case.at], "x", *names[case.at :]]
    outputs = [f"y{index}" for index in range(case.outputs)]
    node = helper.make_node(case.op, inputs, outputs, **case.attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(v, n) for v, n in zip(constants, names, strict=True) if v is not None],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=8)
    return model, outputs


def truth_of(case: Case, x: Array) -> list[Array]:
    if callable(case.truth):
        return [case.truth(x)]
    model, _ = model_of(case)
    if case.truth == "reference":
        return [np.asarray(y) for y in ReferenceEvaluator(model).run(None, {"x": x})]
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, {"x": x})]


def apply(case: Case, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    constants: list[torch.Tensor | None] = []
    for value in case.constants:
        tensor = None if value is None else torch.from_numpy(value)
        constants.append(tensor.to(x.dtype) if tensor is not None and tensor.is_floating_point() else tensor)
    arguments = [*constants[: case.at], x, *constants[case.at :]]
    result = OPS[f"onnx.{case.op}"](arguments, case.attributes, case.opset)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operation_equals_onnxruntime(case: Case) -> None:
    x = np.random.default_rng(1).standard_normal(case.shape).astype(np.float32)
    expected = truth_of(case, x)
    got = apply(case, torch.from_numpy(x))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert tuple(ours.shape) == theirs.shape
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operation_is_affine_under_vmap_jvp_and_vjp(case: Case) -> None:
    """Batches equal single samples, jvp is the difference of two values, and vjp is its adjoint."""
    generator = torch.Generator().manual_seed(2)
    x, v, w = torch.randn(3, *case.shape, dtype=torch.float64, generator=generator)

    def function(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([y.reshape(-1) for y in apply(case, z)])

    batch = torch.stack([x, v, w])
    together = torch.func.vmap(function)(batch)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch loads its jvp rules with a deprecated torch.jit
        torch.func.jvp(torch.sin, (x,), (v,))
    assert torch.equal(together[1], function(v)) or torch.allclose(together[1], function(v), atol=1e-12)
    value, forward = torch.func.jvp(function, (x,), (v,))
    torch.testing.assert_close(forward, function(x + v) - value, rtol=0, atol=1e-10)
    u = torch.randn(value.shape, dtype=torch.float64, generator=generator)
    (backward,) = torch.func.vjp(function, x)[1](u)
    assert abs(float(forward @ u) - float((v * backward).sum())) <= 1e-10 * (
        1 + float(forward.norm() * u.norm())
    )
    many = torch.func.vmap(lambda z: torch.func.jvp(function, (x,), (z,))[1])(batch)
    torch.testing.assert_close(many[1], forward, rtol=0, atol=1e-10)


def test_every_rule_that_flows_has_an_implementation() -> None:
    affine = {name for name, rule in ONNX_RULES.items() if rule.how != "shape"}
    assert affine == set(OPS)
    assert {f"onnx.{case.op}" for case in CASES} == set(OPS)


def test_what_cannot_be_replayed_says_why() -> None:
    x = torch.zeros(1, 1, 4)
    with pytest.raises(OperatorError, match="antialiased"):
        OPS["onnx.Resize"]([x, None, torch.tensor([1.0, 1.0, 2.0])], {"antialias": 1}, 18)
    with pytest.raises(OperatorError, match="without scales and sizes"):
        OPS["onnx.Resize"]([x], {"mode": "linear"}, 18)
    with pytest.raises(OperatorError, match="'wavelet' is not supported"):
        OPS["onnx.Resize"]([x, None, torch.tensor([1.0, 1.0, 2.0])], {"mode": "wavelet"}, 18)
    with pytest.raises(OperatorError, match="padding mode 'odd'"):
        OPS["onnx.Pad"]([x, torch.tensor([0, 0, 1, 0, 0, 1])], {"mode": "odd"}, 18)
    with pytest.raises(OperatorError, match="do not exist"):
        OPS["onnx.Squeeze"]([x, torch.tensor([5])], {}, 13)
    for op in ("onnx.ScatterND", "onnx.ScatterElements"):
        with pytest.raises(OperatorError, match="reduces by 'max' is not linear"):
            OPS[op]([x, torch.zeros(1, 1, 1, dtype=torch.long), x[:1, :1, :1]], {"reduction": "max"}, 18)
        with pytest.raises(OperatorError, match="a scatter without indices"):
            OPS[op]([x, None, x], {}, 18)
    with pytest.raises(OperatorError, match="Compress without a condition"):
        OPS["onnx.Compress"]([x], {}, 11)
    with pytest.raises(OperatorError, match="first input is absent"):
        OPS["onnx.Neg"]([None], {}, 13)


def test_casts_keep_the_arithmetic_type() -> None:
    x = torch.full((2,), 1.0 + 2.0**-40, dtype=torch.float64)
    assert torch.equal(OPS["onnx.Cast"]([x], {"to": TensorProto.FLOAT16}, 13), x)


def test_reflection_folds_as_often_as_it_takes() -> None:
    """ONNX Runtime refuses reflections wider than the input; numpy defines them."""
    x = np.arange(4.0)
    got = OPS["onnx.Pad"]([torch.from_numpy(x), torch.tensor([9, 11])], {"mode": "reflect"}, 13)
    np.testing.assert_array_equal(got.numpy(), np.pad(x, (9, 11), mode="reflect"))
