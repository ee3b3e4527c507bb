"""The ATen tape: one forward of a live program under fake tensors, written down as a graph.

The program runs functionalised, so that in-place writes and writes through views arrive as pure operations, and
on fake tensors, so that no memory is spent and no arithmetic done. Parameters and buffers are known by identity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spectool.errors import GraphError
from spectool.graph.aten import Slot
from spectool.graph.boundaries import wall_kind
from spectool.graph.types import Call, Graph, Node, Opaque, Value
from spectool.graph.untouched import as_it_was, evaluation, quiet, slow_attention

Tensor = torch.Tensor
Scalar = int | float | bool


@dataclass
class _Writer:
    """Names tensors by identity and collects nodes; every tensor seen is kept alive so that ids stay unique."""

    names: dict[int, str] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    sharing: dict[int, list[Tensor]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    captured: dict[str, Tensor] = field(default_factory=dict)
    scope: list[str] = field(default_factory=list)
    walls: list[str] = field(default_factory=list)
    paused: int = 0

    def bind(self, tensor: Tensor, name: str) -> None:
        """Say that ``tensor`` now holds the value ``name``."""
        if id(tensor) not in self.names:
            self.alive.append(tensor)
            self.sharing.setdefault(_storage(tensor), []).append(tensor)
        self.names[id(tensor)] = name
        self.values[name] = Value(
            name, tuple(int(n) for n in tensor.shape), str(tensor.dtype).removeprefix("torch.")
        )

    def name_of(self, tensor: Tensor) -> str:
        """Return the name of the value a tensor holds.

        A real tensor that was never seen is a constant the program keeps for itself; a fake one is the result of
        something that went past the tape, and so a value of its own.
        """
        known = self.names.get(id(tensor))
        if known is None:
            if isinstance(tensor, FakeTensor):
                known = f"%lost.{len(self.alive)}"
            else:
                known = f"captured_{len(self.captured)}"
                self.captured[known] = tensor
            self.bind(tensor, known)
        return known

    def written(self, tensor: Tensor, label: str) -> None:
        """Give a tensor that was written in place its new value, and every view of its storage an unknown one."""
        self.bind(tensor, label)
        source = self.names[id(tensor)]
        for other in self.sharing.get(_storage(tensor), []):
            if other is tensor:
                continue
            view = f"%{len(self.nodes)}.view{len(self.alive)}.{id(other) % 997}"
            self.nodes.append(Node(f"/view#{len(self.nodes)}", Opaque("view of a write"), (source,), (view,)))
            self.bind(other, view)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without one
        return id(tensor)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every ATen call that comes by."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writer = writer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func)
        if name.startswith("prim."):
            return result
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs and not self.writer.paused:
            self._write(name, args, kwargs, result)
            for tensor in _written(func, args, kwargs):
                self.writer.written(
                    tensor, self.writer.names.get(id(tensor), f"%{len(self.writer.nodes)}.write")
                )
        return result

    def _write(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        writer = self.writer
        inputs: list[str] = []

        def slot(value: Any) -> Any:
            if isinstance(value, Tensor):
                inputs.append(writer.name_of(value))
                return Slot(len(inputs) - 1)
            if isinstance(value, (list, tuple)):
                return type(value)(slot(item) for item in value) if type(value) in (list, tuple) else value
            if isinstance(value, torch.SymInt):
                return int(value)
            return value

        stored = {
            "args": tuple(slot(value) for value in args),
            "kwargs": {k: slot(v) for k, v in kwargs.items()},
        }
        produced = result if isinstance(result, (tuple, list)) else (result,)
        outputs = []
        for position, tensor in enumerate(produced):
            if not isinstance(tensor, Tensor):
                outputs.append("")
                continue
            label = f"%{len(writer.nodes)}" + (f".{position}" if len(produced) > 1 else "")
            writer.bind(tensor, label)
            outputs.append(label)
        where = writer.scope[-1] if writer.scope else ""
        # Inside a norm or a recurrent cell no operation is looked at by itself: the module is one boundary.
        op = Opaque(name, f"inside:{writer.walls[-1]}") if writer.walls else Call(name, stored)
        writer.nodes.append(Node(f"{where}/{name}#{len(writer.nodes)}", op, tuple(inputs), tuple(outputs)))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that a call writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        found.extend(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    return found


class _Pads(TorchFunctionMode):
    """Writes a circular pad as the one operation it is; torch takes it apart into writes through views."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self.writer = writer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("pad", "_pad_circular"):
            return func(*args, **kwargs)
        bound = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
        if bound.get("mode") != "circular" and func.__name__ == "pad":
            return func(*args, **kwargs)
        self.writer.paused += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.writer.paused -= 1
        writer = self.writer
        label = f"%{len(writer.nodes)}"
        source = writer.name_of(_inner(bound["input"]))
        writer.bind(_inner(result), label)
        where = writer.scope[-1] if writer.scope else ""
        name = "aten._pad_circular.default"
        op = Call(name, {"args": (Slot(0), [int(side) for side in bound["pad"]]), "kwargs": {}})
        writer.nodes.append(Node(f"{where}/{name}#{len(writer.nodes)}", op, (source,), (label,)))
        return result


def _inner(tensor: Tensor) -> Tensor:
    """Return the tensor inside a functionalised one."""
    if torch._is_functional_tensor(tensor):
        functional: Any = torch
        functional._sync(tensor)
        inner: Tensor = functional._from_functional_tensor(tensor)
        return inner
    return tensor


def record(
    module: torch.nn.Module,
    inputs: Sequence[Tensor | Scalar],
    named_inputs: Mapping[str, Tensor | Scalar] | None = None,
) -> tuple[Graph, dict[str, Tensor]]:
    """Run a module once on fake tensors and return its graph.

    The module is left as it was: its training flags are restored, its parameters and buffers never written.

    Args:
        module: The program; it is run in evaluation mode.
        inputs: Example inputs; of tensors only shapes and types count, numbers are passed on.
        named_inputs: The same, by keyword.

    Returns:
        The graph, whose constants go by the names of parameters and buffers, and the tensors that the program
        made or captured for itself, by their names in the graph.

    Raises:
        GraphError: If the program cannot be run on fake or on real tensors; the message says why.
    """
    named = dict(named_inputs or {})
    meta = any(parameter.is_meta for parameter in module.parameters())
    # Some kernels exist for half types alone, even as shapes (grouped products of experts); where there is data,
    # a program that branches on values runs on the real tensors last.
    attempts: list[tuple[bool, torch.dtype | None]] = [(True, None), (True, torch.bfloat16)]
    if not meta:
        attempts.append((False, None))
    problems = []
    for fake, dtype in attempts:
        try:
            with quiet():
                return _record(module, inputs, named, fake, dtype)
        except Exception as error:  # whatever a stranger's forward raises
            text = str(error).strip().splitlines()
            problems.append(f"{type(error).__name__}: {text[0] if text else ''}"[:300])
    raise GraphError(
        f"the program of {type(module).__name__} cannot be followed ({problems[0]})",
        hint="check the shapes and the number of its inputs",
    )


def _record(
    module: torch.nn.Module,
    inputs: Sequence[Tensor | Scalar],
    named: Mapping[str, Tensor | Scalar],
    fake: bool,
    dtype: torch.dtype | None,
) -> tuple[Graph, dict[str, Tensor]]:
    writer = _Writer()
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    stand_in: dict[int, Tensor] = {}
    tensors = dict(
        (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    )

    def prepare(tensor: Tensor) -> Tensor:
        if id(tensor) not in stand_in:
            plain = tensor.detach()
            if isinstance(mode, FakeTensorMode):
                kind = dtype if dtype is not None and plain.is_floating_point() else plain.dtype
                # One device for all: parameters may be on the meta device and buffers not.
                with mode:
                    stand_in[id(tensor)] = torch.empty_strided(plain.size(), plain.stride(), dtype=kind)
            else:
                # A buffer that the program writes to must not change under the user's feet.
                stand_in[id(tensor)] = plain.clone()
        return stand_in[id(tensor)]

    state = {name: prepare(tensor) for name, tensor in tensors.items()}
    for name, tensor in state.items():
        if id(tensor) not in writer.names:
            writer.bind(tensor, name)
    constants = {
        name: tuple(tensor.shape) for name, tensor in state.items() if writer.names[id(tensor)] == name
    }
    place = torch.device("cpu") if fake else next((t.device for t in tensors.values()), torch.device("cpu"))

    def fresh(tensor: Tensor | Scalar) -> Tensor | Scalar:
        if not isinstance(tensor, Tensor):
            return tensor
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        with mode:
            return torch.zeros(tensor.shape, dtype=kind, device=place)

    positional = [fresh(tensor) for tensor in inputs]
    keyword = {name: fresh(tensor) for name, tensor in named.items()}
    fed = {**{f"input.{index}": value for index, value in enumerate(positional)}, **keyword}
    flowing = {label: value for label, value in fed.items() if isinstance(value, Tensor)}
    for label, value in flowing.items():
        writer.bind(value, label)

    def program(state: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # Tied parameters arrive as one tensor under every one of their names already.
        result = torch.func.functional_call(module, dict(state), tuple(args), dict(kwargs), tie_weights=False)
        return _tensors(result)

    with (
        as_it_was(module),
        evaluation(module),
        _scopes(module, writer),
        slow_attention(),
        torch.no_grad(),
        mode,
        _Recorder(writer),
        _Pads(writer),
    ):
        outputs = torch.func.functionalize(program, remove="mutations")(state, positional, keyword)
    graph = Graph(
        nodes=tuple(writer.nodes),
        values=writer.values,
        inputs=tuple(flowing),
        outputs=tuple(writer.names[id(t)] for t in outputs if id(t) in writer.names),
        constants={**constants, **{name: tuple(t.shape) for name, t in writer.captured.items()}},
        origins={name: (name,) for name in constants},
    )
    return graph, writer.captured


def _tensors(result: Any) -> list[Tensor]:
    """Return every tensor in whatever a forward returned, dataclass-like outputs included."""
    leaves = pytree.tree_leaves(result)
    found = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found.extend(value for value in vars(leaf).values() if isinstance(value, Tensor))
    return found


def wall_of(module: torch.nn.Module) -> str | None:
    """Return the kind of boundary a module is (a norm by its own statistics, a recurrent layer), None if none."""
    if isinstance(module, torch.nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return None
    if any(True for _ in module.children()):
        return None
    return wall_kind(type(module).__name__)


@contextlib.contextmanager
def _scopes(module: torch.nn.Module, writer: _Writer) -> Iterator[None]:
    """Tell the writer which submodule is running."""
    handles = []

    def enter(name: str, wall: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            writer.scope.append(name)
            if wall:
                writer.walls.append(name)

        return hook

    def leave(wall: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            writer.scope.pop()
            if wall:
                writer.walls.pop()

        return hook

    try:
        for name, child in module.named_modules():
            if isinstance(child, torch.jit.ScriptModule):
                continue
            wall = wall_of(child) is not None
            handles.append(child.register_forward_pre_hook(enter(name, wall)))
            handles.append(child.register_forward_hook(leave(wall), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
