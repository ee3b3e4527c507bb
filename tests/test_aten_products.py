"""Sums of a bias and a product whose bias, matrix or both flow, against the Jacobian of the program itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from spectool.graph.program import survey_module
from spectool.graph.types import Linear, Region, Survey
from spectool.lower import lower

Tensor = torch.Tensor
SIZE = 4


def constant(*shape: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64), requires_grad=False)


class Net(nn.Module):
    """A function of x and three constants."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.w, self.v, self.b = (constant(*shape, seed=seed) for seed, shape in enumerate(shapes))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.v, self.b)


def maximal(found: Survey) -> Region:
    """The one maximal region with all the program's operators."""
    (item,) = [item for item in found.items if isinstance(item, Region) and item.maximal]
    return item


def dense(item: Region, found: Survey) -> np.ndarray:
    operator = lower(item, found.load, dtype=torch.float64)
    basis = torch.eye(int(np.prod(operator.in_shape)), dtype=torch.float64).reshape(-1, *operator.in_shape)
    return operator.matvec(basis).reshape(len(basis), -1).T.numpy()


def truth(net: Net, x: Tensor) -> np.ndarray:
    """The program's matrix by its values alone."""
    base = net(x).reshape(-1)
    columns = []
    for place in range(x.numel()):
        moved = x.clone()
        moved.view(-1)[place] += 1
        columns.append(net(moved).reshape(-1) - base)
    return torch.stack(columns, dim=1).numpy()


SQUARE = ((SIZE, SIZE), (SIZE, SIZE), (SIZE, SIZE))
STACKS = ((2, SIZE, SIZE), (2, SIZE, SIZE), (2, SIZE, SIZE))
ROOT = (SIZE, SIZE)

# Function of (x, w, v, b), shapes of the constants, shape of x.
SUMS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "addmm, bias": (lambda x, w, v, b: torch.addmm(x, w, v, alpha=2, beta=-3) @ b, SQUARE, ROOT),
    "addmm, broadcast bias": (
        lambda x, w, v, b: torch.addmm(x, w, v, beta=0.5) @ b, SQUARE, (SIZE,)),
    "addmm, bias and left": (lambda x, w, v, b: torch.addmm(x, x, w, alpha=2, beta=3) + b, SQUARE, ROOT),
    "addmm, bias and right": (lambda x, w, v, b: torch.addmm(x, w, x, alpha=-2) + b, SQUARE, ROOT),
    "addmm, bias through an operator": (
        lambda x, w, v, b: torch.addmm(x @ v, x, w, beta=0.25), SQUARE, ROOT),
    "addmm, constant bias with a factor": (
        lambda x, w, v, b: torch.addmm(b, x, w, alpha=2, beta=3) @ v, SQUARE, ROOT),
    "addmm, bias without weight": (lambda x, w, v, b: torch.addmm(x, x, w, beta=0) @ v, SQUARE, ROOT),
    "add, factor on what flows": (lambda x, w, v, b: torch.add(b, x, alpha=-3) @ w, SQUARE, ROOT),
    "sub, factor on what flows": (lambda x, w, v, b: torch.sub(b, x @ v, alpha=2) @ w, SQUARE, ROOT),
    "add, factor on both": (lambda x, w, v, b: torch.add(x, x @ v, alpha=2) @ w, SQUARE, ROOT),
    "rsub, factor on what flows": (lambda x, w, v, b: torch.rsub(x @ v, b, alpha=3) @ w, SQUARE, ROOT),
    "addmv, bias and matrix": (
        lambda x, w, v, b: torch.addmv(x[0], x, w[0], alpha=2, beta=3) @ v, SQUARE, ROOT),
    "addmv, bias and vector": (
        lambda x, w, v, b: torch.addmv(x[0], w, x[1], alpha=2, beta=3) @ v, SQUARE, ROOT),
    "baddbmm, bias": (lambda x, w, v, b: torch.baddbmm(x, w, v, alpha=2, beta=-3) @ b, STACKS, (2, *ROOT)),
    "baddbmm, bias and left": (
        lambda x, w, v, b: torch.baddbmm(x, x, w, alpha=2, beta=3) + b, STACKS, (2, *ROOT)),
    "baddbmm, bias and right": (
        lambda x, w, v, b: torch.baddbmm(x, w, x, alpha=0.5) + b, STACKS, (2, *ROOT)),
    "baddbmm, constant bias": (
        lambda x, w, v, b: torch.baddbmm(b, x, w, alpha=2, beta=3) @ v, STACKS, (2, *ROOT)),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_the_region_is_the_whole_program(name: str) -> None:
    function, shapes, shape = SUMS[name]
    net, x = Net(function, *shapes), constant(*shape, seed=9).detach()
    found = survey_module(net, [x])
    item = maximal(found)
    expected = truth(net, x)
    matrix = dense(item, found)
    # A matrix that acts on every row alike has the row of that matrix.
    matrix = np.kron(np.eye(expected.shape[1] // matrix.shape[1]), matrix)
    # Subtracting from a constant turns the sign, which no singular value shows and no row keeps.
    sign = np.sign((matrix * expected).sum()) if name.startswith("sub") else 1.0
    np.testing.assert_allclose(sign * matrix, expected, atol=1e-12 * np.abs(expected).max())


def test_a_factor_belongs_to_the_row_of_its_matrix() -> None:
    """As in ONNX's Gemm: the stored operator is α times its matrix, whatever β does to the bias."""
    net = Net(lambda x, w, v, b: torch.relu(torch.addmm(b, x, w, alpha=2, beta=3)), *SQUARE)
    found = survey_module(net, [constant(*ROOT)])
    (item,) = [item for item in found.items if isinstance(item, Region) and item.level == "layer"]
    assert item.key == "w"
    assert isinstance(item.nodes[0].op, Linear)
    np.testing.assert_allclose(dense(item, found), 2 * net.w.T.numpy(), atol=1e-12)


# Numbers that a program writes itself, and what they multiply w by.
FACTORS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "directly before": (lambda x, w: (x * -3) @ w, -3.0),
    "behind": (lambda x, w: (x @ w) / 4, 0.25),
    "both": (lambda x, w: 2 * ((x / 8) @ w) * 0.5, 0.125),
    "sign": (lambda x, w: (x * -1) @ w, -1.0),
}


@pytest.mark.parametrize("name", FACTORS)
def test_numbers_of_the_program_count(name: str) -> None:
    """Attention scales its queries by a plain number; the maximal region holds it, the layer row does not."""
    function, factor = FACTORS[name]
    net = Net(lambda x, w, v, b: torch.tanh(function(x, w)), *SQUARE)
    found = survey_module(net, [constant(*ROOT)])
    rows = [item for item in found.items if isinstance(item, Region)]
    assert [item.level for item in rows] == (["layer"] if abs(factor) == 1 else ["layer", "composed"])
    np.testing.assert_allclose(dense(rows[0], found), net.w.T.numpy(), atol=1e-12)
    np.testing.assert_allclose(abs(dense(rows[-1], found)), abs(factor * net.w.T.numpy()), atol=1e-12)


def test_rounded_quotients_and_active_dropout_are_boundaries() -> None:
    for function in (
        lambda x, w, v, b: torch.div(x @ w, 2, rounding_mode="floor") @ v,
        lambda x, w, v, b: torch.div(x @ w, b, rounding_mode="trunc") @ v,
        lambda x, w, v, b: torch.dropout(x @ w, 0.5, True) @ v,
    ):
        found = survey_module(Net(function, *SQUARE), [constant(*ROOT)])
        rows = [item for item in found.items if isinstance(item, Region) and item.operators]
        assert [(item.key, item.level) for item in rows] == [("w", "layer"), ("v", "layer")]


def test_biases_of_another_root_and_products_of_two_values_stay_boundaries() -> None:
    other = Net(lambda x, w, v, b: torch.addmm(torch.relu(x), x, w), *SQUARE)
    found = survey_module(other, [constant(*ROOT)])
    assert [(item.key, item.level) for item in found.items] == [("w", "layer")]
    square = Net(lambda x, w, v, b: torch.addmm(b, x, x) @ w, *SQUARE)
    found = survey_module(square, [constant(*ROOT)])
    item = maximal(found)
    assert (item.key, item.level) == ("w", "layer")
    np.testing.assert_allclose(dense(item, found), square.w.T.numpy(), atol=1e-12)
