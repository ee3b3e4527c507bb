"""What single maps promise beyond the contracts of ``test_linear.py``: blocks, gradients, recordings, errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import CASES, case_named

from spectool.errors import OperatorError
from spectool.linear import (
    Composed,
    ConvGeometry,
    ConvMap,
    DiagonalMap,
    FunctionMap,
    LinearMap,
    MatrixMap,
    Recast,
    Reshaped,
    Scaled,
    SeparableMap,
    adjoint,
    all_finite,
    dot_test,
    exact_arithmetic,
    fold,
    frobenius,
    normal_matvec,
    prescale,
    to_dense,
)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- matrices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_blocks_of_rows_give_the_same_products(
    stored: torch.dtype, by_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(70, 90, dtype=stored)
    if by_columns:
        weight = random(90, 70, dtype=stored).T
    exact = weight.double().numpy()
    monkeypatch.setattr("spectool.linear.matrix._SMALL", 0)
    monkeypatch.setattr("spectool.linear.matrix._BLOCK_CPU", 1)  # 16 rows, the least
    A = MatrixMap(weight)
    assert len(list(A._blocks())) > 1
    assert all(block.stride(1) == 1 for block in A._blocks()), "blocks are not runs of memory"
    assert A.weight.data_ptr() == weight.data_ptr(), "the stored weight was copied"
    x, y = random(3, 90, dtype=torch.float32), random(3, 70, dtype=torch.float32, seed=1)
    for got, expected in (
        (A.matvec(x), x.double().numpy() @ exact.T),
        (A.rmatvec(y), y.double().numpy() @ exact),
        (normal_matvec(A, x), x.double().numpy() @ exact.T @ exact),
        (normal_matvec(adjoint(A), y), y.double().numpy() @ exact @ exact.T),
        (normal_matvec(Scaled(A, -3.0), x), 9 * (x.double().numpy() @ exact.T @ exact)),
        (
            normal_matvec(Reshaped(A, in_shape=(9, 10)), x.reshape(3, 9, 10)).flatten(1),
            x.double().numpy() @ exact.T @ exact,
        ),
        (normal_matvec(adjoint(Reshaped(A, in_shape=(9, 10))), y), y.double().numpy() @ exact @ exact.T),
        (normal_matvec(adjoint(Scaled(A, -3.0)), y), 9 * (y.double().numpy() @ exact @ exact.T)),
    ):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(to_dense(A).numpy(), exact, rtol=1e-15)


def test_precision_can_be_raised_again_from_the_stored_weight() -> None:
    weight = random(4, 3, 3, dtype=torch.float64)
    A = ConvMap(weight, (3, 10), ConvGeometry.plain(1)).to(dtype=torch.float32).to(dtype=torch.float64)
    assert torch.equal(A.matvec(random(1, 3, 10)), torch.nn.functional.conv1d(random(1, 3, 10), weight))


# --- gradients with respect to weights --------------------------------------------------------------------


def _conv(
    mode: str, stride: int, transposed: bool, channels: int
) -> tuple[tuple[int, ...], Callable[..., LinearMap]]:
    geometry = ConvGeometry((stride,) * 2, ((1, 2), (2, 0)), (1, 1), 1, mode, transposed)  # type: ignore[arg-type]
    return (channels, channels, 3, 3), lambda w: ConvMap(w, (channels, 6, 7), geometry, dtype=torch.float64)


DIFFERENTIABLE = {
    "matrix": ((6, 7), lambda w: MatrixMap(w, dtype=torch.float64)),
    "matrix upcast": ((6, 7), lambda w: MatrixMap(w.float(), dtype=torch.float64)),
    "diagonal": ((5,), lambda w: DiagonalMap(w, (5, 3), dtype=torch.float64)),
    "separable": ((4, 6), lambda w: SeparableMap(2, (w, torch.ones(1, 3)), dtype=torch.float64)),
    "scaled": ((6, 7), lambda w: Scaled(MatrixMap(w, dtype=torch.float64), 3.0)),
    **{
        f"conv {mode} s{stride} c{channels}{' transposed' * transposed}": _conv(
            mode, stride, transposed, channels
        )
        for mode in ("zeros", "circular", "reflect", "replicate")
        for stride in (1, 2)
        for channels in (2, 9)
        for transposed in (False, True)
        if mode == "zeros" or not transposed
    },
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("backward", [False, True], ids=["matvec", "rmatvec"])
def test_gradient_with_respect_to_the_weight(name: str, backward: bool) -> None:
    shape, build = DIFFERENTIABLE[name]
    exactness = 1e-6 if "upcast" in name else 1e-12

    def product(weight: torch.Tensor) -> torch.Tensor:
        A = build(weight)
        x, y = random(2, *A.in_shape, seed=2), random(2, *A.out_shape, seed=3)
        return (A.rmatvec(y) * x).sum() if backward else (A.matvec(x) * y).sum()

    weight = random(*shape).requires_grad_()
    (gradient,) = torch.autograd.grad(product(weight), weight)
    # ⟨y, A(W)x⟩ is linear in W, so its gradient at one W predicts it at every other.
    other = random(*shape, seed=9)
    assert float((gradient * other).sum()) == pytest.approx(float(product(other)), rel=exactness)
    A = build(other)
    assert not A.matvec(random(1, *A.in_shape)).requires_grad, "a graph was recorded that nobody asked for"


def test_weight_that_requires_a_gradient_may_be_trained() -> None:
    for stride in (1, 2):
        weight = random(4, 9, 3).requires_grad_()
        A = ConvMap(weight, (9, 11), ConvGeometry((stride,), ((1, 1),), (1,)))
        B = MatrixMap(random(5, 6).requires_grad_())
        for map_ in (A, B):
            for _ in range(2):
                assert dot_test(map_) < 1e-6
                (map_.rmatvec(map_.matvec(torch.ones(1, *map_.in_shape)))).sum().backward()
                with torch.no_grad():
                    map_.weight += 1.0
                torch.testing.assert_close(
                    to_dense(map_),
                    to_dense(type(map_)(map_.weight.detach(), *([(9, 11), A.geometry] * (map_ is A)))),
                )
                fresh = map_.to(dtype=torch.float64)
                y = torch.ones(1, *map_.out_shape)
                torch.testing.assert_close(map_.rmatvec(y), fresh.rmatvec(y.double()).float())


@pytest.mark.parametrize("blocks", [False, True])
def test_gradient_through_the_fused_product(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks:
        monkeypatch.setattr("spectool.linear.matrix._SMALL", 0)
        monkeypatch.setattr("spectool.linear.matrix._BLOCK_CPU", 1)
    weight = random(40, 30).requires_grad_()
    x = random(2, 30, seed=1)
    loss = (normal_matvec(MatrixMap(weight, dtype=torch.float64), x) * x).sum()  # ‖Wx‖², gradient 2Wxxᵀ
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, 2 * (weight @ x.T) @ x)


# --- functions --------------------------------------------------------------------------------------------


class NoForwardDerivative(torch.autograd.Function):
    """x ↦ 3x with a reverse derivative only."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return 3 * gradient


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace at the second application already, and every size."""
    monkeypatch.setattr("spectool.linear.function._TRACED_ENTRIES", 0)
    monkeypatch.setattr("spectool.linear.function._TRACED_AFTER", 1)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "function, expected",
    [
        (NoForwardDerivative.apply, 3 * np.eye(4)),
        (lambda x: x.mul_(2).add_(7), 2 * np.eye(4)),
        (lambda x: x, np.eye(4)),
        (lambda x: x.flip(1)[:, :3], np.eye(4)[::-1][:3]),
        (lambda x: torch.full((len(x), 2), 5.0), np.zeros((2, 4))),
        (lambda x: torch.fft.fft(x).real, np.fft.fft(np.eye(4)).real),
        (lambda x: (x.double() @ torch.ones(4, 2).double()) + 1, np.ones((2, 4))),
    ],
    ids=["no forward derivative", "in place", "identity", "views", "constant", "fft", "another type"],
)
def test_functions_of_every_kind(
    function: Callable[[torch.Tensor], torch.Tensor], expected: np.ndarray
) -> None:
    A = FunctionMap(function, (4,))
    for _ in range(3):
        got = A.matvec(torch.eye(4))
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy().T, expected, atol=1e-6)
    np.testing.assert_allclose(A.rmatvec(torch.eye(len(expected))).numpy(), expected, atol=1e-6)


def test_module_is_left_as_it_was() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    A = FunctionMap(module, (6,))
    assert dot_test(A) < 1e-6
    assert not A.matvec(torch.ones(1, 6)).requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_function_without_remake_keeps_its_precision() -> None:
    A = FunctionMap(lambda x: 2 * x, (3,))
    assert A.to(dtype=torch.float64) is A
    assert to_dense(A).dtype == torch.float64
    B = Recast(A, torch.float64)
    assert B.matvec(random(2, 3)).dtype == B.rmatvec(random(2, 3)).dtype == torch.float64
    torch.testing.assert_close(B.matvec(random(2, 3)), 2 * random(2, 3), atol=1e-6, rtol=0)


def test_few_recordings_are_kept() -> None:
    A = FunctionMap(lambda x: 2 * x, (3,))
    for b in range(1, 20):
        A.matvec(torch.ones(b, 3))
        A.rmatvec(torch.ones(b, 3))
    assert max(len(A._forward), len(A._backward)) <= 4


def test_affine_defect_tells_affine_from_not() -> None:
    linear = torch.nn.Linear(10, 10)
    assert FunctionMap(linear, (10,)).affine_defect() < 1e-5
    assert FunctionMap(torch.nn.Sequential(linear, torch.nn.ReLU()), (10,)).affine_defect() > 0.1


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: x.sum(), "does not keep the batch axis: two inputs gave \\(\\)"),
        (lambda x: x[:1], "does not keep the batch axis: two inputs gave \\(1, 3\\)"),
        (lambda x: (x, x), "does not keep the batch axis: two inputs gave tuple"),
        (lambda x: x @ torch.ones(4, 4), "fails on an input of shape \\(3,\\): mat1 and mat2"),
    ],
)
def test_functions_that_are_no_maps(function: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        FunctionMap(function, (3,))


# --- not finite, far out, folded --------------------------------------------------------------------------


def _with(weight: torch.Tensor, value: float) -> torch.Tensor:
    weight = weight.clone()
    weight.view(-1)[weight.numel() // 2] = value
    return weight


KINDS: dict[str, Callable[[torch.Tensor], LinearMap]] = {
    "matrix": lambda w: MatrixMap(w),
    "conv": lambda w: ConvMap(w.reshape(6, 2, 6), (2, 9), ConvGeometry.plain(1)),
    "diagonal": lambda w: DiagonalMap(w.flatten(), (72,)),
    "separable": lambda w: SeparableMap(2, (torch.eye(3, dtype=w.dtype), w)),
    "function": lambda w: FunctionMap(lambda x: x @ w.float(), (8,)),
    "adjoint": lambda w: adjoint(MatrixMap(w)),
    "scaled": lambda w: Scaled(MatrixMap(w), -2.0),
    "reshaped": lambda w: Reshaped(MatrixMap(w), in_shape=(3, 3)),
    "recast": lambda w: Recast(MatrixMap(w), torch.float64),
    "composed": lambda w: Composed(MatrixMap(torch.ones(3, 8)), MatrixMap(w)),
}
SHAPES = {"conv": (6, 12), "function": (8, 9)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64], ids=str)
def test_weights_that_are_not_finite_are_found(kind: str, value: float, stored: torch.dtype) -> None:
    weight = random(*SHAPES.get(kind, (8, 9)), dtype=stored)
    assert all_finite(KINDS[kind](weight))
    spoiled = KINDS[kind](_with(weight, value))
    assert not all_finite(spoiled)
    if kind not in ("function", "composed", "scaled"):
        assert prescale(spoiled)[1] == 1.0


def test_eight_bit_weights() -> None:
    weight = random(8, 9, dtype=torch.float32).to(torch.float8_e4m3fn)
    A = MatrixMap(weight)
    assert all_finite(A)
    assert prescale(A)[1] == 2.0 ** math.floor(math.log2(float(weight.float().abs().max())))
    torch.testing.assert_close(A.matvec(torch.eye(9)).T, weight.float())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "function"])
@pytest.mark.parametrize("exponent", [-200, -60, 60, 100])
def test_weights_beyond_float32_can_be_applied_in_float32(kind: str, exponent: int) -> None:
    weight = random(*SHAPES.get(kind, (8, 9)))
    near, far = KINDS[kind](weight), KINDS[kind](weight * 10.0**exponent)
    B, factor = prescale(far)
    assert factor == pytest.approx(10.0**exponent, rel=30)
    x = random(2, *near.in_shape, dtype=near.dtype)
    expected = near.to(dtype=torch.float64).matvec(x.double())
    got = B.matvec(x).double() * (factor / 10.0**exponent)
    torch.testing.assert_close(got, expected.double(), rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_functions_are_scaled_by_what_a_vector_shows(scale: float) -> None:
    A = FunctionMap(lambda x: x * scale, (5,))
    B, factor = prescale(A)
    assert 0.5 < float(B.matvec(torch.ones(1, 5))[0, 0]) <= 2
    assert float(B.rmatvec(B.matvec(torch.ones(1, 5)))[0, 0]) * factor == pytest.approx(
        scale**2 / factor, rel=1e-5
    )


def test_a_multiple_is_scaled_with_its_factor() -> None:
    B, factor = prescale(Scaled(MatrixMap(torch.tensor([[3e-20]])), -1e30))
    assert -2 < float(B.matvec(torch.ones(1, 1))) <= -0.25
    assert float(B.matvec(torch.ones(1, 1))) * factor == pytest.approx(-3e10, rel=1e-6)


def test_half_types_lose_nothing_when_scaled() -> None:
    weight = torch.tensor([[[60000.0, 5.96e-8, -6.1e-5]]]).half()
    B, factor = prescale(ConvMap(weight, (1, 8), ConvGeometry.plain(1)))
    assert factor == 2.0**15
    assert isinstance(B, ConvMap)
    assert torch.equal(B.weight.double(), weight.double() / factor)


def test_a_zero_map_is_not_scaled() -> None:
    for kind, build in KINDS.items():
        B, factor = prescale(build(torch.zeros(SHAPES.get(kind, (8, 9)))))
        assert factor in (1.0, 2.0), kind  # 2 is the factor of Scaled itself
        assert not B.matvec(torch.ones(1, *B.in_shape)).any()


def test_convolution_and_batch_norm_fold_into_one_convolution() -> None:
    for name in (
        "composed conv and batch norm",
        "composed batch norm before a grouped conv",
        "composed transposed conv and batch norm",
    ):
        case = case_named(name)
        folded = fold(case.build())
        assert isinstance(folded, ConvMap)
        np.testing.assert_allclose(to_dense(folded).numpy(), case.dense(), atol=1e-13)
        assert frobenius(case.build()) == pytest.approx(np.linalg.norm(case.dense()), rel=1e-13)
    case = case_named("composed depthwise, batch norm, pointwise")
    folded = fold(case.build())
    assert isinstance(folded, Composed)
    assert [type(part) for part in folded.maps] == [ConvMap, ConvMap]
    np.testing.assert_allclose(to_dense(folded).numpy(), case.dense(), atol=1e-13)


def test_folding_leaves_what_it_cannot_fold() -> None:
    A = MatrixMap(torch.ones(4, 6))
    assert fold(A) is A
    mask = DiagonalMap(random(2, 3), (2, 3))
    pair = Composed(Reshaped(A, in_shape=(2, 3)), mask)
    assert isinstance(fold(pair), Composed)
    both = fold(Composed(DiagonalMap(torch.tensor([2.0, 3.0]), (2, 3)), mask))
    assert isinstance(both, DiagonalMap)
    torch.testing.assert_close(both.scale, torch.tensor([[2.0], [3.0]]).double() * random(2, 3))


# --- on an accelerator ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_every_case_on_an_accelerator() -> None:
    for case in CASES:
        A, expected = case.build().to(device="cuda"), case.dense()
        x = random(2, *A.in_shape, dtype=torch.float32)
        with exact_arithmetic():
            assert dot_test(A) < 2e-6, case.name
            got = A.matvec(x.cuda()).double().cpu().reshape(2, -1).numpy()
            dense = to_dense(A).cpu().numpy()
        limit = 2e-6 * np.linalg.norm(expected) * float(x.flatten(1).norm(dim=1).max())
        assert np.abs(got - x.double().reshape(2, -1).numpy() @ expected.T).max() <= limit, case.name
        np.testing.assert_allclose(dense, expected, rtol=1e-12, atol=1e-13 * np.abs(expected).max())
