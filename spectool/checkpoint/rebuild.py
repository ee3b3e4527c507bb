"""The few names in a pickle that mean something: containers, torch's tensor builders, numpy's arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spectool.checkpoint.arrays import array_from_state, frombuffer, scalar
from spectool.checkpoint.dtypes import ITEMSIZE
from spectool.checkpoint.inert import (
    BadCall,
    Foreign,
    Reference,
    Storage,
    Tensor,
    brief,
    integers,
    set_items,
)


def call(function: Any, args: Any) -> Any:
    """Return the inert result of calling a pickled name.

    Args:
        function: Normally a ``Reference``.
        args: Normally a tuple.

    Raises:
        BadCall: If a known function gets arguments it cannot have.
    """
    if not isinstance(args, tuple):
        raise BadCall("a call without a tuple of arguments")
    if not isinstance(function, Reference):
        # E.g. the result of another call: nothing is known about it.
        return Foreign(getattr(function, "cls", type(function).__name__), (function, *args))
    known = _KNOWN.get(function.name)
    if known is None:
        return Foreign(function.name, args)
    try:
        return known(*args)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        # A KeyError shows its key, which may be anything.
        why = brief(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise BadCall(f"bad arguments for {function.name[:80]}: {why}") from error


def build(target: Any, state: Any) -> None:
    """Give ``target`` its pickled state; only placeholders keep it, and ``__setstate__`` never runs.

    Raises:
        BadCall: If a numpy array has a state it cannot have.
    """
    if isinstance(target, Foreign):
        target.state = state
    elif isinstance(target, Tensor) and target.shell:
        # Filled in place: the memo may already hold the shell. Very old parameters have a state that begins
        # with their tensor; numpy arrays have one of their own.
        old = isinstance(state, tuple) and state and isinstance(state[0], Tensor)
        filled = state[0] if old else array_from_state(state)
        target.fill(filled)
    # Attributes of tensors and ordered dicts (``_metadata`` of a state dict) say nothing about values.


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    metadata = rest[2] if len(rest) > 2 else None
    return _view(storage, offset, size, stride, None, metadata)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    metadata = rest[3] if len(rest) > 3 else None
    return _view(storage, offset, size, stride, _dtype(rest[2]), metadata)


def _view(storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None, metadata: Any) -> Tensor:
    shape, steps = integers(size), integers(stride)
    (first,) = integers((offset,))
    if not isinstance(storage, Storage):
        return Tensor(dtype or "", shape, problem="its storage is pickled in a form that is not read")
    tensor = Tensor(dtype or storage.dtype, shape, steps, storage, first)
    bits = [name for name, on in metadata.items() if on] if isinstance(metadata, dict) else []
    if bits:
        tensor.problem = f"a lazy view ({', '.join(map(str, bits))} bit)"
    return tensor


def _quantised(storage: Any, offset: Any, size: Any, stride: Any, parameters: Any, *_: Any) -> Tensor:
    tensor = _view(storage, offset, size, stride, None, None)
    scheme, scale, zero_point, *axis = parameters
    tensor.quantization = {"scheme": scheme.name, "scale": scale, "zero_point": zero_point}
    if axis:
        tensor.quantization["axis"] = axis[0]
    return tensor


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, cls: Any, args: Any, *_: Any) -> Any:
    return call(function, args)


def _from_cpu(data: Any, dtype: Any, *_: Any) -> Any:
    # The copy on the CPU had the device tensor's own type.
    return data


def _unreadable(problem: str) -> Callable[..., Tensor]:
    def rebuild(*args: Any) -> Tensor:
        shape: tuple[int, ...] = ()
        for value in args:
            if isinstance(value, tuple) and all(type(item) is int for item in value):
                shape = value
                break
        return Tensor("", shape, problem=problem)

    return rebuild


def _sparse(layout: Any, data: Any) -> Tensor:
    values = [item for item in data if isinstance(item, Tensor)]
    shape = next((item for item in data if isinstance(item, tuple)), ())
    name = layout.args[0] if isinstance(layout, Foreign) and layout.args else getattr(layout, "name", "")
    name = str(name).removeprefix("torch.")
    return Tensor(values[-1].dtype, integers(shape), problem=f"a sparse tensor ({name})")


def _encode(text: Any, encoding: Any = "utf-8", *_: Any) -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise ValueError(f"encoding {brief(encoding)}")
    data: bytes = text.encode(encoding)
    return data


def _bytes(value: Any = b"", *encoding: Any) -> bytes:
    if isinstance(value, str):
        return _encode(value, *encoding)
    # An integer would ask for that many zeros.
    if not isinstance(value, bytes | bytearray | list):
        raise TypeError("bytes are built from something else")
    return bytes(value)


def _dict(entries: Any = (), *_: Any) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    if isinstance(entries, dict):
        result.update(entries)
    else:
        for key, value in entries:
            set_items(result, [key, value])
    return result


def _defaultdict(*_: Any) -> dict[Any, Any]:
    return {}


def _set(items: Any = ()) -> Foreign:
    return Foreign("builtins.set", elements=_list(items))


def _list(items: Any = ()) -> list[Any]:
    if not isinstance(items, list | tuple):
        raise TypeError("a list is built from something else")
    return list(items)


def _tuple(items: Any = ()) -> tuple[Any, ...]:
    return tuple(_list(items))


def _shell(value: Any = None, *_: Any) -> Any:
    return (
        value
        if isinstance(value, Tensor)
        else Tensor("", (), problem="an array without contents", shell=True)
    )


def _reconstructed(cls: Any, base: Any, state: Any) -> Any:
    """Protocol 0 and 1 objects: ``copyreg._reconstructor(cls, object, None)``."""
    result = call(cls, ())
    if isinstance(result, Foreign) and isinstance(state, dict):
        result.entries = {**(result.entries or {}), **state}
    elif isinstance(result, Foreign) and isinstance(state, list | tuple):
        result.elements = [*(result.elements or ()), *state]
    return result


def _newobj(cls: Any, *args: Any) -> Any:
    return call(cls, args)


def _first(value: Any, *_: Any) -> Any:
    return value


def _dtype(value: Any) -> str:
    name = value.name.removeprefix("torch.") if isinstance(value, Reference) else ""
    if name not in ITEMSIZE:
        raise ValueError(f"{brief(value)} is no element type")
    return name


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUILTINS = ("builtins", "__builtin__")

_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _defaultdict,
    **{f"{module}.dict": _dict for module in _BUILTINS},
    **{f"{module}.set": _set for module in _BUILTINS},
    **{f"{module}.frozenset": _set for module in _BUILTINS},
    **{f"{module}.list": _list for module in _BUILTINS},
    **{f"{module}.tuple": _tuple for module in _BUILTINS},
    **{f"{module}.bytes": _bytes for module in _BUILTINS},
    **{f"{module}.bytearray": _bytes for module in _BUILTINS},
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
    "copyreg.__newobj__": _newobj,
    "copy_reg.__newobj__": _newobj,
    "torch.nn.parameter.Parameter": _shell,
    "torch.Size": _tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _unreadable("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("on the meta device: it has no values"),
    "torch._utils._rebuild_wrapper_subclass": _unreadable("a tensor subclass without a storage of its own"),
    "torch._utils._rebuild_device_tensor_from_numpy": _from_cpu,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "torch._utils._rebuild_xla_tensor": _from_cpu,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.tensor._rebuild_from_type": _from_type,
    **{f"{module}._reconstruct": _shell for module in _MULTIARRAY},
    **{f"{module}.scalar": scalar for module in _MULTIARRAY},
    **{f"{module}._frombuffer": frombuffer for module in ("numpy.core.numeric", "numpy._core.numeric")},
    "torch.jit._pickle.build_intlist": _list,
    "torch.jit._pickle.build_doublelist": _list,
    "torch.jit._pickle.build_boollist": _list,
    "torch.jit._pickle.build_tensorlist": _list,
    "torch.jit._pickle.restore_type_tag": _first,
}
