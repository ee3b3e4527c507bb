"""What a checkpoint is once its structure has been read: names, shapes and where the bytes lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from spectool.checkpoint.patch.types import Written


@dataclass(frozen=True)
class TensorRef:
    """Where the bytes of one named tensor lie. Nothing is read until ``Checkpoint.read``.

    Attributes:
        name: Checkpoint key (nested keys joined by ``.``).
        dtype: Element type by its safetensors-like short name: ``float32``, ``bfloat16``, ``int64``, ``uint8``…
            Quantised ones (``qint8``…) are read as the integers that are stored; their scale stands in
            ``Checkpoint.metadata["quantization"]``.
        shape: Shape as stored.
        stride: Stride in elements; row-major unless the container says otherwise.
        file: File that holds the bytes (a shard, an external data file, or the checkpoint itself).
        record: Name of the record inside the file (zip member, initializer name); empty if the file has none.
        offset: Byte offset of the tensor's first element inside ``record`` (inside ``file`` if no record).
        storage: Identity of the underlying storage; two refs with one ``storage`` share bytes.
        nbytes: Bytes of the storage that holds it.
        base: Position in ``file`` where ``record`` begins (0 if there is no record); -1 where the bytes have no
            position of their own (inside a protobuf message or a pickle). In a gzipped checkpoint positions count
            in the unpacked bytes.
        lead: Bytes of the storage that lie before the tensor's first element.
        byteorder: Order of the bytes of one element, ``little`` or ``big``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: Path
    record: str
    offset: int
    storage: str
    nbytes: int
    base: int = 0
    lead: int = 0
    byteorder: str = "little"

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def position(self) -> int | None:
        """Absolute byte position of the first element in ``file``; None where there is none."""
        return None if self.base < 0 else self.base + self.offset

    @property
    def storage_position(self) -> int | None:
        """Absolute byte position of the storage (``nbytes`` long) in ``file``; None where there is none."""
        return None if self.base < 0 else self.base + self.offset - self.lead


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and, if the container has one, its program.

    Holds no tensor data, with two exceptions: an ONNX model holds the weights that stand in its own file, and numpy
    arrays inside a pickle come with it.

    Attributes:
        path: What the user named.
        format: One of ``torch-zip``, ``torch-legacy``, ``torchscript``, ``pt2``, ``safetensors``,
            ``safetensors-sharded``, ``torch-sharded``, ``huggingface``, ``onnx``.
        tensors: Name → ref, in file order, optimizer-like branches left out. Tied names are all there.
        aliases: Name → first name in file order, for tied tensors (same storage, offset, shape and stride).
        metadata: Small facts from the container. The entries of a safetensors ``__metadata__`` stand under their own
            names; the others, each only where there is one, are ``config`` and ``adapter_config`` (Hugging Face JSON
            beside the weights), ``index`` (metadata of a shard index), ``scalars`` (plain values beside the state
            dict: epoch, architecture…), ``branch`` (dotted path of the state dict taken), ``candidates`` (paths that
            ``key`` could choose), ``quantization`` (tensor → scheme, scale, zero_point, axis; per-channel scales and
            zero points are refs for ``reader``), ``gzip`` (True), ``onnx`` (ir_version, producer, opsets,
            metadata_props).
        program: The program if there is one: a ``ModelProto`` for ONNX (in-file weights included, external ones
            not), an ``InertModule`` tree for a pickled module; None otherwise.
        notes: What was left out or unwrapped, in words (``ignored optimizer``, ``took 'state_dict'``…).
        reader: Reads one tensor's bytes; use ``read``.
        unread: Name → why its values cannot be read (sparse, on the meta device, strings…); not in ``tensors``.
        limits: What the file may ask for, as it was opened.
    """

    path: Path
    format: str
    tensors: Mapping[str, TensorRef]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    program: Any = None
    notes: tuple[str, ...] = ()
    reader: Callable[[TensorRef], torch.Tensor] | None = field(default=None, repr=False, compare=False)
    unread: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default=DEFAULT, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        """Return tensor ``name`` on the CPU in its stored type; only its own bytes are read.

        Raises:
            KeyError: If there is no such tensor.
            CheckpointError: If it is one of ``unread``.
            CorruptFile: If its bytes are not all there, or the file changed since it was opened.
        """
        if name in self.unread:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {self.unread[name]}")
        if self.reader is None:
            raise ValueError(f"checkpoint {self.path} was built without a reader")
        return self.reader(self.tensors[name])

    def write(self, out: Path, edits: Mapping[str, torch.Tensor], *, force: bool = False) -> Written:
        """Write a copy in which only the bytes of the edited tensors differ; see ``write_checkpoint``."""
        from spectool.checkpoint.patch import write_checkpoint

        return write_checkpoint(self, out, edits, force=force)


@dataclass(frozen=True)
class InertModule:
    """A pickled ``nn.Module`` whose class was never imported.

    Attributes:
        cls: Dotted name of the class as pickled, e.g. ``torch.nn.modules.conv.Conv2d``.
        attributes: Plain attributes (numbers, strings, tuples, dicts, None) such as ``stride`` or ``eps``; objects
            of other classes, hooks included, as ``InertObject``.
        parameters: Local name → checkpoint key, parameters and buffers. The key is in ``Checkpoint.tensors``,
            or in ``Checkpoint.unread`` if its values cannot be read.
        children: Local name → submodule, in registration order.
    """

    cls: str
    attributes: Mapping[str, Any]
    parameters: Mapping[str, str]
    children: Mapping[str, InertModule]


@dataclass(frozen=True)
class InertObject:
    """Any other pickled object, function or class inside a module; nothing was imported or called.

    Attributes:
        cls: Dotted name as pickled, e.g. ``torch.nn.utils.weight_norm.WeightNorm``.
        attributes: Its plain state, e.g. ``{"name": "weight", "dim": 0}``; empty for a function or class.
    """

    cls: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTensor:
    """Stands for a tensor inside an inert object.

    Attributes:
        key: Its checkpoint key.
    """

    key: str


@dataclass(frozen=True)
class ScriptObject:
    """An object of a TorchScript archive, as data.

    Attributes:
        cls: Qualified name of its class in the archive's own code, e.g. ``__torch__.nets.ConvBN``.
        attributes: Name → plain value, ``StoredTensor``, ``ScriptObject``, or a list of those.
    """

    cls: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class ScriptProgram:
    """The program of a TorchScript archive, as data; nothing of it has been compiled.

    Attributes:
        root: The outermost module.
        code: Path below ``code/`` → text.
        constants: Checkpoint keys of the tensors that the code calls ``CONSTANTS.c0``, ``c1``…
    """

    root: ScriptObject
    code: Mapping[str, str]
    constants: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportedProgram:
    """The program of a ``.pt2`` archive, as data.

    Attributes:
        document: Its ``models/*.json``.
    """

    document: Mapping[str, Any]
