"""Reading the constant arguments of an ONNX operation, which moved from attributes to inputs over the years."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spectool.errors import OperatorError

if TYPE_CHECKING:
    from torch import Tensor

Arguments = Sequence["Tensor | None"]
Attributes = Mapping[str, Any]
Result = "Tensor | tuple[Tensor, ...]"
Implementation = Callable[[Arguments, Attributes, int], Any]


def flowing(arguments: Arguments) -> Tensor:
    """Return the first argument, which has to be there.

    Raises:
        OperatorError: If it is absent.
    """
    if not arguments or arguments[0] is None:
        raise OperatorError("its first input is absent")
    return arguments[0]


def optional(arguments: Arguments, position: int) -> Tensor | None:
    """Return an argument, None where absent."""
    return arguments[position] if position < len(arguments) else None


def integers(arguments: Arguments, position: int, attributes: Attributes, name: str) -> list[int] | None:
    """Return a list of integers given as an input (newer opsets) or as an attribute, None where absent."""
    given = optional(arguments, position)
    if given is not None and given.numel():
        return [int(value) for value in given.detach().cpu().reshape(-1).tolist()]
    if name in attributes:
        value = attributes[name]
        return [int(item) for item in value] if isinstance(value, (tuple, list)) else [int(value)]
    return [] if given is not None else None


def numbers(arguments: Arguments, position: int, attributes: Attributes, name: str) -> list[float] | None:
    """Return a list of numbers given as an input or as an attribute, None where absent or empty."""
    given = optional(arguments, position)
    if given is not None and given.numel():
        return [float(value) for value in given.detach().cpu().reshape(-1).tolist()]
    return [float(value) for value in attributes[name]] if attributes.get(name) else None


def text(attributes: Attributes, name: str, default: str) -> str:
    """Return a string attribute."""
    value = attributes.get(name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def wrapped(axes: Sequence[int], rank: int) -> list[int]:
    """Return axes counted from the front.

    Raises:
        OperatorError: If there is no such axis.
    """
    if any(not -rank <= axis < rank for axis in axes):
        raise OperatorError(f"axes {list(axes)} do not exist in a tensor with {rank} axes")
    return [axis % rank for axis in axes]
