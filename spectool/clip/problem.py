"""What is projected: the constants of some regions, the limits of those regions, and the metric.

A problem holds every region whose weights hang together: one convolution with its batch norm, a chain of two
linear layers, one tensor with two uses. Where one constant is edited, its operators are affine in it and the
problem is convex; where several are, it is not, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from spectool.clip.coordinates import Coordinates
from spectool.clip.family import ConvFamily, Family, MatrixFamily, ScaledFamily, SumFamily
from spectool.clip.replayed import Replayed, region_function
from spectool.clip.split import split
from spectool.clip.turned import TurnedFamily
from spectool.errors import OperatorError
from spectool.graph.types import BatchNorm, Call, Conv, Embedding, Linear, Region
from spectool.graph.writing import Writer
from spectool.linear import ConvGeometry, ConvMap, FunctionMap, InfiniteConv, LinearMap, MatrixMap, fold
from spectool.lower import lower
from spectool.lower.replay import Load, constant_names

_DOUBLE_WORK = 2e6
"""Flops of an application up to which arithmetic is done in float64."""


@dataclass(frozen=True)
class Constraint:
    """One region and its bound."""

    region: Region
    limit: float


@dataclass(frozen=True)
class Problem:
    """Constraints that share edited constants.

    Attributes:
        constraints: Regions and their limits.
        names: The edited constants, as the regions read them.
        load: Reads a constant.
    """

    constraints: tuple[Constraint, ...]
    names: tuple[str, ...]
    load: Load

    @property
    def key(self) -> str:
        """Key of the largest region."""
        return max((c.region for c in self.constraints), key=lambda region: len(region.nodes)).key


def edited_constants(region: Region, writer: Writer | None) -> tuple[str, ...]:
    """Return the constants of a region that a clip may change: kernels and matrices that can be written back.

    Raises:
        OperatorError: If there is a matrix weight and none of them can be written back.
    """
    found: dict[str, None] = {}
    for node in region.nodes:
        if isinstance(node.op, (Conv, Linear, Embedding)):
            found[node.inputs[1]] = None
    if not found:
        constants = set(constant_names(region))
        for node in region.nodes:
            if isinstance(node.op, Call):
                found.update((name, None) for name in node.inputs if name in constants and name)
    if writer is None:
        raise OperatorError(f"{region.key}: nothing can be written back to this source")
    usable = tuple(name for name in found if writer.homes(name) is not None)
    if not usable:
        raise OperatorError(
            f"{region.key} cannot be written back: its weight is computed from stored tensors",
            hint="merge it into plain weights first",
        )
    return usable


def group(
    constraints: Sequence[Constraint], load: Load, writer: Writer | None
) -> tuple[list[Problem], dict[int, str]]:
    """Return problems of constraints that hang together, in order, and why some constraint has none.

    Args:
        constraints: Regions with their limits.
        load: Reads a constant.
        writer: The way back to stored tensors.

    Returns:
        The problems; index of a constraint that cannot be clipped → reason.
    """
    refused: dict[int, str] = {}
    names: dict[int, tuple[str, ...]] = {}
    for index, constraint in enumerate(constraints):
        try:
            names[index] = _floating(edited_constants(constraint.region, writer), load)
            if not names[index]:
                refused[index] = "it has no weight of a real type to change"
        except OperatorError as error:
            refused[index] = error.in_full
    homes = {
        index: {name if writer is None else _home(name, writer) for name in found}
        for index, found in names.items()
        if index not in refused
    }
    problems: list[Problem] = []
    left = sorted(homes)
    while left:
        together, shared, grown = [left.pop(0)], set(), True
        shared = set(homes[together[0]])
        while grown:
            more = [index for index in left if homes[index] & shared]
            for index in more:
                left.remove(index)
                shared |= homes[index]
            together += more
            grown = bool(more)
        together.sort()
        edited = tuple(dict.fromkeys(name for index in together for name in names[index]))
        problems.append(Problem(tuple(constraints[index] for index in together), edited, load))
    return problems, refused


def _home(name: str, writer: Writer) -> str:
    # Different parts of one tensor are independent; one constant is itself wherever it is read.
    homes = writer.homes(name) or (name,)
    return name if "[" in name else homes[0]


def _floating(names: Sequence[str], load: Load) -> tuple[str, ...]:
    return tuple(name for name in names if load(name).is_floating_point() and load(name).dim() >= 1)


# --- one constant -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Closed:
    """What a region is, seen from one constant, where it is one convolution or matrix.

    Attributes:
        kind: ``conv``, ``infinite`` or ``matrix``.
        scale: Factor on every entry of the constant (batch norm, alpha), broadcastable to it; None for 1.
        geometry: Of a convolution.
        in_shape: Of a convolution of known size.
        transposed: Whether the matrix is the transposed constant.
    """

    kind: Literal["conv", "infinite", "matrix"]
    scale: Tensor | None
    geometry: ConvGeometry | None = None
    in_shape: tuple[int, ...] | None = None
    transposed: bool = False


def closed_form(region: Region, name: str, load: Load) -> Closed | None:
    """Return what a region is as a function of one constant, or None if it is no single operator."""
    operators = [node for node in region.nodes if isinstance(node.op, (Conv, Linear, Embedding))]
    if len(operators) != 1 or operators[0].inputs[1] != name:
        return None
    op = operators[0].op
    made = lower(region, load, dtype=torch.float64)
    made = fold(made) if not isinstance(made, InfiniteConv) else made
    scaled = any(isinstance(node.op, BatchNorm) for node in region.nodes) or (
        isinstance(op, Linear) and op.alpha != 1.0
    )
    scale = None
    if isinstance(made, (ConvMap, InfiniteConv)) and isinstance(op, Conv):
        if scaled:
            ones = _lowered(region, name, torch.ones_like(load(name), dtype=torch.float64), load)
            scale = ones.weight
        shape = made.in_shape if isinstance(made, ConvMap) else None
        return Closed("conv" if shape else "infinite", scale, made.geometry, shape)
    if isinstance(made, MatrixMap):
        transposed = isinstance(op, Embedding) or (isinstance(op, Linear) and op.transposed)
        if load(name).dim() != 2:
            return None
        if scaled:
            ones = _lowered(region, name, torch.ones_like(load(name), dtype=torch.float64), load)
            scale = ones.weight.T if transposed else ones.weight
        return Closed("matrix", scale, transposed=transposed)
    return None


def is_matrix(form: Closed | None, weight: Tensor) -> bool:
    """Whether the operator is copies of one matrix: linear, 1×1, or windows that do not overlap."""
    if form is None:
        return False
    if form.kind == "matrix":
        return True
    g = form.geometry
    if form.kind != "conv" or g is None or g.groups > 1:
        return False
    kernel = tuple(weight.shape[2:])
    if max(kernel, default=1) == 1 and not g.transposed and g.padding_mode == "zeros":
        return all(low >= 0 and high >= 0 for low, high in g.padding)
    apart = all(s >= (k - 1) * d + 1 for s, k, d in zip(g.stride, kernel, g.dilation, strict=True))
    return apart and not any(side for pair in g.padding for side in pair)


def is_row_matrix(form: Closed | None, weight: Tensor) -> bool:
    """Whether the matrix has the rows of the weight: not a transposed convolution, whose rows are its columns."""
    if form is None or not is_matrix(form, weight):
        return False
    return form.geometry is None or not form.geometry.transposed


def _lowered(region: Region, name: str, value: Tensor, load: Load) -> ConvMap | MatrixMap | InfiniteConv:
    made = lower(region, lambda wanted: value if wanted == name else load(wanted), dtype=torch.float64)
    made = fold(made) if not isinstance(made, InfiniteConv) else made
    if not isinstance(made, (ConvMap, MatrixMap, InfiniteConv)):
        raise OperatorError(f"{region.key} is no single operator")
    return made


def operator_of(
    region: Region, load: Load, dtype: torch.dtype, device: torch.device
) -> Callable[[Mapping[str, Tensor]], LinearMap]:
    """Return constants ↦ the region's map, differentiable in them."""
    made = lower(region, load, dtype=dtype, device=device)
    if isinstance(made, InfiniteConv):
        raise OperatorError(f"{region.key}: its input size is not known", hint="give --input")
    if not isinstance(made, FunctionMap):

        def closed(weights: Mapping[str, Tensor]) -> LinearMap:
            again = lower(
                region,
                lambda name: weights[name] if name in weights else load(name),
                dtype=dtype,
                device=device,
            )
            if isinstance(again, InfiniteConv):
                raise OperatorError(f"{region.key}: its input size is not known", hint="give --input")
            return again

        return closed
    if region.in_shape is None:
        raise OperatorError(f"{region.key}: its input size is not known", hint="give --input")
    shape = region.in_shape
    function = region_function(region, load, dtype, device)

    def replayed(weights: Mapping[str, Tensor]) -> LinearMap:
        return Replayed(function(weights), shape, dtype, device)

    return replayed


def family_of(
    problem: Problem, coordinates: Coordinates, forms: Sequence[Closed | None], device: torch.device
) -> tuple[Family, float]:
    """Return (operators as a function of x, their common limit) of a problem with one constant.

    Several constraints become the direct sum of their operators over their limits, with limit 1.
    """
    (name,) = problem.names
    dtype = _arithmetic(problem, coordinates)
    families = [
        family_in(constraint.region, name, coordinates, form, problem.load, dtype, device)
        for constraint, form in zip(problem.constraints, forms, strict=True)
    ]
    if len(families) == 1:
        return families[0], problem.constraints[0].limit
    return SumFamily(families, [1.0 / c.limit for c in problem.constraints]), 1.0


def family_in(
    region: Region,
    name: str,
    coordinates: Coordinates,
    form: Closed | None,
    load: Load,
    dtype: torch.dtype,
    device: torch.device,
) -> Family:
    """Return one region as a function of the coordinates x of one of its constants.

    Args:
        region: Of known input shape.
        name: The constant.
        coordinates: Its value and scale.
        form: What the region is, if it is a single operator.
        load: Reads the other constants.
        dtype: Arithmetic type.
        device: Where to compute.

    Raises:
        OperatorError: If the region's input size is not known.
    """
    if coordinates.covariance is not None:
        plain = family_in(region, name, coordinates.plain, form, load, dtype, device)
        return TurnedFamily(plain, coordinates.covariance)
    scale = coordinates.scale
    if form is not None and form.kind == "infinite":
        raise OperatorError(f"{region.key}: its input size is not known", hint="give --input")
    if form is not None and _same(form.scale, scale):
        start = coordinates.start.to(dtype=dtype, device=device)
        if form.kind == "conv" and form.geometry is not None and form.in_shape is not None:
            return ConvFamily(start, form.in_shape, form.geometry)
        if form.kind == "matrix":
            return MatrixFamily(start, transposed=form.transposed)
    weight = coordinates.weight.to(dtype=dtype, device=device)
    family = split(region, name, weight, load, dtype, device)
    if family is None:
        make = operator_of(region, load, dtype, device)

        def build(value: Tensor) -> LinearMap:
            return make({name: value})

        family = Family(build, weight, homogeneous=_homogeneous(build, weight))
    return family if scale is None else ScaledFamily(family, scale)


def uses(region: Region, name: str) -> bool:
    """Return whether a region reads a constant."""
    return any(name in node.inputs for node in region.nodes)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _homogeneous(build: Callable[[Tensor], LinearMap], start: Tensor) -> bool:
    """Whether the operator of weight 0 is 0."""
    A = build(start)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(1, *A.in_shape, generator=source, dtype=torch.float64).to(A.dtype).to(A.device)
    with torch.no_grad():
        full, empty = A.matvec(x), build(torch.zeros_like(start)).matvec(x)
    return float(empty.abs().max()) <= 1e-6 * float(full.abs().max())


def _arithmetic(problem: Problem, coordinates: Coordinates) -> torch.dtype:
    """Return float64 where an application is cheap."""
    work = 0.0
    for constraint in problem.constraints:
        region = constraint.region
        positions = prod(region.out_shape or (1,)) / max(1, coordinates.weight.shape[0])
        work += 2.0 * coordinates.weight.numel() * max(1.0, positions)
    return torch.float64 if work <= _DOUBLE_WORK else torch.float32
