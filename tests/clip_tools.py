"""What the tests of clipping share: regions made by hand, a writer on a dict, and dense truths of stored tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cases import CASES, Case
from dense import Matrix, conv_matrix, conv_transpose_matrix

from spectool.clip import Constraint, Options, Problem, Projected, Stored, group, solve, store
from spectool.graph.types import BatchNorm, Conv, Linear, Node, Region
from spectool.linear import ConvGeometry, ConvMap, MatrixMap

Constants = Mapping[str, torch.Tensor]


class DictWriter:
    """The writer of a plain dict of tensors: every constant is the stored tensor of its name."""

    def __init__(self, constants: Constants) -> None:
        self._constants = dict(constants)

    def homes(self, name):
        return (name,) if name in self._constants else None

    def derived(self, name):
        return None

    def edits(self, updates, read=None):
        return dict(updates)

    def readings(self, stored):
        return (self.reload(stored),)

    def reload(self, stored):
        return lambda name: stored.get(name, self._constants[name])


def region(
    nodes: Sequence[Node], weights: Sequence[str], in_shape, out_shape, *, batched: bool = True
) -> Region:
    """The region that reads ``x`` and writes the last node's output."""
    operators = sum(isinstance(node.op, (Conv, Linear)) for node in nodes)
    level = "layer" if len(nodes) == 1 else "composed"
    return Region(
        key=" + ".join(weights),
        level=level,
        kind="region",
        root="x",
        exit=nodes[-1].outputs[0],
        nodes=tuple(nodes),
        weights=tuple(weights),
        weight_shapes=((),) * len(weights),
        in_shape=in_shape,
        out_shape=out_shape,
        batched=batched,
        operators=operators,
    )


def conv_node(geometry: ConvGeometry, weight="w", source="x", target="y", bias=None) -> Node:
    return Node(target, Conv(geometry), (source, weight, *([bias] if bias else [])), (target,))


def linear_node(weight="w", source="x", target="y", **options) -> Node:
    return Node(target, Linear(**options), (source, weight), (target,))


def norm_node(prefix="n", source="y", target="z", eps=1e-5) -> Node:
    names = tuple(f"{prefix}.{part}" for part in ("gamma", "beta", "mean", "var"))
    return Node(target, BatchNorm(eps), (source, *names), (target,))


def norm_constants(channels: int, prefix="n", seed=0, gamma=None) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(channels, generator=source) if gamma is None else torch.as_tensor(gamma).float()
    return {
        f"{prefix}.gamma": drawn,
        f"{prefix}.beta": torch.randn(channels, generator=source),
        f"{prefix}.mean": torch.randn(channels, generator=source),
        f"{prefix}.var": torch.rand(channels, generator=source) + 0.1,
    }


def norm_scale(constants: Constants, prefix="n", eps=1e-5) -> Matrix:
    gamma, var = (constants[f"{prefix}.{part}"].double().numpy() for part in ("gamma", "var"))
    return gamma / np.sqrt(var + eps)


def geometry(dims=2, *, stride=1, pad=1, dilation=1, groups=1, mode="zeros", transposed=False):
    return ConvGeometry(
        (stride,) * dims, ((pad, pad),) * dims, (dilation,) * dims, groups, mode, transposed, (0,) * dims
    )


@dataclass(frozen=True)
class Clipped:
    """Everything one clip made."""

    problem: Problem
    projected: Projected
    stored: Stored
    constants: Constants

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """All constants as they are stored afterwards."""
        return {**self.constants, **self.stored.edits}

    @property
    def change(self) -> float:
        """In the minimised metric, of what is stored."""
        return self.projected.distance({name: self.stored.load(name).double() for name in self.problem.names})


def clip(
    constraints: Sequence[tuple[Region, float]],
    constants: Constants,
    before: float,
    *,
    exact: bool = False,
    **options,
) -> Clipped:
    """Clip regions that hang together; ``before`` is the largest σ₁ over limit."""
    writer = DictWriter(constants)
    load = constants.__getitem__
    problems, refused = group([Constraint(r, limit) for r, limit in constraints], load, writer)
    assert not refused, refused
    (problem,) = problems
    projected = solve(problem, before, Options(exact=exact, **options))
    stored = store(problem, projected.weights, writer, lambda name: constants[name].dtype, load)
    return Clipped(problem, projected, stored, constants)


@dataclass(frozen=True)
class Subject:
    """One operator of the table that has a weight, and its dense matrix as a function of that weight."""

    name: str
    weight: torch.Tensor
    region: Region
    matrix: Callable[[Matrix], Matrix]
    is_matrix: bool

    def __str__(self) -> str:
        return self.name.replace(" ", "_")

    def sigma(self, weight: torch.Tensor) -> float:
        """σ₁ by a dense float64 SVD; scaled to 1 first, since LAPACK's range ends at 1e±150 or so."""
        dense = self.matrix(weight.detach().double().numpy())
        size = float(np.abs(dense).max(initial=0.0))
        return size * float(np.linalg.svd(dense / size, compute_uv=False)[0]) if size > 0 else 0.0


def subject(case: Case) -> Subject | None:
    """The subject of a case, or None if it is no single matrix or convolution."""
    made = case.build()
    if isinstance(made, MatrixMap):
        weight = _stored(made)
        m, n = weight.shape
        alone = region([linear_node()], ["w"], (n,), (m,))
        return Subject(case.name, weight, alone, lambda w: w, True)
    if isinstance(made, ConvMap):
        weight, g, shape = made.weight, made.geometry, made.in_shape
        alone = region([conv_node(g)], ["w"], shape, made.out_shape)
        return Subject(case.name, weight, alone, functools.partial(conv_dense, size=shape[1:], g=g), False)
    return None


def conv_dense(weight: Matrix, size: Sequence[int], g: ConvGeometry) -> Matrix:
    """The dense matrix of a convolution."""
    if g.transposed:
        return conv_transpose_matrix(
            weight, size, g.stride, g.padding, g.dilation, g.groups, g.output_padding or None
        )
    return conv_matrix(weight, size, g.stride, g.padding, g.dilation, g.groups, g.padding_mode)


def _stored(made: MatrixMap) -> torch.Tensor:
    return made.weight


SUBJECTS: list[Subject] = [found for case in CASES if (found := subject(case)) is not None]
