"""From the inert parts of a TorchScript archive to a module that the tape can follow."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from spectool.checkpoint.types import ScriptObject, ScriptProgram, StoredTensor
from spectool.errors import GraphError
from spectool.graph.inputs import Given
from spectool.graph.program import survey_live
from spectool.graph.script.interpret import Interpreter, parse
from spectool.graph.types import Survey

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint


def survey_script(
    checkpoint: Checkpoint, program: ScriptProgram, inputs: Mapping[str, Given] | None
) -> Survey:
    """Find every operator of a TorchScript archive by interpreting its code on fake tensors.

    Args:
        checkpoint: The open archive.
        program: Its objects and code.
        inputs: Input name → shape with the batch axis, or a number; ``""`` is the only input.

    Raises:
        UsageError: If an input is needed and missing.
        GraphError: If the code leaves what is understood.
    """
    root = build_module(checkpoint, program)
    return survey_live(root, inputs, load=checkpoint.read, notes=("TorchScript code interpreted, not run",))


def build_module(checkpoint: Checkpoint, program: ScriptProgram) -> torch.nn.Module:
    """Return the archive as a module on the meta device whose forward interprets the archive's code."""
    session = _Session(checkpoint, program)
    root = session.module(program.root)
    if not isinstance(root, ScriptModule):
        raise GraphError(f"{checkpoint.path}: its root is no module")
    root.input_hints = session.input_hints(root.script_class)
    return root


class ScriptModule(torch.nn.Module):
    """A module of an archive; its code is interpreted."""

    def __init__(self, cls: str) -> None:
        super().__init__()
        self.script_class = cls
        self.script_values: dict[str, Any] = {}
        self.input_hints: Mapping[str, int | float] = {}


class _Plain:
    """An object of an archive that is no module."""

    def __init__(self, cls: str) -> None:
        self.script_class = cls
        self.script_values: dict[str, Any] = {}


class _Session:
    """What all modules of one archive share."""

    def __init__(self, checkpoint: Checkpoint, program: ScriptProgram) -> None:
        self.checkpoint = checkpoint
        self.library = parse(program.code)
        self.made: dict[int, Any] = {}
        self.overrides: dict[tuple[int, str], Any] = {}
        self.running = False
        constants = {f"c{index}": self._tensor(key) for index, key in enumerate(program.constants)}
        self.interpreter = Interpreter(self.library, self.attribute, self.store, self.call, constants)

    def _tensor(self, key: str) -> torch.Tensor:
        ref = self.checkpoint.tensors[key]
        return torch.empty(ref.shape, dtype=getattr(torch, ref.dtype), device="meta")

    def module(self, source: ScriptObject) -> Any:
        """Return the live counterpart of an inert object, the same one each time."""
        if id(source) in self.made:
            return self.made[id(source)]
        stem = source.cls.rsplit(".", 1)[-1]
        if (source.cls, "forward") in self.library.methods or any(
            isinstance(value, (ScriptObject, StoredTensor)) for value in source.attributes.values()
        ):
            made: Any = type(stem, (ScriptModule,), {"forward": self.forward(source.cls)})(source.cls)
        else:
            made = _Plain(source.cls)
        self.made[id(source)] = made
        for name, value in source.attributes.items():
            self._attach(made, name, value)
        return made

    def forward(self, cls: str) -> Any:
        """Return the forward of a class of the archive, which says what it takes as its code does."""

        def forward(module: ScriptModule, *arguments: Any, **named: Any) -> Any:
            """Interpret the archive's forward."""
            return self.method(module, "forward", list(arguments), named)

        function = self.library.methods.get((cls, "forward"))
        if function is not None:
            forward.__signature__ = signature(function)  # type: ignore[attr-defined]
        return forward

    def input_hints(self, cls: str) -> dict[str, int | float]:
        """Return, for inputs of a class that its code compares with a constant, the first such constant."""
        hints: dict[str, int | float] = {}
        function = self.library.methods.get((cls, "forward"))
        names = [argument.arg for argument in function.args.args[1:]] if function else []
        for (owner, _), method in self.library.methods.items():
            if owner != cls:
                continue
            for node in ast.walk(method):
                match node:
                    case ast.Call(
                        func=ast.Attribute(attr="eq" | "ne"),
                        args=[ast.Name(id=name), ast.Constant(value=value)],
                    ):
                        # Names that are set again get a number behind.
                        plain = name.rstrip("0123456789")
                        found = next((item for item in names if item in (name, plain)), None)
                        if found is not None and isinstance(value, (int, float)):
                            hints.setdefault(found, value)
        return hints

    def _attach(self, made: Any, name: str, value: Any) -> None:
        if isinstance(value, ScriptObject):
            child = self.module(value)
            if isinstance(made, ScriptModule) and isinstance(child, torch.nn.Module) and "." not in name:
                made._modules[name] = child
                return
            value = child
        elif isinstance(value, StoredTensor):
            tensor = self._tensor(value.key)
            if isinstance(made, ScriptModule):
                if tensor.is_floating_point():
                    made._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
                else:
                    made._buffers[name] = tensor
                return
            value = tensor
        elif isinstance(value, (list, tuple)):
            value = [self.module(item) if isinstance(item, ScriptObject) else item for item in value]
        made.script_values[name] = value

    def attribute(self, owner: Any, name: str) -> Any:
        """Read an attribute of a live object."""
        if (id(owner), name) in self.overrides:
            return self.overrides[id(owner), name]
        if isinstance(owner, ScriptModule):
            for registry in (owner._parameters, owner._buffers, owner._modules):
                if name in registry:
                    return registry[name]
        if isinstance(owner, (ScriptModule, _Plain)):
            if name in owner.script_values:
                return owner.script_values[name]
            if name == "training":
                return False
            raise GraphError(f"its code reads {owner.script_class}.{name}, which the archive lacks")
        if isinstance(owner, torch.Tensor) and name in ("dtype", "device", "shape"):
            return getattr(owner, name)
        raise GraphError(f"its code reads .{name} of a {type(owner).__name__}")

    def store(self, owner: Any, name: str, value: Any) -> None:
        """Write an attribute of a live object, for this run only."""
        if not isinstance(owner, (ScriptModule, _Plain)):
            raise GraphError(f"its code writes .{name} of a {type(owner).__name__}")
        self.overrides[id(owner), name] = value

    def call(self, owner: Any, name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Call a method of a live object; a submodule's forward goes through the module, where hooks see it."""
        if isinstance(owner, ScriptModule) and name == "forward":
            return owner(*arguments, **named)
        if isinstance(owner, (ScriptModule, _Plain)):
            return self.method(owner, name, arguments, named)
        if isinstance(owner, (list, dict, str)):
            return self.interpreter._operation(name, [owner, *arguments], named)
        raise GraphError(f"its code calls .{name}() of a {type(owner).__name__}")

    def method(self, owner: Any, name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Interpret a method."""
        function = self.library.methods.get((owner.script_class, name))
        if function is None:
            raise GraphError(f"{owner.script_class} has no method {name}")
        outermost = not self.running
        if outermost:
            self.running = True
            self.overrides.clear()
            self.interpreter.steps = 0
        try:
            return self.interpreter.run(function, [owner, *arguments], named)
        finally:
            if outermost:
                self.running = False


def signature(function: ast.FunctionDef) -> inspect.Signature:
    """Return the parameters of a method of an archive, their types as they are written."""
    arguments, defaults = function.args.args, function.args.defaults
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = len(arguments) - len(defaults)
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.arg,
                kind,
                annotation=ast.unparse(argument.annotation)
                if argument.annotation
                else inspect.Parameter.empty,
                # Only that there is one counts; the interpreter reads the code's own.
                default=inspect.Parameter.empty if place < first else None,
            )
            for place, argument in enumerate(arguments)
        ]
    )
