"""What TorchScript's operators mean on numbers, strings, lists and dicts; tensors go to ATen instead."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spectool.errors import GraphError


def _divide(a: Any, b: Any) -> float:
    return float(a / b)


def _slice(items: Any, start: int | None = 0, end: int | None = None, step: int = 1) -> Any:
    return items[slice(start, end, step)]


def _append(items: list[Any], value: Any) -> list[Any]:
    items.append(value)
    return items


def _insert(items: list[Any], place: int, value: Any) -> None:
    items.insert(place, value)


def _range_length(start: int, stop: int, step: int) -> int:
    return len(range(start, stop, step))


def _derive_index(index: int, start: int, step: int) -> int:
    return start + index * step


def _set_item(items: Any, key: Any, value: Any) -> Any:
    items[key] = value
    return items


def _format(text: str, *values: Any) -> str:
    # Not str.format: a format string can reach into the attributes of what it prints.
    pieces = text.split("{}")
    shown = [str(value)[:80] for value in values] + [""] * len(pieces)
    return "".join(piece + shown[index] for index, piece in enumerate(pieces))


SCALARS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _divide,
    "floordiv": operator.floordiv,
    "remainder": operator.mod,
    "neg": operator.neg,
    "pow": operator.pow,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
    "Int": int,
    "Float": float,
    "Bool": bool,
    "IntImplicit": int,
    "FloatImplicit": float,
    "ScalarImplicit": lambda value: value,
    "str": str,
    "len": len,
    "list": list,
    "slice": _slice,
    "append": _append,
    "extend": lambda items, more: items.extend(more),
    "insert": _insert,
    "pop": lambda items, place=-1: items.pop(place),
    "copy": lambda items: items.copy(),
    "clear": lambda items: items.clear(),
    "reverse": lambda items: items.reverse(),
    "keys": lambda items: list(items.keys()),
    "values": lambda items: list(items.values()),
    "items": lambda items: list(items.items()),
    "get": lambda items, key, default=None: items.get(key, default),
    "format": _format,
    "join": lambda text, parts: text.join(parts),
    "warn": lambda *_: None,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__not__": operator.not_,
    "__is__": lambda a, b: a is b,
    "__isnot__": lambda a, b: a is not b,
    "__contains__": lambda items, value: value in items,
    "__getitem__": operator.getitem,
    "_set_item": _set_item,
    "__range_length": _range_length,
    "__derive_index": _derive_index,
}
"""Operator name → meaning where no argument is a tensor."""

LONGEST = 1_000_000
"""Entries of the longest list or text that code may make."""
_MOST_LEAVES = 10_000
_NESTED_NAMES = "str format join eq ne lt le gt ge __contains__ get _set_item Int Float"
_NESTED = frozenset(_NESTED_NAMES.split())
_GROWS_NAMES = "add mul extend join list copy slice remainder"
_GROWS = frozenset(_GROWS_NAMES.split())


def scalar(name: str, arguments: list[Any], named: Mapping[str, Any]) -> Any:
    """Apply one of ``SCALARS``, within bounds: a few lines of code could ask for any amount of time and memory.

    Raises:
        GraphError: If it is applied to something else, or would take too much.
    """
    values = [*arguments, *named.values()]
    if name in _NESTED:
        check_leaves(*values)
    if name in _GROWS:
        _check_growth(name, values)
    if name == "pow" and all(isinstance(value, int) for value in values):
        base, exponent = (*values, 0, 0)[:2]
        if abs(base) > 1 and exponent * abs(base).bit_length() > 128:
            raise GraphError("its code computes a number of more than 64 bits")
    try:
        result = SCALARS[name](*arguments, **named)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise GraphError(f"its code computes {name} of something else ({error})") from error
    if isinstance(result, int) and result.bit_length() > 64:
        raise GraphError("its code computes a number of more than 64 bits")
    return result


def check_leaves(*values: Any) -> None:
    """Refuse nested lists so large, each use of a shared one counted, that comparing or printing them has no end.

    Raises:
        GraphError: If they are.
    """
    pending = list(values)
    count = 0
    while pending:
        value = pending.pop()
        count += 1
        if isinstance(value, (list, tuple)):
            count += len(value)
            pending.extend(item for item in value[:_MOST_LEAVES] if isinstance(item, (list, tuple, dict)))
        elif isinstance(value, dict):
            count += 2 * len(value)
            pending.extend(item for item in value.values() if isinstance(item, (list, tuple, dict)))
        if count > _MOST_LEAVES:
            raise GraphError("its code looks into very large lists")


def _check_growth(name: str, values: list[Any]) -> None:
    sizes = [len(value) for value in values if isinstance(value, (str, list, tuple, dict, range))]
    counts = [abs(value) for value in values if isinstance(value, int)]
    size = sum(sizes)
    if name == "mul" and sizes and counts:
        size *= max(counts)
    if name == "remainder" and sizes:
        raise GraphError("its code formats a text")
    if name == "join":
        size += sum(
            len(item)
            for value in values
            if isinstance(value, list)
            for item in value
            if isinstance(item, str)
        )
    if size > LONGEST:
        raise GraphError(f"its code makes a list or text of more than {LONGEST} entries")


QUESTIONS: Mapping[str, Callable[..., Any]] = {
    "size": lambda x, axis=None: list(x.shape) if axis is None else x.shape[axis],
    "dim": lambda x: x.dim(),
    "len": lambda x: x.shape[0],
    "numel": lambda x: x.numel(),
    "is_floating_point": lambda x: x.is_floating_point(),
    "is_complex": lambda x: x.is_complex(),
    "stride": lambda x, axis=None: list(x.stride()) if axis is None else x.stride(axis),
    "__is__": lambda a, b: a is b,
    "__isnot__": lambda a, b: a is not b,
    "__contains__": lambda items, value: any(value is item for item in items),
}
"""Operators that ask a tensor for something other than its values."""

FACTORIES = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "empty",
        "arange",
        "eye",
        "linspace",
        "tensor",
        "scalar_tensor",
        "rand",
        "randn",
        "hann_window",
    ]
)
"""ATen operations that make tensors from numbers."""

MOST_PIECES = 10_000
"""Tensors into which code may cut one, and rows over which it may loop."""
_SPLITTER_NAMES = (
    "unbind split split_with_sizes chunk tensor_split hsplit vsplit dsplit unsafe_split unsafe_chunk split_copy "
    "unbind_copy split_with_sizes_copy unsafe_split_with_sizes"
)
_SPLITTERS = frozenset(_SPLITTER_NAMES.split())
SPOKEN = frozenset(
    {
        "pad",
        "div",
        "einsum",
        "gelu",
        "norm",
        "index_reduce",
        "scatter_reduce",
        "searchsorted",
        "linalg_norm",
        "stft",
    }
)
"""ATen operations with a harmless string argument; any other string could be the name of a file."""

PRIM: Mapping[str, Callable[..., Any]] = {
    "dtype": lambda x: x.dtype,
    "device": lambda x: x.device,
    "is_cuda": lambda x: False,
    "is_quantized": lambda x: False,
    "is_mkldnn": lambda x: False,
    "is_nested": lambda x: False,
    "is_sparse": lambda x: False,
    "requires_grad": lambda x: False,
    "layout": lambda x: None,
    "type": lambda x: "cpu",
    "unchecked_cast": lambda x: x,
    "data": lambda x: x,
    "min": lambda *values: min(values[0] if len(values) == 1 else values),
    "max": lambda *values: max(values[0] if len(values) == 1 else values),
    "abs": abs,
    "NumToTensor": lambda value: value,
    "grad": lambda x: None,
    "unchecked_unwrap_optional": lambda x: x,
}
"""Operations of the interpreter itself."""

_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    None, torch.complex64, torch.complex128, torch.bool, None, None, None, torch.bfloat16,
)  # fmt: skip


def aten(name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
    """Call an ATen operation on tensors, if it is one that computes and nothing else.

    Raises:
        GraphError: If it is not, or torch has no such operation.
    """
    base = name.rstrip("_") if not name.startswith("__") else name
    values = [*arguments, *named.values()]
    has_tensor = any(isinstance(value, torch.Tensor) or _tensor_list(value) for value in values)
    if not has_tensor and base not in FACTORIES:
        raise GraphError(f"its code calls aten::{name} on no tensor")
    if any(isinstance(value, str) for value in values) and base not in SPOKEN:
        raise GraphError(f"its code calls aten::{name} with a string")
    if base in _SPLITTERS:
        long = max(
            (size for value in values if isinstance(value, torch.Tensor) for size in value.shape), default=0
        )
        if long > MOST_PIECES:
            raise GraphError(f"its code cuts a very long tensor into pieces (aten::{name})")
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        raise GraphError(f"its code calls aten::{name}, which this version of torch lacks")
    if base == "to" and len(arguments) > 1 and isinstance(arguments[1], int):
        arguments = [arguments[0], _dtype(arguments[1]), *arguments[2:]]
    if "dtype" in named and isinstance(named["dtype"], int):
        named = {**named, "dtype": _dtype(named["dtype"])}
    named = {key: value for key, value in named.items() if key not in ("device", "layout", "pin_memory")}
    result = packet(*arguments, **named)
    return list(result) if isinstance(result, (list, torch.Size)) else result


def _dtype(number: int) -> torch.dtype:
    found = _DTYPES[number] if 0 <= number < len(_DTYPES) else None
    if found is None:
        raise GraphError(f"its code names element type {number}")
    return found


def _tensor_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value)
