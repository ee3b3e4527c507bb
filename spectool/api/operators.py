"""Singular values of one operator given as a map, a matrix, a module or a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spectool.api.devices import choose_device, choose_dtype
from spectool.errors import UsageError
from spectool.linear import FunctionMap, LinearMap, MatrixMap, identity
from spectool.spectrum import Spectrum
from spectool.spectrum import svds as solve


def svds(
    operator: LinearMap | torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
    in_shape: tuple[int, ...] | None = None,
    k: int = 8,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Spectrum:
    """Return the k largest singular values of one operator, each enclosed.

    Args:
        operator: A ``LinearMap``, a matrix ``(m, n)``, or any function that is affine on batches
            ``(b, *in_shape)``, e.g. a layer in evaluation mode. Biases do not matter.
        in_shape: Shape of one input without the batch axis; needed for a function.
        k: How many; clamped to the smaller side.
        device: ``auto``, ``cpu``, ``cuda[:i]`` or ``mps``; used for matrices, and for functions that are no module.
        dtype: ``float32`` or ``float64``.
        **options: As for ``spectool.spectrum.svds``: ``method``, ``tol``, ``max_matvecs``, ``certify``, ``seed``,
            ``vectors``, ``progress``.

    Raises:
        UsageError: If an argument cannot be used.
        OperatorError: If the weights are not finite.

    Example:
        >>> import torch, spectool
        >>> result = spectool.svds(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=2)
        >>> [round(value, 6) for value in result.values]
        [3.0, 2.0]
    """
    if isinstance(operator, torch.Tensor):
        if operator.dim() != 2:
            raise UsageError(
                f"a tensor of shape {tuple(operator.shape)} is no matrix",
                hint="give a function and in_shape=, or reshape it to (out, in)",
            )
        working = torch.float64 if operator.dtype == torch.float64 and dtype is None else choose_dtype(dtype)
        return solve(MatrixMap(operator, dtype=working, device=choose_device(device)), k, **options)
    if isinstance(operator, LinearMap):
        return solve(operator, k, **options)
    if not callable(operator):
        raise UsageError(f"cannot take singular values of a {type(operator).__name__}")
    if in_shape is None:
        raise UsageError(
            "a function needs in_shape=", hint="e.g. in_shape=(3, 32, 32), without the batch axis"
        )
    return solve(function_map(operator, tuple(in_shape), device, dtype), k, **options)


def function_map(
    function: Callable[[torch.Tensor], torch.Tensor],
    in_shape: tuple[int, ...],
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
) -> FunctionMap:
    """Wrap a function or module, on its own device and type where it has parameters."""
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    if parameters and dtype is None:
        found = parameters[0].dtype
        working = found if found in (torch.float32, torch.float64) else torch.float32
    else:
        working = choose_dtype(dtype)
    place = parameters[0].device if parameters else choose_device(device)
    if isinstance(function, torch.nn.Module):
        tensors = (*parameters, *function.buffers())
        return FunctionMap(
            function,
            in_shape,
            dtype=working,
            device=place,
            remake=_module_maker(function),
            identity=identity(tensors, type(function).__name__),
        )
    return FunctionMap(function, in_shape, dtype=working, device=place)


def _module_maker(
    module: torch.nn.Module,
) -> Callable[[torch.dtype, Any], Callable[[torch.Tensor], torch.Tensor]]:
    """Return a maker of the module's function in another type, its own parameters untouched."""

    def remake(dtype: torch.dtype, device: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        state = {
            name: tensor.detach().to(
                device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }

        def function(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.func.functional_call(module, state, (x,))
            return result

        return function

    return remake
