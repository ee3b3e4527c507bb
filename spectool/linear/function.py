"""Any affine callable, by automatic differentiation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from spectool.errors import OperatorError
from spectool.linear.memory import check_memory
from spectool.linear.scaling import to_double

Function = Callable[[torch.Tensor], torch.Tensor]
Push = Callable[[torch.Tensor], torch.Tensor]
T = TypeVar("T")

_KEPT = 4  # batch sizes whose recordings are kept; a solver uses two or three
# Tracing a cheaper forward pass takes 2 s of imports once, then 0.04–0.2 s per batch size: worth it for the many
# applications of a solver to a map of this many entries in and out. Counts and not measured times decide, because
# equal runs must take equal paths.
_TRACED_ENTRIES = 1 << 15
_TRACED_AFTER = 8


class FunctionMap:
    """The linear part of any affine callable; a bias of any size leaves no trace in it.

    Adjoint by one reverse pass, forward by a second reverse pass through the first; after some applications of
    a large map by ``torch.func.linearize``, which is cheaper but has to be traced. Recordings are made once per
    batch size, so the function itself is not run again. All are exact for affine functions, unlike
    f(x) − f(0), which loses its digits to a large bias.

    Cost in runs of the function, on convolutions: linearize 1.0–1.2, reverse twice 2–3 (15 on depthwise
    ones), ``jvp`` 3.5–8; adjoint from the recording 1.0–1.4, a fresh ``vjp`` 2.5–3.

    The function must treat its leading axis as a batch and do the same at every call. Not differentiable in
    the function's own tensors; those gradients come from the function itself.

    Args:
        function: Affine callable on ``(b, *in_shape)``; an ``nn.Module`` is run as it stands, on detached
            parameters (call ``eval`` first).
        in_shape: Shape of one input.
        dtype: Type of the vectors, and what the function expects. A result in another type is cast back.
        device: Where the function runs.
        remake: Makes the function for another type and device; without it ``to`` returns the map itself.
        identity: What tells it from other functions of its shapes, such as a digest of its weights: start vectors
            depend on it, so that weights cannot be prepared against one.

    Raises:
        OperatorError: If the function fails on a zero input, does not keep the batch axis, or is very large.

    Example:
        >>> A = FunctionMap(lambda x: 2 * x.flip(1) + 1e6, (3,))
        >>> A.matvec(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[6.0, 4.0, 2.0]]
    """

    def __init__(
        self,
        function: Function,
        in_shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        remake: Callable[[torch.dtype, torch.device], Function] | None = None,
        identity: bytes = b"",
    ) -> None:
        self.function, self.remake, self.identity = function, remake, identity
        self.dtype, self.device = dtype, torch.device(device)
        self.in_shape = tuple(int(n) for n in in_shape)
        check_memory("an input", self.device, self.in_shape)
        self._frozen = _freeze(function)
        self._forward: dict[int, tuple[Push, int]] = {}  # batch size → forward, times used
        self._backward: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.no_grad():
            try:
                image = self._frozen(self._zeros(2))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise OperatorError(
                    f"the function fails on an input of shape {self.in_shape}: {error}"
                ) from error
        if not isinstance(image, torch.Tensor) or image.ndim < 1 or image.shape[0] != 2:
            got = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise OperatorError(f"the function does not keep the batch axis: two inputs gave {got}")
        self.out_shape = tuple(int(n) for n in image.shape[1:])
        self._entries = math.prod(self.in_shape) + math.prod(self.out_shape)

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the linear part to ``(b, *in_shape)``; the first call of a batch size records it."""
        b = x.shape[0]
        push, uses = self._forward.get(b, (None, 0))
        if push is None:
            push = self._reverse_twice(b)
        elif uses == _TRACED_AFTER and b * self._entries >= _TRACED_ENTRIES:
            push = self._traced(b) or push
        _keep(self._forward, b, (push, uses + 1))
        return push(x).to(self.dtype)

    def rmatvec(self, y: torch.Tensor) -> torch.Tensor:
        """Apply its adjoint to ``(b, *out_shape)``; the first call with a batch size records the function."""
        return _pull(*self._recording(y.shape[0]), y).to(self.dtype)

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> FunctionMap:
        """Return the map in another precision or place if ``remake`` can make one, else itself."""
        dtype, device = dtype or self.dtype, torch.device(device or self.device)
        if self.remake is None or (dtype, device) == (self.dtype, self.device):
            return self
        return FunctionMap(
            self.remake(dtype, device),
            self.in_shape,
            dtype=dtype,
            device=device,
            remake=self.remake,
            identity=self.identity,
        )

    def affine_defect(self, *, seed: int = 0) -> float:
        """Return ‖f(x) − f(0) − Ax‖ / ‖f(x) − f(0)‖, the worst of 8 random x of size 1 and of size 1000.

        Rounding where the function is affine; a large bias makes the rounding large, about
        1e-7·‖f(0)‖/‖Ax‖ in float32. Costs 8 matvecs and 9 runs of the function.
        """
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((8, *self.in_shape), generator=generator, dtype=torch.float64)
        x[4:] *= 1000  # far enough from the origin to cross the kinks of a network with biases
        x = x.to(self.dtype).to(self.device)
        with torch.no_grad():
            step = self._frozen(x.clone()) - self._frozen(self._zeros(1))
            defect = to_double(step - self.matvec(x)).flatten(1).norm(dim=1)
        size = to_double(step).flatten(1).norm(dim=1)
        return float((defect / torch.where(size > 0, size, 1)).max())

    def all_finite(self) -> bool:
        """Return whether a vector of ones, and its image's way back, stay finite. Costs 2 matvecs."""
        image = self.matvec(self._zeros(1) + 1)
        finite = bool(torch.isfinite(image).all()) and bool(
            torch.isfinite(self.rmatvec(torch.ones_like(image))).all()
        )
        if finite or self.remake is None or self.dtype == torch.float64:
            return finite
        # Sums of weights near float32's end overflow; the weights themselves do not in float64.
        return self.to(dtype=torch.float64, device="cpu" if self.device.type == "mps" else None).all_finite()

    def _zeros(self, b: int) -> torch.Tensor:
        return torch.zeros((b, *self.in_shape), dtype=self.dtype, device=self.device)

    def _recording(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._backward.get(b)
        if found is None:
            with torch.enable_grad():
                root = self._zeros(b).requires_grad_()
                # The clone lets a function work in place on its argument.
                found = (self._frozen(root.clone()), root)
            _keep(self._backward, b, found)
        return found

    def _traced(self, b: int) -> Push | None:
        """Return the recorded forward derivative, or None if some operation has none."""
        # Tracing warns about its own internals (a deprecated torch.jit, .grad of non-leaves).
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                push: Push = torch.func.linearize(self._frozen, self._zeros(b))[1]
                push(self._zeros(b))
            except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
                return None
        return push

    def _reverse_twice(self, b: int) -> Push:
        """Return x ↦ Ax as the derivative of u ↦ Aᵀu, for operations without a forward derivative."""
        image, root = self._recording(b)
        if not image.requires_grad:  # the function does not depend on its argument
            return lambda x: torch.zeros_like(image)
        with torch.enable_grad():
            u = torch.zeros_like(image, requires_grad=True)
            (pulled,) = torch.autograd.grad(image, root, u, create_graph=True)
        return lambda x: _pull(pulled, u, x)


def _pull(output: torch.Tensor, leaf: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    if not output.requires_grad:  # the function does not depend on its argument
        return torch.zeros_like(leaf)
    (pulled,) = torch.autograd.grad(
        output, leaf, vector.to(output.dtype), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return pulled


def _keep(table: dict[int, T], b: int, entry: T) -> None:
    if b not in table and len(table) >= _KEPT:
        del table[next(iter(table))]  # the oldest
    table[b] = entry


def _freeze(function: Function) -> Function:
    """Run a module on detached parameters: recording their gradients costs 1.9–14 times."""
    if not isinstance(function, torch.nn.Module):
        return function
    module = function
    frozen = {name: tensor.detach() for name, tensor in module.named_parameters()}
    frozen.update({name: tensor.detach() for name, tensor in module.named_buffers()})
    return lambda x: torch.func.functional_call(module, frozen, (x,))
