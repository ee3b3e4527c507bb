"""ATen operations as graph nodes: how a recorded call is stored, and how it is made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from spectool.errors import GraphError
from spectool.graph.types import Call

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Slot:
    """Stands for a node's input in the stored arguments of a call.

    Attributes:
        index: Which of the node's inputs.
    """

    index: int


@cache
def overload(name: str) -> Callable[..., Any]:
    """Return the ATen overload called ``aten.view.default``, say.

    Raises:
        GraphError: If this version of torch has none.
    """
    import torch

    namespace, packet, which = name.split(".", 2)
    try:
        found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), packet), which)
    except AttributeError as error:
        raise GraphError(f"this version of torch has no operation {name}") from error
    return found


def call(op: Call, arguments: Sequence[torch.Tensor | None], *, dtype: torch.dtype | None = None) -> Any:
    """Make a recorded call again with other tensors.

    Args:
        op: The record; its attributes hold ``args`` and ``kwargs`` with ``Slot`` placeholders.
        arguments: What the node reads.
        dtype: Type that takes the place of any floating type the record names (a replay in float64 must not be
            cast down on its way); None keeps what was recorded.
    """
    import torch

    device = next((tensor.device for tensor in arguments if tensor is not None), torch.device("cpu"))

    def fill(value: Any) -> Any:
        if isinstance(value, Slot):
            return arguments[value.index]
        if isinstance(value, torch.device):
            return device
        if isinstance(value, torch.dtype) and value.is_floating_point and dtype is not None:
            return dtype
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, tuple):
            return tuple(fill(item) for item in value)
        return value

    attributes = op.attributes
    positional = [fill(value) for value in attributes["args"]]
    named = {key: fill(value) for key, value in attributes["kwargs"].items()}
    result = overload(op.name)(*positional, **named)
    return tuple(result) if isinstance(result, list) else result
