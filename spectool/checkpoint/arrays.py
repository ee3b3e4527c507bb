"""numpy arrays and scalars inside pickles, without numpy."""

from __future__ import annotations

import struct
from typing import Any

from spectool.checkpoint.dtypes import ITEMSIZE, NUMPY
from spectool.checkpoint.inert import BadCall, Foreign, Tensor, integers
from spectool.checkpoint.read import row_major

_FORMATS = {
    "b1": "?",
    "u1": "B",
    "i1": "b",
    "u2": "H",
    "i2": "h",
    "u4": "I",
    "i4": "i",
    "u8": "Q",
    "i8": "q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}


def array_from_state(state: Any) -> Tensor:
    """Return the array whose pickled state is (version, shape, dtype, Fortran order, bytes).

    Raises:
        BadCall: If the state contradicts itself.
    """
    if not (isinstance(state, tuple) and len(state) == 5):
        raise BadCall("bad state of a numpy array")
    try:
        return _array(_octets(state[4]), state[2], integers(state[1]), bool(state[3]))
    except ValueError as error:
        raise BadCall(f"bad state of a numpy array: {error}") from error


def frombuffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Tensor:
    """Return an array pickled by protocol 5: bytes, dtype, shape and ``C`` or ``F``.

    Raises:
        ValueError: If the order is neither, or the bytes do not fit the shape.
    """
    if order not in ("C", "F"):
        # numpy takes other spellings, too; it writes none of them.
        raise ValueError("an order that is neither C nor F")
    return _array(_octets(data), dtype, integers(shape), order == "F")


def scalar(dtype: Any, data: Any = b"") -> Any:
    """Return a numpy scalar as a Python number where it is a plain one.

    Raises:
        ValueError: If the bytes do not fit the type.
    """
    code, order = _type(dtype)
    octets = _octets(data)
    if code not in _FORMATS or octets is None:
        return Foreign("numpy.generic", (code,))
    try:
        (number,) = struct.unpack(order + _FORMATS[code], octets)
    except struct.error as error:
        raise ValueError(str(error)) from error
    return number


def _array(data: bytes | None, dtype: Any, shape: tuple[int, ...], fortran: bool) -> Tensor:
    code, order = _type(dtype)
    name = NUMPY.get(code)
    if name is None or data is None:
        return Tensor("", shape, problem=f"a numpy array of type {code or 'object'}")
    count = ITEMSIZE[name]
    for size in shape:
        count *= size
    if count != len(data):
        raise ValueError(f"shape {shape} of {name} and {len(data)} bytes")
    stride = row_major(shape[::-1])[::-1] if fortran else row_major(shape)
    return Tensor(name, shape, stride, data, byteorder="big" if order == ">" else "little")


def _type(dtype: Any) -> tuple[str, str]:
    """Return the type code and the byte order of a pickled ``numpy.dtype``."""
    if not (isinstance(dtype, Foreign) and dtype.cls == "numpy.dtype" and dtype.args):
        return "", "<"
    code = dtype.args[0]
    if not isinstance(code, str):
        return "", "<"
    # The state's order is the one that holds; without a state it is that of the code.
    state = dtype.state if isinstance(dtype.state, tuple) else (None, code[:1])
    return code.lstrip("<>|="), ">" if state[1:2] in ((">",), (b">",)) else "<"


def _octets(data: Any) -> bytes | None:
    if isinstance(data, str):
        # Python 2 pickled bytes as text.
        return data.encode("latin1")
    return bytes(data) if isinstance(data, bytes | bytearray) else None
