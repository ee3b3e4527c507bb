"""Dense truth for the sample files, made without spectool.

Every operator is written down by hand as a call of ``torch.nn.functional`` in float64, applied to all basis
vectors, and the singular values of the matrix that comes out are LAPACK's. Convolutions of unknown input size
are maximised over continuous frequencies: a fine grid, then a local search.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.linalg import svdvals
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

TOP = 8
GRID = 64  # frequencies per axis of the coarse maximum; a 4-tap kernel has features of width ~2π/4
Shape = tuple[int, ...]
State = Mapping[str, Tensor]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """What a report must say about one operator.

    Attributes:
        layer: Row key.
        level: ``layer`` or ``composed``.
        kind: Kind of the row, empty where it is not laid down.
        matrices: Names of the tensors with a matrix or kernel, in graph order.
        input_shape: Without the batch axis; None for any size.
        output_shape: The same.
        sigma: The largest singular values with multiplicity, at most 8; only σ₁ where the size is not known.
        fro: Frobenius norm of the operator; None where the size is not known.
    """

    layer: str
    level: str
    kind: str
    matrices: tuple[str, ...]
    input_shape: Shape | None
    output_shape: Shape | None
    sigma: tuple[float, ...]
    fro: float | None

    def plain(self) -> dict[str, Any]:
        """Return the row as JSON data."""
        return asdict(self)


def dense(function: Function, in_shape: Shape) -> tuple[np.ndarray, Shape]:
    """Return the float64 matrix (out, in) of an affine function, and its output shape."""
    count = int(np.prod(in_shape))
    offset = function(torch.zeros(1, *in_shape, dtype=torch.float64))
    images = function(torch.eye(count, dtype=torch.float64).reshape(count, *in_shape)) - offset
    return images.reshape(count, -1).T.numpy(), tuple(images.shape[1:])


_KNOWN: dict[bytes, np.ndarray] = {}  # one convolution stands in several lists, and some take ten seconds


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Return all singular values, descending: LAPACK's, or those one can read off a diagonal matrix."""
    if matrix.shape[0] == matrix.shape[1] and np.count_nonzero(matrix - np.diag(np.diag(matrix))) == 0:
        return np.sort(np.abs(np.diag(matrix)))[::-1]
    key = hashlib.sha256(matrix.tobytes()).digest()
    if key not in _KNOWN:
        _KNOWN[key] = svdvals(matrix)
    return _KNOWN[key]


def measured(
    layer: str, function: Function, in_shape: Shape, *matrices: str, level: str = "layer", kind: str = ""
) -> Row:
    """Return the row of an affine function by a dense SVD."""
    matrix, out_shape = dense(function, in_shape)
    sigma = singular_values(matrix)
    fro = float(np.linalg.norm(matrix))
    names = matrices or (layer,)
    return Row(layer, level, kind, names, in_shape, out_shape, tuple(sigma[:TOP].tolist()), fro)


def region(layer: str, function: Function, in_shape: Shape, *matrices: str) -> Row:
    """Return the row of a composition."""
    return measured(layer, function, in_shape, *matrices, level="composed")


# --- convolutions of any size -----------------------------------------------------------------------------


def transfer(weight: np.ndarray, theta: np.ndarray, dilation: int) -> np.ndarray:
    """Return Σ_t W[:, :, t] exp(i·dilation·⟨t, θ⟩) for frequencies ``(f, dims)``, shape ``(f, out, in)``."""
    dims = weight.ndim - 2
    taps = np.array(list(itertools.product(*(range(n) for n in weight.shape[2:]))), dtype=np.float64)
    phases = np.exp(1j * dilation * theta.reshape(-1, dims) @ taps.T)
    return np.einsum("ft,oit->foi", phases, weight.reshape(*weight.shape[:2], -1))


def gain(weight: np.ndarray, phi: np.ndarray, stride: int, dilation: int) -> np.ndarray:
    """Return σ₁ at output frequencies ``(f, dims)``.

    Stride s folds the s^dims input frequencies (φ + 2πj)/s onto one output frequency φ, each with weight
    s^(−dims/2): the symbol is their transfer matrices side by side.
    """
    dims = weight.ndim - 2
    shifts = itertools.product(range(stride), repeat=dims)
    parts = [transfer(weight, (phi + 2 * np.pi * np.array(j)) / stride, dilation) for j in shifts]
    symbol = np.concatenate(parts, axis=2) / stride ** (dims / 2)
    return np.linalg.svd(symbol, compute_uv=False)[:, 0]


def supremum(weight: Tensor, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> float:
    """Return the norm of a convolution on the infinite grid; ``weight`` is (out, in/groups, *k)."""
    return max(_supremum(part.double().numpy(), stride, dilation) for part in weight.chunk(groups))


def _supremum(weight: np.ndarray, stride: int, dilation: int) -> float:
    dims = weight.ndim - 2
    axis = np.arange(GRID) * (2 * np.pi / GRID)
    grid = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"), axis=-1).reshape(-1, dims)
    coarse = gain(weight, grid, stride, dilation)
    best = 0.0
    for start in np.argsort(coarse)[::-1][:12]:
        found = minimize(
            lambda phi: -gain(weight, phi[None, :], stride, dilation)[0],
            grid[start],
            method="Nelder-Mead",
            options={"xatol": 1e-10, "fatol": 1e-14, "initial_simplex": _simplex(grid[start])},
        )
        best = max(best, -float(found.fun))
    return best


def _simplex(point: np.ndarray) -> np.ndarray:
    return np.vstack([point, point + np.eye(len(point)) * (np.pi / GRID)])


def unsized(layer: str, weight: Tensor, kind: str, **geometry: int) -> Row:
    """Return the row of a convolution whose input size is not known."""
    return Row(layer, "layer", kind, (layer,), None, None, (supremum(weight, **geometry),), None)


def unsized_norm(layer: str, state: State) -> Row:
    """Return the row of a batch norm whose input size is not known."""
    scale = state[layer].double() / (state[layer.replace("weight", "running_var")].double() + 1e-5).sqrt()
    return Row(layer, "layer", "batchnorm", (layer,), None, None, (float(scale.abs().max()),), None)


def matrix_row(layer: str, weight: Tensor, kind: str = "linear", *matrices: str) -> Row:
    """Return the row of a matrix."""
    function = partial(F.linear, weight=weight.double())
    return measured(layer, function, (weight.shape[1],), *matrices, kind=kind)


# --- the networks -----------------------------------------------------------------------------------------


def norm(state: State, prefix: str, eps: float = 1e-5) -> Function:
    """Return the evaluation-mode batch norm of a float64 state dict."""
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, gamma, beta = (state[f"{prefix}.{name}"] for name in names)
    return lambda x: F.batch_norm(x, mean, var, gamma, beta, training=False, eps=eps)


def chain(*functions: Function) -> Function:
    """Compose functions; the first one is applied first."""

    def apply(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return apply


# What is in front of each convolution, its input, and what the convolution itself is.
LAYERS: dict[str, tuple[Function | None, Shape, dict[str, Any]]] = {
    "stem": (partial(F.pad, pad=(1, 1, 1, 1), mode="reflect"), (1, 16, 16), {}),
    "mix": (partial(F.pad, pad=(1, 1, 1, 1), mode="circular"), (8, 16, 16), {}),
    "down": (None, (8, 16, 16), {"stride": 2, "padding": 1}),
    "depthwise": (None, (20, 8, 8), {"padding": 1, "groups": 20}),
    "pointwise": (None, (20, 8, 8), {}),
    "dilated": (None, (20, 8, 8), {"padding": 2, "dilation": 2}),
    "project": (None, (20, 8, 8), {"stride": 2, "padding": 1}),
    "shortcut": (None, (20, 8, 8), {"stride": 2}),
    "up": (None, (24, 4, 4), {"stride": 2, "padding": 1}),
}


def cnn_program(state: State, eps: float = 1e-5) -> list[Row]:
    """Return the rows of ``DigitsCNN`` where its program is known, layers first, then compositions.

    ``eps`` is that of its batch norms: ONNX stores it in float32, which moves singular values by up to 2e-12.
    """
    state = {name: tensor.double() for name, tensor in state.items()}
    rows, pairs, functions = [], [], {}
    for name, (pad, in_shape, options) in LAYERS.items():
        kernel, gamma = f"{name}.conv.weight", f"{name}.bn.weight"
        apply = F.conv_transpose2d if name == "up" else F.conv2d
        kind = "conv_transpose2d" if name == "up" else "conv2d"
        convolve, normalise = partial(apply, weight=state[kernel], **options), norm(state, f"{name}.bn", eps)
        # A program shows the padding as an operation of its own: the bare convolution reads a padded input.
        read = tuple(pad(torch.zeros(1, *in_shape)).shape[1:]) if pad else in_shape
        pair = chain(convolve, normalise)
        functions[name] = chain(pad, pair) if pad else pair
        rows.append(measured(kernel, convolve, read, kind=kind))
        rows.append(measured(gamma, normalise, rows[-1].output_shape, kind="batchnorm"))
        joined = f"{kernel} + {gamma}"
        pairs.append(measured(joined, pair, read, kernel, gamma, level="composed", kind=f"{kind}+batchnorm"))
        if pad:
            pairs.append(region(f"{joined}#2", functions[name], in_shape, kernel, gamma))
    head = partial(F.linear, weight=state["head.weight"])
    rows.append(measured("head.weight", head, (192,), kind="linear"))

    def joint(*names: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}.weight" for name in names for part in ("conv", "bn"))

    separable = joint("depthwise", "pointwise")
    function = chain(functions["depthwise"], functions["pointwise"])
    pairs.append(region(" + ".join(separable), function, (20, 8, 8), *separable))
    residual = joint("dilated")
    function = lambda x: functions["dilated"](x) + x  # noqa: E731
    pairs.append(region(" + ".join(residual) + "#2", function, (20, 8, 8), *residual))
    branches = joint("project", "shortcut")
    function = lambda x: functions["project"](x) + functions["shortcut"](x)  # noqa: E731
    pairs.append(region(" + ".join(branches), function, (20, 8, 8), *branches))
    pooled = chain(partial(F.avg_pool2d, kernel_size=2), partial(torch.flatten, start_dim=1), head)
    pairs.append(region("head.weight", pooled, (12, 8, 8), "head.weight"))
    return rows + pairs


def cnn_tensors(state: State) -> list[Row]:
    """Return the rows of ``DigitsCNN`` from its tensors alone: infinite grid, stride 1, one group."""
    rows = []
    for name in LAYERS:
        rows.append(unsized(f"{name}.conv.weight", state[f"{name}.conv.weight"], ""))
        rows.append(unsized_norm(f"{name}.bn.weight", state))
    return [*rows, matrix_row("head.weight", state["head.weight"])]


def cnn_module(state: State) -> list[Row]:
    """Return the rows of ``DigitsCNN`` as a pickled module: infinite grid, but the real geometry."""
    rows = []
    for name, (_, _, options) in LAYERS.items():
        geometry = {key: value for key, value in options.items() if key != "padding"}
        kernel = state[f"{name}.conv.weight"]
        if name == "up":  # its adjoint is a convolution with in and out exchanged, and has the same norm
            rows.append(unsized(f"{name}.conv.weight", kernel, "conv_transpose2d", **geometry))
        else:
            rows.append(unsized(f"{name}.conv.weight", kernel, "conv2d", **geometry))
        rows.append(unsized_norm(f"{name}.bn.weight", state))
    return [*rows, matrix_row("head.weight", state["head.weight"])]


def mlp_tensors(state: State) -> list[Row]:
    """Return the rows of ``DigitsMLP`` from its tensors alone."""
    return [matrix_row(f"fc{i}.weight", state[f"fc{i}.weight"]) for i in (1, 2, 3, 4)]


def mlp_program(state: State) -> list[Row]:
    """Return the rows of ``DigitsMLP`` where its program is known."""
    product = state["fc3.weight"].double() @ state["fc2.weight"].double()
    names = ("fc2.weight", "fc3.weight")
    joined = region(" + ".join(names), partial(F.linear, weight=product), (48,), *names)
    return [*mlp_tensors(state), joined]


def sequential_program(state: State) -> list[Row]:
    """Return the rows of ``digits_sequential`` for inputs (1, 16, 16)."""
    state = {name: tensor.double() for name, tensor in state.items()}
    rows, pairs = [], []
    geometries = {
        0: ((1, 16, 16), {"padding": 1}),
        3: ((6, 16, 16), {"stride": 2, "padding": 1, "groups": 2}),
    }
    for index, (in_shape, options) in geometries.items():
        kernel, gamma = f"features.{index}.weight", f"features.{index + 1}.weight"
        convolve = partial(F.conv2d, weight=state[kernel], **options)
        normalise = norm(state, f"features.{index + 1}")
        rows.append(measured(kernel, convolve, in_shape, kind="conv2d"))
        rows.append(measured(gamma, normalise, rows[-1].output_shape, kind="batchnorm"))
        pair = measured(
            f"{kernel} + {gamma}",
            chain(convolve, normalise),
            in_shape,
            kernel,
            gamma,
            level="composed",
            kind="conv2d+batchnorm",
        )
        pairs.append(pair)
    rows += [matrix_row(f"{name}.weight", state[f"{name}.weight"]) for name in ("wide", "last")]
    product = state["last.weight"] @ state["wide.weight"]
    linear = partial(F.linear, weight=product)
    pooled = chain(partial(F.avg_pool2d, kernel_size=2), torch.nn.Flatten(), linear)
    names = ("wide.weight", "last.weight")
    return [*rows, *pairs, region(" + ".join(names), pooled, (12, 8, 8), *names)]
