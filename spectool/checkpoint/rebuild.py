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
        BadCall: If a tensor or numpy array has a state it cannot have, or if a state would replace another one.
    """
    if isinstance(target, Foreign):
        if target.state is not None:
            # Which of the two holds, or both, only the class knows.
            raise BadCall(f"an object of {target.cls[:80]} is given its state twice")
        target.state = state
    elif isinstance(target, Tensor):
        _build_tensor(target, state)
    # Attributes of ordered dicts (``_metadata`` of a state dict) say nothing about values.


def _build_tensor(target: Tensor, state: Any) -> None:
    """Fill a shell in place, since the memo may already hold it; torch would put other values into a full tensor."""
    size = len(state) if isinstance(state, tuple) else 0
    if not target.shell:
        # Parameters of torch 0.3: whether it needs a gradient, a flag and hooks.
        if size != 3:
            raise BadCall("a tensor is given other contents than it was made with")
    elif size == 4 and isinstance(state[0], Storage):
        try:
            target.fill(_tensor(*state))
        except ValueError as error:
            raise BadCall(f"bad state of a tensor: {error}") from error
    else:
        # Very old parameters have a state that begins with their tensor; numpy arrays have one of their own.
        target.fill(state[0] if size and isinstance(state[0], Tensor) else array_from_state(state))


def new_object(cls: Any, args: Any) -> Any:
    """Return the inert result of ``cls.__new__(cls, *args)``: what fills a container is its ``__init__``.

    Raises:
        BadCall: As ``call``.
    """
    if isinstance(cls, Reference) and cls.name in _MADE_EMPTY and isinstance(args, tuple):
        args = ()
    return call(cls, args)


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


def _parameter_with_state(data: Any, grad: Any, hooks: Any, state: Any) -> Any:
    _check_attributes(state)
    return data


def _from_type(function: Any, cls: Any, args: Any, *state: Any) -> Any:
    _check_attributes(*state)
    return call(function, args)


def _check_attributes(state: Any = None) -> None:
    """Refuse attributes by which torch would put other values into a tensor it has just made.

    Raises:
        ValueError: If there is one.
    """
    for part in state if isinstance(state, tuple) else (state,):
        for name in _VALUES if isinstance(part, dict) else ():
            if name in part:
                raise ValueError(f"the attribute {name!r} would replace the tensor's own values")


def _from_cpu(data: Any, dtype: Any, *_: Any) -> Any:
    # The copy on the CPU has the device tensor's own type, but for bfloat16 where numpy held it.
    if isinstance(data, Tensor) and data.storage is not None and data.dtype != _dtype(dtype):
        return Tensor(data.dtype, data.shape, problem=f"stored as {data.dtype}, loaded as {_dtype(dtype)}")
    return data


def _tensor_class(*args: Any) -> Any:
    """Return what ``torch.Tensor`` and its kin make: nothing as yet, another view, or a tensor of plain numbers."""
    if not args:
        return _shell()
    if len(args) == 1 and isinstance(args[0], Tensor):
        return args[0]
    return Tensor("", (), problem="made of numbers in the pickle, not of a storage")


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


def _defaultdict(factory: Any = None, *entries: Any) -> dict[Any, Any]:
    return _dict(*entries)


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
    elif isinstance(result, dict) and isinstance(state, dict):
        result.update(state)
    elif isinstance(result, list) and isinstance(state, list | tuple):
        result.extend(state)
    return result


def _newobj(cls: Any, *args: Any) -> Any:
    return new_object(cls, args)


def _first(value: Any, *_: Any) -> Any:
    return value


def _dtype(value: Any) -> str:
    name = value.name.removeprefix("torch.") if isinstance(value, Reference) else ""
    if name not in ITEMSIZE:
        raise ValueError(f"{brief(value)} is no element type")
    return name


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUILTINS = ("builtins", "__builtin__")
#: Attributes of a tensor that are its values.
_VALUES = ("data", "real", "imag", "__class__")
#: Classes whose ``__new__`` ignores what it is given.
_MADE_EMPTY = {
    *("collections.OrderedDict", "collections.defaultdict"),
    *(f"{module}.{name}" for module in _BUILTINS for name in ("dict", "list", "set", "bytearray")),
}
_TENSORS = ("", "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")

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
    **{f"torch.{kind}Tensor": _tensor_class for kind in _TENSORS},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
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
