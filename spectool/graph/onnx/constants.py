"""Everything in an ONNX model that does not depend on its inputs: stored tensors and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from spectool.errors import CorruptFile, OperatorError
from spectool.graph.onnx.evaluate import Array, Evaluator
from spectool.graph.types import Shape

if TYPE_CHECKING:
    import torch

    from spectool.checkpoint.types import Checkpoint

SMALL = 1 << 14
"""Entries up to which a constant is computed at once and kept."""
_MODERATE = 1 << 24
_LARGEST = 1 << 31
_DEEPEST = 150
_QUANTISED = ("int8", "uint8", "int4", "uint4", "int2", "uint2", "float8", "float4")
# Operations that only move entries: index arrays can be sent through them.
_MOVER_NAMES = "Identity Cast Transpose Reshape Flatten Squeeze Unsqueeze Slice Split Gather Concat"
_MOVERS = frozenset(_MOVER_NAMES.split())


@dataclass
class Constant:
    """One constant.

    Attributes:
        shape: Its shape.
        dtype: Element type as numpy names it.
        origins: Checkpoint keys it was made from, the one that names it first.
        read: Computes or reads it.
        label: What it is called in a row key: the stored tensor it is made of, or its own name.
        depth: Length of the longest chain of computations behind it.
        node: (node, names of its inputs, output index) where it was computed by a node.
        value: The array, where it is small.
        cut: (source, what takes entries out of an array of its shape) where it is a part of another constant.
    """

    shape: Shape
    dtype: str
    origins: tuple[str, ...]
    read: Callable[[], Array]
    label: str
    depth: int = 0
    node: tuple[Any, tuple[str, ...], int] | None = None
    value: Array | None = None
    cut: tuple[str, Callable[[Array], Array]] | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)


@dataclass
class Constants:
    """All constants of a model by their unique names; large ones are read and computed when asked for."""

    checkpoint: Checkpoint
    evaluator: Evaluator
    table: dict[str, Constant] = field(default_factory=dict)
    stored_shapes: dict[str, Shape] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def __getitem__(self, name: str) -> Constant:
        return self.table[name]

    def store(self, name: str, tensor: Any, key: str) -> None:
        """Add a tensor of the file under a unique name; ``key`` is what the checkpoint calls it."""
        shape = tuple(tensor.dims)
        if min(shape, default=0) < 0:
            raise CorruptFile(f"{self.checkpoint.path}: tensor {key!r} has a negative size ({shape})")
        key = self.checkpoint.aliases.get(key, key)  # tied tensors go by the first name
        self.stored_shapes[key] = shape

        def read() -> Array:
            if external_data_helper.uses_external_data(tensor):
                return _to_numpy(self.checkpoint.read(key))
            try:
                return np.asarray(numpy_helper.to_array(tensor))
            except (ValueError, TypeError, KeyError) as error:
                raise CorruptFile(
                    f"{self.checkpoint.path}: tensor {key!r} has other bytes than its shape says ({error})"
                ) from error

        self._put(name, Constant(shape, dtype_name(tensor.data_type), (key,), read, key))

    def store_array(self, name: str, value: Array, key: str) -> None:
        """Add a tensor of the file that is not written as a plain tensor."""
        array = np.asarray(value)
        self.stored_shapes[key] = array.shape
        self.put(name, array, (key,))

    def put(self, name: str, value: Array, origins: tuple[str, ...] = ()) -> None:
        """Add a value that is known already."""
        array = np.asarray(value)
        self.table[name] = Constant(
            array.shape,
            array.dtype.name,
            origins,
            lambda: array,
            origins[0] if origins else name,
            value=array if array.size <= SMALL else None,
        )

    def cut(self, name: str, source: str, shape: Shape, move: Callable[[Array], Array]) -> None:
        """Add a constant whose entries ``move`` takes out of those of ``source``."""
        self.compute(name, [source], shape, self.table[source].dtype, lambda: move(self.value(source)))
        self.table[name].cut = (source, move)

    def compute(
        self, name: str, sources: Sequence[str], shape: Shape, dtype: str, read: Callable[[], Array]
    ) -> None:
        """Add a constant that ``read`` computes from ``sources`` when it is asked for."""
        depth = 1 + max((self.table[source].depth for source in sources), default=0)
        self._put(
            name, Constant(shape, dtype, self._origins(sources), read, self._label(name, sources), depth)
        )

    def fold(
        self, node: Any, inputs: Sequence[str], outputs: Sequence[str], types: Sequence[tuple[str, Any]]
    ) -> bool:
        """Add the outputs of a node whose inputs are all constants.

        Args:
            node: The node.
            inputs: Unique names of its inputs, empty where absent.
            outputs: Unique names of its outputs.
            types: Element type and shape (None where unknown) that inference gave each output.

        Returns:
            Whether it was added; not if it cannot be evaluated.
        """
        sources = [name for name in inputs if name]
        arguments = [self.table[name] if name else None for name in inputs]
        kinds = [element_type(argument.dtype) if argument else 0 for argument in arguments]
        depth = 1 + max((self.table[name].depth for name in sources), default=0)
        if depth > _DEEPEST or not self.evaluator.can(node, kinds):
            return False
        size = sum(self.table[name].numel for name in sources)
        known = all(shape is not None and None not in shape for _, shape in types)
        produced = sum(prod(shape) for _, shape in types) if known else 0
        if (size <= SMALL and produced <= SMALL) or (not known and size <= _MODERATE):
            try:
                results = self.evaluator.run(node, [self.value(name) if name else None for name in inputs])
            except ValueError:
                return False
            for index, (output, result) in enumerate(zip(outputs, results, strict=False)):
                if output:
                    self.put(output, result, self._origins(sources))
                    self.table[output].depth = depth if result.size > SMALL else 0
                    self._made_by(output, node, inputs, index)
            return True
        if not known:
            return False
        for index, (output, (dtype, shape)) in enumerate(zip(outputs, types, strict=True)):
            if output:
                self.compute(output, sources, tuple(shape), dtype, self._later(node, tuple(inputs), index))
                self._made_by(output, node, inputs, index)
        return True

    def value(self, name: str) -> Array:
        """Return a constant as an array.

        Raises:
            OperatorError: If it cannot be computed or would be absurdly large.
        """
        entry = self.table[name]
        if entry.value is not None:
            return entry.value
        if entry.numel > _LARGEST:
            raise OperatorError(f"constant {name} would have {entry.numel} entries")
        array = entry.read()
        if array.size <= SMALL:
            entry.value = array
        return array

    def small(self, name: str) -> Array | None:
        """Return a constant's value if it is one and small, else None."""
        if name not in self.table or self.table[name].numel > SMALL:
            return None
        return self.value(name)

    def load(self, name: str) -> torch.Tensor:
        """Return a constant as a tensor on the CPU in its own type.

        Raises:
            OperatorError: If it cannot be computed.
        """
        entry = self.table[name]
        if (
            entry.node is None
            and entry.origins
            and self._is_key(entry.origins[0], entry.shape)
            and not entry.depth
        ):
            return self.checkpoint.read(entry.origins[0])
        return _to_torch(self.value(name))

    def plain(self, name: str) -> str | None:
        """Return the key of the stored tensor that a constant is; None if it is none, or not as it is."""
        entry = self.table.get(name)
        if entry is None or entry.node is not None or entry.depth or len(entry.origins) != 1:
            return None
        return entry.origins[0] if self._is_key(entry.origins[0], entry.shape) else None

    def make(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Compute a constant from stored tensors that ``read`` gives by key.

        Raises:
            OperatorError: If it cannot be computed.
        """
        return _to_torch(self._made_of(name, read))

    def _made_of(self, name: str, read: Callable[[str], torch.Tensor]) -> Array:
        entry = self.table[name]
        key = self.plain(name)
        if key is not None:
            return _to_numpy(read(key))
        if entry.node is None or not entry.origins:
            return self.value(name)
        node, inputs, index = entry.node
        try:
            return self.evaluator.run(node, [self._made_of(one, read) if one else None for one in inputs])[
                index
            ]
        except ValueError as error:
            raise OperatorError(str(error)) from error

    def provenance(
        self, name: str, base: Callable[[str], bool] | None = None
    ) -> tuple[str, Shape, Array] | None:
        """Return the one stored tensor that a constant is a rearrangement of.

        Args:
            name: The constant.
            base: Which computed constants to stop at; by default stored tensors.

        Returns:
            That tensor's key and shape and the flat index of each entry, or None if there is no such tensor or the
            constant is too large to be worth it.
        """
        entry = self.table.get(name)
        if entry is None or entry.numel > _MODERATE:
            return None
        if base is not None and entry.node is not None and base(name):
            return name, entry.shape, np.arange(entry.numel, dtype=np.int64).reshape(entry.shape)
        if entry.cut is not None:
            source, move = entry.cut
            whole = self.provenance(source, base)
            return None if whole is None else (whole[0], whole[1], move(whole[2]))
        if entry.node is None:
            if base is not None or entry.depth or len(entry.origins) != 1:
                return None
            return entry.origins[0], entry.shape, np.arange(entry.numel, dtype=np.int64).reshape(entry.shape)
        node, inputs, index = entry.node
        if node.op_type not in _MOVERS:
            return None
        found = [
            self.provenance(source, base) if _is_data(node.op_type, position) else None
            for position, source in enumerate(inputs)
        ]
        origins = {(item[0], item[1]) for item in found if item is not None}
        if len(origins) != 1:
            return None
        ((key, shape),) = origins
        if any(item is None and _is_data(node.op_type, position) for position, item in enumerate(found)):
            return None
        moved = [
            item[2] if item is not None else (self.value(source) if source else None)
            for item, source in zip(found, inputs, strict=True)
        ]
        if node.op_type in ("Identity", "Cast"):
            return found[0]
        try:
            return key, shape, self.evaluator.run(node, moved)[index]
        except ValueError:
            return None

    def _put(self, name: str, constant: Constant) -> None:
        self.table[name] = constant
        if constant.numel <= SMALL and not constant.depth and constant.dtype:
            constant.value = constant.read()

    def _made_by(self, name: str, node: Any, inputs: Sequence[str], index: int) -> None:
        """Note the node that computed a constant, and what the constant is called for it."""
        constant = self.table[name]
        constant.node = (node, tuple(inputs), index)
        sources = [source for source in inputs if source]
        labels = {self.table[source].label for source in sources if self.table[source].origins}
        # A concatenation of several tensors is none of them.
        constant.label = name if node.op_type == "Concat" and len(labels) > 1 else self._label(name, sources)

    def _label(self, name: str, sources: Sequence[str]) -> str:
        """Return the label of the source that holds the first of the origins, else the constant's own name."""
        first = next(iter(self._origins(sources)), None)
        return next(
            (self.table[source].label for source in sources if first in self.table[source].origins), name
        )

    def _later(self, node: Any, inputs: tuple[str, ...], index: int) -> Callable[[], Array]:
        def read() -> Array:
            arrays = [self.value(name) if name else None for name in inputs]
            try:
                return self.evaluator.run(node, arrays)[index]
            except ValueError as error:
                raise OperatorError(str(error)) from error

        return read

    def _origins(self, sources: Sequence[str]) -> tuple[str, ...]:
        """Return the stored tensors behind some constants, largest first, indices and single numbers left out."""
        found: dict[str, int] = {}
        for source in sources:
            entry = self.table[source]
            if entry.dtype.startswith(("float", "bfloat", *_QUANTISED)):
                for origin in entry.origins:
                    found[origin] = prod(self.stored_shapes.get(origin, ()))
        tensors = [origin for origin, size in found.items() if size > 1] or list(found)
        return tuple(sorted(tensors, key=lambda origin: -found[origin]))

    def _is_key(self, key: str, shape: Shape) -> bool:
        ref = self.checkpoint.tensors.get(key)
        return ref is not None and tuple(ref.shape) == shape


def _is_data(op_type: str, position: int) -> bool:
    return position == 0 or op_type == "Concat"


def dtype_name(element: int) -> str:
    """Return numpy's (or ml_dtypes') name of an ONNX element type; empty for none."""
    if element in (TensorProto.UNDEFINED, TensorProto.STRING):
        return "" if element == TensorProto.UNDEFINED else "string"
    if element == TensorProto.BFLOAT16:
        return "bfloat16"
    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(element)).name)
    except KeyError:  # a type that this version of onnx does not know
        return ""


_ELEMENTS: dict[str, int] = {
    dtype_name(element): element
    for element in TensorProto.DataType.values()
    if element not in (TensorProto.UNDEFINED, TensorProto.STRING)
}


def element_type(dtype: str) -> int:
    """Return the ONNX element type of a numpy name; 0 if there is none."""
    return int(_ELEMENTS.get(dtype, TensorProto.STRING if dtype in ("string", "object") else 0))


def _to_numpy(tensor: torch.Tensor) -> Array:
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def _to_torch(array: Array) -> torch.Tensor:
    import torch

    array = np.ascontiguousarray(array).reshape(array.shape)
    name = array.dtype.name
    if name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if name.startswith("float8") and hasattr(torch, name):
        kind: torch.dtype = getattr(torch, name)
        return torch.from_numpy(array.view(np.uint8)).view(kind)
    if name.startswith(("int4", "uint4", "int2", "uint2")):
        return torch.from_numpy(array.astype(np.int8 if name.startswith("int") else np.uint8))
    if name.startswith(("float4", "float8")):
        return torch.from_numpy(array.astype(np.float32))
    try:
        return torch.from_numpy(array.copy() if not array.flags.writeable else array)
    except TypeError as error:
        raise OperatorError(f"tensors of type {name} cannot be used") from error
