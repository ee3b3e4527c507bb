"""Linear maps: the operators of a network without their bias, as forward and adjoint applications."""

from spectool.linear.compose import Adjoint, Composed, Recast, Reshaped, Scaled, adjoint
from spectool.linear.conv import ConvMap
from spectool.linear.diagonal import DiagonalMap
from spectool.linear.fold import fold
from spectool.linear.function import FunctionMap
from spectool.linear.geometry import ConvGeometry
from spectool.linear.identity import absorb, identity
from spectool.linear.infinite import InfiniteConv
from spectool.linear.magnitude import Magnitude, factors, is_single, magnitude
from spectool.linear.matrix import MatrixMap
from spectool.linear.operations import (
    all_finite,
    dot_test,
    frobenius,
    normal_matvec,
    prescale,
    size,
    to_dense,
)
from spectool.linear.padding import padding_matrix
from spectool.linear.precision import exact_arithmetic
from spectool.linear.protocol import LinearMap
from spectool.linear.scaling import largest
from spectool.linear.separable import SeparableMap

__all__ = [
    "Adjoint",
    "Composed",
    "ConvGeometry",
    "ConvMap",
    "DiagonalMap",
    "FunctionMap",
    "InfiniteConv",
    "LinearMap",
    "Magnitude",
    "MatrixMap",
    "Recast",
    "Reshaped",
    "Scaled",
    "SeparableMap",
    "absorb",
    "adjoint",
    "all_finite",
    "dot_test",
    "exact_arithmetic",
    "factors",
    "fold",
    "frobenius",
    "identity",
    "is_single",
    "largest",
    "magnitude",
    "normal_matvec",
    "padding_matrix",
    "prescale",
    "size",
    "to_dense",
]
