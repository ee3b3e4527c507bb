"""Read a pickle without running it.

The standard library decodes the opcodes (``pickletools.genops``); the stack machine here builds only plain values
and the placeholders of ``inert.py``. It stands in place of a restricted ``pickle.Unpickler`` because that one, even
if it imports nothing, can be brought down by data alone: 3 MB of nested tuples used as a dict key overflow the C
stack (measured: segmentation fault), 28 nested pairs take 2^28 steps to hash, and a memo index of 2^29 asks for
8 GB. Here keys must be small, the memo is a dict, and opcodes are counted. It costs about 1 µs per opcode, i.e.
30 µs per tensor.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

from spectool.checkpoint.inert import BadCall, Foreign, Reference, append_items, set_items
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.payloads import Payloads
from spectool.checkpoint.rebuild import build, call, new_object
from spectool.errors import CorruptFile

_PUSH = {
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "FLOAT", "BINFLOAT"),
}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_IGNORED = {"PROTO", "FRAME"}


def unpickle(
    stream: BinaryIO,
    what: str,
    limits: Limits,
    persistent: Callable[[Any], Any] | None = None,
    payloads: Payloads | None = None,
) -> Any:
    """Return what one pickle describes; the stream stands behind it afterwards.

    Args:
        stream: Binary stream with ``read``, ``readline`` and ``tell``.
        what: File and record, for messages.
        limits: ``opcodes`` and ``integer_bytes`` apply here; the caller bounds the bytes.
        persistent: What a persistent id stands for.
        payloads: Is told of every name and call.

    Returns:
        Plain values, ``Reference``, ``Foreign`` and ``Tensor`` objects, possibly with cycles.

    Raises:
        CorruptFile: If it is not a well-formed pickle.
        LimitExceeded: If it is too long.
    """
    machine = _Machine(what, limits, persistent, payloads or Payloads())
    try:
        with warnings.catch_warnings():
            # The library's decoder of protocol 0 strings warns about odd escapes in damaged ones.
            warnings.simplefilter("ignore", DeprecationWarning)
            return machine.run(stream)
    # A damaged stream can make any decoding step fail in its own way; LimitExceeded and CorruptFile pass.
    except (
        IndexError,
        KeyError,
        ValueError,
        TypeError,
        OverflowError,
        EOFError,
        RecursionError,
        BadCall,
    ) as error:
        reason = str(error) or type(error).__name__
        raise CorruptFile(
            f"{what} is not a well-formed pickle ({reason[:120]})",
            hint="copy, download or save the file again",
        ) from error


class _Machine:
    """The pickle stack machine over inert values. One method per group of opcodes."""

    def __init__(
        self, what: str, limits: Limits, persistent: Callable[[Any], Any] | None, payloads: Payloads
    ) -> None:
        self._what = what
        self._limits = limits
        self._persistent = persistent
        self._payloads = payloads
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        most = self._limits.opcodes
        argument: Any
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):
            if count > most:
                self._limits.check("opcodes", count, self._what)
            name = opcode.name
            if name in _PUSH:
                if type(argument) is int:
                    self._check_integer(argument)
                self._stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                self._memo[argument] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self._stack.append(self._memo[argument])
            elif name == "MARK":
                self._marked.append(self._stack)
                self._stack = []
            elif name in _CONSTANT:
                self._stack.append(_CONSTANT[name])
            elif name == "STOP":
                return self._stack.pop()
            elif name not in _IGNORED:
                _HANDLERS.get(name, _Machine._unknown)(self, argument)
        raise ValueError("it has no end")

    def _unknown(self, argument: Any) -> None:
        raise ValueError("it uses an extension registry or out-of-band data")

    def _check_integer(self, number: int) -> None:
        size = (number.bit_length() + 7) // 8
        if size > self._limits.integer_bytes:
            self._limits.check("integer_bytes", size, f"{self._what}: an integer")

    def _take_marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    # --- containers ---------------------------------------------------------------------------------------

    def _op_empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _op_empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _op_empty_tuple(self, _: Any) -> None:
        self._stack.append(())

    def _op_empty_set(self, _: Any) -> None:
        self._stack.append(Foreign("builtins.set"))

    def _op_list(self, _: Any) -> None:
        items = self._take_marked()
        self._stack.append(items)

    def _op_tuple(self, _: Any) -> None:
        items = self._take_marked()
        self._stack.append(tuple(items))

    def _op_tuple1(self, _: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _op_tuple2(self, _: Any) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _op_tuple3(self, _: Any) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _op_dict(self, _: Any) -> None:
        items = self._take_marked()
        entries: dict[Any, Any] = {}
        set_items(entries, items)
        self._stack.append(entries)

    def _op_frozenset(self, _: Any) -> None:
        items = self._take_marked()
        self._stack.append(Foreign("builtins.frozenset", elements=items))

    def _op_append(self, _: Any) -> None:
        value = self._stack.pop()
        append_items(self._stack[-1], [value])

    def _op_appends(self, _: Any) -> None:
        items = self._take_marked()
        append_items(self._stack[-1], items)

    _op_additems = _op_appends

    def _op_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        set_items(self._stack[-1], [key, value])

    def _op_setitems(self, _: Any) -> None:
        items = self._take_marked()
        set_items(self._stack[-1], items)

    # --- stack --------------------------------------------------------------------------------------------

    def _op_pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._take_marked()

    def _op_pop_mark(self, _: Any) -> None:
        self._take_marked()

    def _op_dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _op_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    # --- names and calls ----------------------------------------------------------------------------------

    def _named(self, name: str) -> Reference:
        self._payloads.name(name)
        return Reference(name)

    def _called(self, function: Any, args: Any) -> Any:
        self._payloads.call(function, args)
        return call(function, args)

    def _made(self, cls: Any, args: Any) -> Any:
        self._payloads.call(cls, args)
        return new_object(cls, args)

    def _op_global(self, argument: str) -> None:
        self._stack.append(self._named(argument.replace(" ", ".", 1)))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise TypeError("a class is named by something that is no string")
        self._stack.append(self._named(f"{module}.{name}"))

    def _op_reduce(self, _: Any) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._called(function, args))

    def _op_newobj(self, _: Any) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        self._stack.append(self._made(cls, args))

    def _op_newobj_ex(self, _: Any) -> None:
        _, args, cls = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._stack.append(self._made(cls, args))

    def _op_inst(self, argument: str) -> None:
        args = tuple(self._take_marked())
        self._stack.append(self._called(self._named(argument.replace(" ", ".", 1)), args))

    def _op_obj(self, _: Any) -> None:
        cls, *args = self._take_marked()
        self._stack.append(self._called(cls, tuple(args)))

    def _op_build(self, _: Any) -> None:
        state = self._stack.pop()
        build(self._stack[-1], state)

    def _op_binpersid(self, _: Any) -> None:
        identity = self._stack.pop()
        if self._persistent is None:
            raise ValueError("it refers to data outside itself")
        self._stack.append(self._persistent(identity))

    def _op_persid(self, argument: str) -> None:
        self._stack.append(argument)
        self._op_binpersid(None)


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    name.removeprefix("_op_").upper(): method
    for name, method in vars(_Machine).items()
    if name.startswith("_op_")
}
