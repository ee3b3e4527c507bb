"""Padding, arithmetic flags, and maps that cannot be built."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from spectool.errors import OperatorError
from spectool.linear import (
    Composed,
    ConvGeometry,
    ConvMap,
    DiagonalMap,
    InfiniteConv,
    LinearMap,
    MatrixMap,
    Reshaped,
    Scaled,
    SeparableMap,
    exact_arithmetic,
    padding_matrix,
)


@pytest.mark.parametrize("mode, name", [("circular", "wrap"), ("reflect", "reflect"), ("replicate", "edge")])
def test_padding_matrix_is_numpy_padding(mode: str, name: str) -> None:
    x = np.arange(1.0, 8.0)
    for lead, trail in ((0, 0), (3, 1), (6, 6), (0, 5)):
        got = padding_matrix(7, lead, trail, mode).numpy() @ x  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, np.pad(x, (lead, trail), mode=name))  # type: ignore[call-overload]
    assert padding_matrix(3, -1, 2).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]


def _flags() -> tuple[object, ...]:
    backends = torch.backends
    return (
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        backends.cudnn.deterministic,
        backends.cudnn.benchmark,
        *(getattr(unit, "fp32_precision", None) for unit in (backends.mkldnn, backends.cuda.matmul)),
    )


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_arithmetic_is_exact_and_leaves_no_trace(precision: str) -> None:
    untouched = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        before = _flags()
        with exact_arithmetic():
            assert _flags()[:5] == (False, False, "highest", True, False)
        assert _flags() == before
        with pytest.raises(KeyError, match="inside"), exact_arithmetic():
            raise KeyError("inside")
        assert _flags() == before
    finally:
        torch.set_float32_matmul_precision(untouched)


GOOD = ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MatrixMap(torch.ones(3)), "a matrix has two axes"),
        (lambda: MatrixMap(torch.ones(0, 3)), "not empty"),
        (lambda: MatrixMap(torch.ones(2, 2, dtype=torch.complex64)), "complex"),
        (lambda: ConvMap(torch.ones(2, 2, 3, 3, dtype=torch.complex64), (2, 5, 5), GOOD), "complex"),
        (lambda: DiagonalMap(torch.ones(3), (4, 3)), "fits neither axis 0 of \\(4, 3\\)"),
        (lambda: SeparableMap(2, (torch.ones(3),)), "each factor must be a matrix"),
        (lambda: ConvMap(torch.ones(2, 2, 3, 3), (2, 5), GOOD), "does not fit weight"),
        (lambda: ConvMap(torch.ones(2, 2, 3, 3), (3, 5, 5), GOOD), "does not take the 3 channels"),
        (lambda: ConvMap(torch.ones(2, 2, 9, 9), (2, 5, 5), GOOD), "output size would be \\(-1, -1\\)"),
        (
            lambda: ConvMap(torch.ones(2, 2, 3, 3), (2, 5, 5), ConvGeometry((1, 1), ((1, 1),), (1, 1))),
            "2 strides, but not as many",
        ),
        (
            lambda: ConvMap(torch.ones(2, 2, 3), (2, 5), ConvGeometry((0,), ((1, 1),), (1,))),
            "must be positive",
        ),
        (
            lambda: ConvMap(torch.ones(2, 2, 3), (2, 5), ConvGeometry((1,), ((5, 5),), (1,), 1, "reflect")),
            "reflect padding of \\(5, 5\\) on an axis of 5 pixels; it can be at most 4",
        ),
        (
            lambda: ConvMap(torch.ones(2, 2, 3), (2, 5), ConvGeometry((1,), ((6, 0),), (1,), 1, "circular")),
            "it can be at most 5",
        ),
        (
            lambda: ConvMap(
                torch.ones(2, 2, 3), (2, 5), ConvGeometry((1,), ((-1, 0),), (1,), 1, "replicate")
            ),
            "replicate padding cannot be negative",
        ),
        (
            lambda: ConvMap(
                torch.ones(2, 2, 3), (2, 5), ConvGeometry((1,), ((1, 1),), (1,), 1, "circular", True)
            ),
            "transposed convolution cannot have circular padding",
        ),
        (
            lambda: ConvMap(
                torch.ones(2, 2, 3), (2, 5), ConvGeometry((1,), ((1, 1),), (1,), output_padding=(1,))
            ),
            "only a transposed convolution has output padding",
        ),
        (lambda: padding_matrix(3, 1, 1, "mirror"), "unknown padding mode 'mirror'"),
        (lambda: Composed(), "at least one map"),
        (
            lambda: Composed(MatrixMap(torch.ones(2, 3)), MatrixMap(torch.ones(4, 5))),
            "do not chain: one gives",
        ),
        (
            lambda: Composed(MatrixMap(torch.ones(2, 3)), MatrixMap(torch.ones(3, 2), dtype=torch.float64)),
            "one works in torch.float64",
        ),
        (lambda: Scaled(MatrixMap(torch.ones(2, 3)), math.inf), "cannot be scaled by inf"),
        (lambda: Reshaped(MatrixMap(torch.ones(2, 3)), in_shape=(4,)), "numbers of entries differ"),
    ],
)
def test_maps_that_cannot_be_built(build: Callable[[], object], message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        build()


def test_infinite_convolution_is_plain_data() -> None:
    conv = InfiniteConv(torch.ones(2, 2, 3), ConvGeometry.plain(1))
    assert conv.weight.shape == (2, 2, 3)
    assert not isinstance(conv, LinearMap)
    with pytest.raises(AttributeError, match="cannot assign"):
        conv.weight = torch.ones(1)  # type: ignore[misc]
