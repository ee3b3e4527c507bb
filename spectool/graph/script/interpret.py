"""An interpreter for the code of TorchScript archives: a small, closed subset of Python, by its syntax tree.

Nothing of the file reaches Python's own ``exec`` or torch's compiler: names resolve to the archive's own functions,
to a table of harmless scalar functions, or to ATen operations on (fake) tensors.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spectool.errors import GraphError
from spectool.graph.script.scalars import (
    LONGEST,
    MOST_PIECES,
    PRIM,
    QUESTIONS,
    SCALARS,
    aten,
    check_leaves,
    scalar,
)

_STEPS = 2_000_000
_DEPTH = 150


@dataclass(frozen=True)
class Library:
    """Functions and classes of an archive by qualified name.

    Attributes:
        functions: ``__torch__.nets.helper`` → its syntax tree.
        methods: (``__torch__.nets.Net``, ``forward``) → its syntax tree.
    """

    functions: Mapping[str, ast.FunctionDef]
    methods: Mapping[tuple[str, str], ast.FunctionDef]


def parse(code: Mapping[str, str]) -> Library:
    """Read the code files of an archive.

    Args:
        code: Path below ``code/`` → text, e.g. ``__torch__/nets.py``.

    Raises:
        GraphError: If a file does not parse.
    """
    functions: dict[str, ast.FunctionDef] = {}
    methods: dict[tuple[str, str], ast.FunctionDef] = {}
    for path, text in code.items():
        home = path.removesuffix(".py").replace("/", ".")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise GraphError(f"the code of {path} does not parse ({type(error).__name__})") from error
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                functions[f"{home}.{node.name}"] = node
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        methods[f"{home}.{node.name}", inner.name] = inner
    return Library(functions, methods)


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


@dataclass
class Interpreter:
    """Runs functions of a library on tensors.

    Attributes:
        library: What can be called.
        attribute: Reads an attribute of a script object.
        store: Writes one, for this run only.
        call_object: Calls a method of a script object (through the module, so that hooks see it).
        constants: ``c0``… → tensor.
    """

    library: Library
    attribute: Callable[[Any, str], Any]
    store: Callable[[Any, str, Any], None]
    call_object: Callable[[Any, str, list[Any], dict[str, Any]], Any]
    constants: Mapping[str, Any]
    steps: int = field(default=0)
    depth: int = field(default=0)

    def run(self, function: ast.FunctionDef, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Call a function.

        Raises:
            GraphError: If its code leaves the subset, runs too long, or raises.
        """
        if self.depth >= _DEPTH:
            raise GraphError(f"its code calls more than {_DEPTH} functions deep")
        scope: dict[str, Any] = {}
        parameters = function.args.args
        defaults = function.args.defaults
        for parameter, default in zip(reversed(parameters), reversed(defaults), strict=False):
            scope[parameter.arg] = self._value(default, {})
        if len(arguments) > len(parameters):
            raise GraphError(f"{function.name} takes {len(parameters)} arguments and got {len(arguments)}")
        for parameter, argument in zip(parameters, arguments, strict=False):
            scope[parameter.arg] = argument
        scope.update(named)
        missing = [parameter.arg for parameter in parameters if parameter.arg not in scope]
        if missing:
            raise GraphError(
                f"{function.name} also needs {', '.join(missing)}", hint="give every input by name"
            )
        self.depth += 1
        try:
            self._block(function.body, scope)
        except _Return as result:
            return result.value
        finally:
            self.depth -= 1
        return None

    def _tick(self) -> None:
        self.steps += 1
        if self.steps > _STEPS:
            raise GraphError(f"its code takes more than {_STEPS} steps")

    def _block(self, statements: Sequence[ast.stmt], scope: dict[str, Any]) -> None:
        for statement in statements:
            self._tick()
            self._statement(statement, scope)

    def _statement(self, statement: ast.stmt, scope: dict[str, Any]) -> None:
        match statement:
            case ast.Assign(targets=[target], value=value):
                self._assign(target, self._value(value, scope), scope)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self._assign(target, self._value(value, scope), scope)
            case ast.Expr(value=value):
                self._value(value, scope)
            case ast.Return(value=value):
                raise _Return(None if value is None else self._value(value, scope))
            case ast.If(test=test, body=body, orelse=orelse):
                self._block(body if self._truth(test, scope) else orelse, scope)
            case ast.While(test=test, body=body):
                while self._truth(test, scope):
                    self._tick()
                    self._block(body, scope)
            case ast.For(target=target, iter=iterable, body=body):
                for item in self._items(self._value(iterable, scope)):
                    self._tick()
                    self._assign(target, item, scope)
                    self._block(body, scope)
            case ast.With(body=body):
                # Contexts such as no_grad change nothing that is looked at here.
                self._block(body, scope)
            case ast.Pass():
                pass
            case _:
                raise GraphError(
                    f"its code has a statement that is not understood ({type(statement).__name__})"
                )

    def _items(self, value: Any) -> list[Any]:
        if isinstance(value, torch.Tensor):
            if value.dim() == 0 or value.shape[0] > MOST_PIECES:
                raise GraphError("its code loops over the rows of a very long tensor")
            return list(value.unbind(0))
        if not isinstance(value, (list, tuple, range, dict, str)) or len(value) > LONGEST:
            raise GraphError("its code loops over something that is not understood")
        return list(value)

    def _truth(self, test: ast.expr, scope: dict[str, Any]) -> bool:
        value = self._value(test, scope)
        if isinstance(value, torch.Tensor):
            raise GraphError("its code branches on the values of a tensor")
        return bool(value)

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        match target:
            case ast.Name(id=name):
                scope[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                values = list(value)
                if len(values) != len(targets):
                    raise GraphError(f"its code unpacks {len(values)} values into {len(targets)} names")
                for inner, item in zip(targets, values, strict=True):
                    self._assign(inner, item, scope)
            case ast.Attribute(value=owner, attr=name):
                self.store(self._value(owner, scope), name, value)
            case ast.Subscript(value=owner, slice=key):
                self._value(owner, scope)[self._value(key, scope)] = value
            case _:
                raise GraphError("its code assigns to something that is not understood")

    def _value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        self._tick()
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                if name in scope:
                    return scope[name]
                if name in ("inf", "nan"):
                    return float(name)
                raise GraphError(f"its code reads {name!r} before it is set")
            case ast.Tuple(elts=items):
                return tuple(self._value(item, scope) for item in items)
            case ast.List(elts=items):
                return [self._value(item, scope) for item in items]
            case ast.Dict(keys=keys, values=values):
                return {
                    _plain_key(self._value(key, scope)): self._value(value, scope)
                    for key, value in zip(keys, values, strict=True)
                    if key is not None
                }
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand, scope)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._truth(operand, scope)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._value(body if self._truth(test, scope) else orelse, scope)
            case ast.BoolOp(op=ast.And(), values=values):
                return all(self._truth(value, scope) for value in values)
            case ast.BoolOp(op=ast.Or(), values=values):
                return any(self._truth(value, scope) for value in values)
            case ast.Compare(left=left, ops=[ast.Is()], comparators=[right]):
                return self._value(left, scope) is self._value(right, scope)
            case ast.Compare(left=left, ops=[ast.IsNot()], comparators=[right]):
                return self._value(left, scope) is not self._value(right, scope)
            case ast.Subscript(value=owner, slice=key):
                return self._value(owner, scope)[self._value(key, scope)]
            case ast.Attribute():
                return self._attribute(node, scope)
            case ast.Call():
                return self._call(node, scope)
        raise GraphError(f"its code has an expression that is not understood ({type(node).__name__})")

    def _attribute(self, node: ast.Attribute, scope: dict[str, Any]) -> Any:
        path = _dotted(node)
        if path and path[0] == "CONSTANTS":
            if path[1] not in self.constants:
                raise GraphError(f"its code reads {'.'.join(path)}, which the archive lacks")
            return self.constants[path[1]]
        if path and path[0] not in scope:
            return _Name(".".join(path))
        return self.attribute(self._value(node.value, scope), node.attr)

    def _call(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        function = node.func
        if isinstance(function, ast.Name) and function.id not in scope:
            return self._special(function.id, node, scope)
        path = _dotted(function) if isinstance(function, ast.Attribute) else None
        arguments = [self._value(argument, scope) for argument in node.args]
        named = {key.arg: self._value(key.value, scope) for key in node.keywords if key.arg}
        if path and path[0] not in scope:
            return self._named(".".join(path), arguments, named)
        if isinstance(function, ast.Attribute):
            owner = self._value(function.value, scope)
            return self.call_object(owner, function.attr, arguments, named)
        target = self._value(function, scope)
        if isinstance(target, _Name):
            return self._named(target.path, arguments, named)
        raise GraphError("its code calls something that is not understood")

    def _special(self, name: str, node: ast.Call, scope: dict[str, Any]) -> Any:
        if name == "annotate" and len(node.args) == 2:
            return self._value(node.args[1], scope)
        if name == "uninitialized":
            return None
        if name == "getattr" and len(node.args) == 2:
            owner, attribute = (self._value(argument, scope) for argument in node.args)
            return self.attribute(owner, str(attribute))
        arguments = [self._value(argument, scope) for argument in node.args]
        if name == "unchecked_cast" and len(arguments) >= 1:
            return arguments[-1]
        if name == "isinstance":
            raise GraphError("its code asks for the type of a value")
        if name == "range":
            return range(*(int(value) for value in arguments))
        if any(isinstance(value, torch.Tensor) for value in arguments):
            raise GraphError(f"its code takes {name}() of a tensor, which only a run would tell")
        plain: dict[str, Callable[..., Any]] = {"bool": bool, "int": int, "float": float, "str": str}
        if name in plain and len(arguments) == 1:
            check_leaves(arguments[0])
            return plain[name](arguments[0])
        raise GraphError(f"its code calls {name}(), which is not understood")

    def _named(self, path: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Call what a dotted name stands for: the archive's own code, a scalar function, an ATen operation."""
        if path.startswith("__torch__."):
            function = self.library.functions.get(path)
            if function is None:
                raise GraphError(f"its code calls {path}, which the archive lacks")
            return self.run(function, arguments, named)
        if path == "ops.prim.RaiseException":
            check_leaves(*arguments)
            raise GraphError(f"its code raises {str(arguments[0])[:120] if arguments else 'an error'}")
        if path.startswith("ops.prim."):
            name = path.removeprefix("ops.prim.")
            if name in PRIM:
                return PRIM[name](*arguments)
            raise GraphError(f"its code calls prim::{name}")
        for prefix in ("ops.aten.", "torch."):
            if path.startswith(prefix):
                return self._operation(path.removeprefix(prefix), arguments, named)
        raise GraphError(f"its code calls {path}")

    def _operation(self, name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        values = [*arguments, *named.values()]
        tensors = any(isinstance(value, torch.Tensor) for value in values)
        if tensors and name in QUESTIONS:
            return QUESTIONS[name](*arguments, **named)
        listed = bool(arguments) and isinstance(arguments[0], (list, dict))
        if name in SCALARS and (listed or not tensors):
            return scalar(name, arguments, named)
        return aten(name, arguments, named)


@dataclass(frozen=True)
class _Name:
    """A dotted name taken as a value (a function that is called later)."""

    path: str


def _plain_key(value: Any) -> Any:
    if not isinstance(value, (str, int, float, bool)):
        raise GraphError(f"its code makes a dict whose keys are of type {type(value).__name__}")
    return value


def _dotted(node: ast.expr) -> list[str] | None:
    """Return ``[a, b, c]`` for the expression a.b.c, None for any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return [node.id, *reversed(parts)]
